"""``peftstate schema``: the JSON Schema of the manifest."""

from __future__ import annotations

import sys
from importlib.resources import files


def schema() -> None:
    """Print the JSON Schema of the manifest that this version writes."""
    text = files("peftstate").joinpath("manifest.schema.json").read_text(encoding="utf-8")
    sys.stdout.write(text)
