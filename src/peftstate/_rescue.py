"""What is left to do when a save fails: tell what the disk said, and save what can be saved."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors

# "I/O error: File too large (os error 27)", "IoError(Os { code: 27, … })" before safetensors 0.5
_OF_SAFETENSORS = re.compile(r"I/?O ?error\b.*\b(?:os error|code:) (?P<number>\d+)", re.IGNORECASE)
# torch.save drops the reason (`caffe2/serialize/inline_container.cc`, and C++'s streams)
_OF_TORCH = re.compile(r"iostream error|inline_container\.cc|PytorchStreamWriter")


def reason_of_disk(error: Exception, directory: Path) -> str:
    """What the file system said, if it was that which failed; empty otherwise.

    Args:
        error: What a save failed with; of safetensors and torch not an `OSError`.
        directory: The folder that was saved to.
    """
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, safetensors.SafetensorError):
        found = _OF_SAFETENSORS.search(str(error))
        return str(OSError(number := int(found["number"]), os.strerror(number))) if found else ""
    if isinstance(error, RuntimeError) and _OF_TORCH.search(str(error)):
        free = shutil.disk_usage(directory if directory.is_dir() else directory.parent).free
        return f"torch could not write a file ({error}); the disk has {free:,} bytes free"
    return ""


def rescue(directory: Path, save_into: Callable[[Path], object]) -> str | None:
    """Save what can be saved into a folder beside the one that was asked for, if that works.

    Returns:
        The folder; `None`, and no trace, if that fails, too.
    """
    number = 0
    while (folder := directory.with_name(f"{directory.name}.rescued-{number}")).exists():
        number += 1
    try:
        folder.mkdir(parents=True)
        save_into(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        return None  # the error that led here is raised, and says more
    return str(folder)
