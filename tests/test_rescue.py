"""What is told, and what is saved, when a save fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import safetensors

from peftstate._rescue import reason_of_disk, rescue


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (
            safetensors.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
            "[Errno 28] No space left on device",
        ),
        (
            safetensors.SafetensorError(
                'Error while serializing: I/O error: Permission denied (os error 13) at path "/a/b"'
            ),
            "[Errno 13] Permission denied",
        ),
        (
            safetensors.SafetensorError(
                "Error while serializing: IoError(Os { code: 122, kind: FilesystemQuotaExceeded, "
                'message: "Disk quota exceeded" })'
            ),
            "[Errno 122] Disk quota exceeded",
        ),
    ],
)
def test_the_reason_is_the_disks_own(tmp_path: Path, error: Exception, reason: str) -> None:
    """Whichever library wrote the file, the reason reads as Python's."""
    assert reason_of_disk(error, tmp_path) == reason


@pytest.mark.parametrize(
    "text",
    [
        "basic_ios::clear: iostream error",
        "[enforce fail at inline_container.cc:672] . unexpected pos 7296 vs 7184",
        "PytorchStreamWriter failed writing file data/0: file write failed",
    ],
)
def test_torch_does_not_tell_the_reason(tmp_path: Path, text: str) -> None:
    """Of torch's errors the text is kept, with the free space, which it is about mostly."""
    for folder in (tmp_path, tmp_path / "not made"):
        reason = reason_of_disk(RuntimeError(text), folder)
        assert reason.startswith(f"torch could not write a file ({text}); the disk has ")
        assert reason.endswith(" bytes free")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Some tensors share memory"),
        safetensors.SafetensorError("Error while serializing: InvalidOffset"),
        ValueError("iostream error"),
    ],
)
def test_other_errors_are_not_the_disks(tmp_path: Path, error: Exception) -> None:
    """What the model is to blame for is told otherwise."""
    assert reason_of_disk(error, tmp_path) == ""


def test_torch_and_safetensors_say_so(tmp_path: Path) -> None:
    """The installed libraries' own errors, of paths that cannot be written, are recognised."""
    import safetensors.torch
    import torch

    path = tmp_path / "missing" / "file"
    with pytest.raises(safetensors.SafetensorError) as of_safetensors:
        safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    assert reason_of_disk(of_safetensors.value, tmp_path) == str(
        OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    )
    with pytest.raises(RuntimeError) as of_torch:
        torch.save({"a": torch.zeros(1)}, tmp_path)
    assert reason_of_disk(of_torch.value, tmp_path).startswith("torch could not write a file (")


def test_a_rescue(tmp_path: Path) -> None:
    """Each one gets a folder of its own."""
    for number in range(2):
        folder = rescue(tmp_path / "adapter", lambda folder: (folder / "file").write_text("saved"))
        assert folder == str(tmp_path / f"adapter.rescued-{number}")
        assert Path(folder, "file").read_text() == "saved"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_rescue_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    """Nothing is left of it; Ctrl-C goes on, an error gives way to the one that led here."""

    def save_into(folder: Path) -> None:
        (folder / "half").write_text("a file")
        raise error

    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            rescue(tmp_path / "adapter", save_into)
    else:
        assert rescue(tmp_path / "adapter", save_into) is None
    assert list(tmp_path.iterdir()) == []
