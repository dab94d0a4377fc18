"""What saves and loads tell through ``logging.getLogger("peftstate")``: a line each, at INFO."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from peftstate._diff import printable
from peftstate.sections import SECTIONS

if TYPE_CHECKING:
    from peftstate.manifest import Manifest

_LOGGER = logging.getLogger("peftstate")
_ON_BASE = {
    "saved": "digested",
    "adopted": "digested",
    "loaded": "compared",
    "restored": "compared",
}
"""What is done, and what that does with the tensors of the base model."""


def tell(
    done: str,
    folder: object,
    manifest: Manifest,
    *,
    since: float,
    sections: Collection[str] | None = None,
) -> None:
    """Log what was saved or restored, and how long it took.

    Args:
        done: What was done, one of `_ON_BASE`.
        folder: The adapter's folder.
        manifest: What is saved there.
        since: When it began, by `time.perf_counter`.
        sections: Names of the sections that it is about; by default all in the manifest.
    """
    if not _LOGGER.isEnabledFor(logging.INFO):
        return
    names = manifest.sections if sections is None else sections
    text = ", ".join(section.name for section in SECTIONS if section.name in names)
    if "base_model" in names:
        tensors = manifest.sections["base_model"].tensors.values()
        number = sum(tensor.digest is not None for tensor in tensors)
        text += f"; {number} tensors of the base model {_ON_BASE[done]}"
    took = time.perf_counter() - since
    _LOGGER.info('%s "%s" in %.2f s: %s', done, printable(str(folder)), took, text)
