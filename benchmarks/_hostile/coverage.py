"""The parsers of manifests and of files of tensors, fuzzed by coverage.

It takes atheris, which is none of the project's dependencies. The arguments are libFuzzer's:

    python -m pip install atheris
    python -m benchmarks._hostile.coverage -max_total_time=60 -timeout=2 -rss_limit_mb=2048
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["peftstate", "cattrs"]):
    from peftstate._codec import DecodeError, loads
    from peftstate._names import safe_name
    from peftstate._weights import parse_weights
    from peftstate.errors import PeftStateError
    from peftstate.manifest import Manifest

from benchmarks._hostile.case import MANIFEST, SIDECAR, sealed
from benchmarks._hostile.scene import Scene


def read(data: bytes) -> None:
    """Hand bytes to each parser; of peftstate's own errors none is a find.

    A manifest is sealed again, or nothing but the seal would be tried.
    """
    for name in (SIDECAR, "adapter_model.bin"):
        with contextlib.suppress(PeftStateError):
            parse_weights(name, data)
    try:
        value = loads(data)
    except DecodeError:
        return
    if isinstance(value, str):
        try:
            safe_name(value)
        except ValueError:
            return
    try:
        Manifest.from_json(sealed(value) if isinstance(value, dict) else data, path=MANIFEST)
    except PeftStateError:
        return


def main() -> None:
    """Fuzz, beginning with good files."""
    with tempfile.TemporaryDirectory() as place:
        scene, seeds = Scene.at(Path(place)), Path(place, "seeds")
        seeds.mkdir()
        manifest = (scene.good / MANIFEST).read_bytes()
        (seeds / "manifest").write_bytes(json.dumps(json.loads(manifest)).encode())
        (seeds / "sidecar").write_bytes((scene.good / SIDECAR).read_bytes())
        atheris.Setup([*sys.argv, "-max_len=100000", str(seeds)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
