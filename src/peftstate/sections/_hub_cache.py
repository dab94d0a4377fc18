"""What the Hub's cache knows of a checkpoint, without a byte of its weights being read.

Layout of the cache: `snapshots/<commit>/<file>` is a link to `blobs/<etag>`, and the etag of a file
in Git LFS is its SHA-256. Exactly one link is followed: since huggingface_hub 2 the blob may itself
be a link to one that repos share, which bears the name of another hash
(`huggingface_hub/utils/_shared_blobs.py`). Where links cannot be made, as on Windows, the commit is
known and the hashes are not.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""How the files with the weights of a checkpoint are called; the first kind that is there counts,
as in transformers."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@attrs.frozen(kw_only=True)
class CachedCheckpoint:
    """A checkpoint of the Hub.

    Attributes:
        commit: The commit of its repo, or `None` if it is not known.
        files: The files with its weights in the cache: name → SHA-256, or `None` if the cache does
            not tell.
    """

    commit: str | None = None
    files: Mapping[str, str | None] = attrs.field(factory=dict)


def cached_checkpoint(config: Any, revision: str | None) -> CachedCheckpoint:
    """The checkpoint that a model was loaded from, as far as the Hub's cache knows it.

    Args:
        config: The model's config.
        revision: The revision that PEFT was told, if any.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = getattr(config, "_name_or_path", None)
    if not name or Path(name).exists():
        return CachedCheckpoint()
    commit = getattr(config, "_commit_hash", None)  # which only transformers 4 notes
    try:
        path = try_to_load_from_cache(name, "config.json", revision=commit or revision)
    except HFValidationError:
        return CachedCheckpoint()
    if not isinstance(path, str):
        return CachedCheckpoint(commit=commit)
    snapshot = Path(path).parent
    return CachedCheckpoint(commit=snapshot.name, files=_weights(snapshot))


def _weights(snapshot: Path) -> dict[str, str | None]:
    """The files with weights in a snapshot, and their SHA-256."""
    names: Iterable[str] = ()
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(snapshot))  # noqa: PTH208 - the names are wanted
    for pattern in _WEIGHTS:
        if found := fnmatch.filter(names, pattern):
            return {name: _sha256(snapshot / name) for name in found}
    return {}


def _sha256(path: Path) -> str | None:
    """The SHA-256 of a file's content, by the name of the blob that it is a link to."""
    try:
        blob = path.readlink().name
    except OSError:
        return None
    return blob if _SHA256.fullmatch(blob) else None
