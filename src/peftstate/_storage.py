"""Writing an adapter folder so that it always reads as one whole generation.

A save writes into a staging folder inside the adapter folder and forces everything to disk. Then
comes the one step that counts: the staging folder is renamed to a fixed name, `COMPLETE_NAME`.
Before it the folder reads as the old generation, after it as the new one, since loads look into the
complete folder first (`peftstate._folder`). What follows only tidies up: the files move to where
other programs look for them, and the empty complete folder is removed.

This does not depend on a lock. A folder cannot be renamed onto one that holds files, so at most one
generation is complete at a time, and a saver that finds one finishes its moves before it commits
its own. As each staged file moves exactly once, it does not matter who moves it: with two savers
the folder ends as the whole generation of the one that committed last. Only a removal can come too
late for a generation that has the file again, which its manifest then tells; a lock, where it can
be had, keeps savers from getting that close.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath

from peftstate._disk import alone, set_mode, sync_file, sync_folder, tree, usual_mode
from peftstate._saver import STAGING_PREFIX, is_abandoned, staging_name

MANIFEST_NAME = "peftstate.json"
SIDECAR_NAME = "peftstate.tensors"
SIGNATURE_NAME = "model.sig"
ADAPTER_CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT may call the weights; it takes the first that is there."""

RESERVED_PREFIX = ".peftstate-"
COMPLETE_NAME = f"{RESERVED_PREFIX}complete"
REMOVED_PREFIX = f"{RESERVED_PREFIX}removed-"

_PATIENCE = 5.0
"""Seconds to wait for another saver; what it does under the lock takes far less."""


class UnfinishedSaveError(OSError):
    """A save is committed and reads as the new generation, but its files could not all be moved.

    Other programs than peftstate see a mixture until the next save finishes the moves.
    `filename` is the folder that holds the files that are left.
    """


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Replace the files of a folder by those that the body writes, all of them or none.

    What earlier savers left behind is cleared up first: a committed save is finished, the staging
    folders of dead savers are removed.

    Args:
        directory: The adapter folder; made when missing.

    Yields:
        The staging folder. What is in it when the body ends becomes the new generation,
        sub-folders included; the folder's other files stay, but for those given to `mark_removed`.

    Raises:
        UnfinishedSaveError: The save is committed, but files could not be moved to their places.
        OSError: Nothing was replaced, and the staging folder is gone.
    """
    is_new = not directory.is_dir()
    directory = _make_folder(directory)
    with staging_name() as name:
        staging = directory / name
        try:
            staging.mkdir()
            with alone(directory, seconds=_PATIENCE):
                _clear_up(directory, now=staging.stat().st_mtime)
            yield staging
            _seal(staging, directory)
            with alone(directory, seconds=_PATIENCE):
                _commit(staging, directory)
                _finish_committed(directory)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):  # another saver has put something into it
                    directory.rmdir()
            raise


def write_file(path: Path, data: bytes) -> None:
    """Write a file into a staging folder, and make the sub-folder that it is for."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def mark_removed(path: Path) -> None:
    """Have a file of the old generation removed when the save is committed.

    A mark for a file that the new generation has is of no effect, so all names that a file may
    have can be marked without a look at which of them PEFT has written.

    Args:
        path: Where the file would be in the staging folder.
    """
    write_file(removal_mark(path), b"")


def removal_mark(path: Path) -> Path:
    """The empty file that stands for the removal of another one, as a whiteout in overlayfs."""
    return path.with_name(REMOVED_PREFIX + path.name)


def pending(directory: Path) -> Path | None:
    """The complete folder of a save that was committed and whose moves are not finished.

    Args:
        directory: The folder that was saved to.

    Returns:
        The complete folder, or `None` when there is none or when it cannot be trusted: in a
        sticky folder such as /tmp anybody may make one, but not replace the files of others.
    """
    complete = directory / COMPLETE_NAME
    try:
        found, parent = complete.lstat(), directory.stat()
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        return None
    if parent.st_mode & stat.S_ISVTX and found.st_uid not in {parent.st_uid, os.geteuid(), 0}:
        return None
    return complete


def _make_folder(directory: Path) -> Path:
    """Make the folder that is saved to, and give its real path."""
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        sync_folder(directory.parent)
    return directory.resolve()


def _clear_up(directory: Path, *, now: float) -> None:
    """Finish what was committed, and remove what dead savers left."""
    above = pending(directory.parent)
    if above is not None and (above / directory.name).is_dir():
        _finish(directory.parent)
    _finish(directory)
    for entry in list(directory.iterdir()):
        if entry.name.startswith(STAGING_PREFIX) and is_abandoned(entry, now=now):
            shutil.rmtree(entry, ignore_errors=True)


def _seal(staging: Path, directory: Path) -> None:
    """Make the staged files fit to be committed: movable, readable as usual, and on disk."""
    files, folders = tree(staging)
    for file in files:
        if file != _target(file) and _target(file) in files:
            (staging / file).unlink()
    files, _ = tree(staging)
    _check_targets(directory, files, folders)
    # safetensors leaves 0600, which a server of another user cannot read (safetensors#782).
    mode = usual_mode(staging, f"{RESERVED_PREFIX}mode")
    for file in files:
        set_mode(staging / file, mode)
        sync_file(staging / file)
    for folder in (*reversed(folders), PurePath()):
        sync_folder(staging / folder)


def _check_targets(directory: Path, files: list[PurePath], folders: list[PurePath]) -> None:
    """Refuse before the commit what could not be moved after it."""
    for folder in folders:
        target = directory / folder
        if not os.path.lexists(target):
            continue
        if not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file is in the folder's place", str(target))
        if target.stat().st_dev != directory.stat().st_dev:
            raise OSError(errno.EXDEV, f"it is not on the disk of {directory}", str(target))
        if not os.access(target, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "the folder cannot be written to", str(target))
    for file in files:
        target = directory / _target(file)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder is in the file's place", str(target))


def _commit(staging: Path, directory: Path) -> None:
    """Rename the staging folder to the complete one: from here on it is the new generation."""
    complete = directory / COMPLETE_NAME
    for folder in tree(staging)[1]:
        _finish(directory / folder)
    while True:
        _finish(directory)
        try:
            staging.rename(complete)
        except OSError as error:
            taken = error.errno in (errno.EEXIST, errno.ENOTEMPTY)
            if not taken or (os.path.lexists(complete) and pending(directory) is None):
                raise
        else:
            return


def _finish_committed(directory: Path) -> None:
    """Finish the save that was just committed."""
    try:
        sync_folder(directory)
        _finish(directory)
    except OSError as error:
        message = (
            f"the new files of {directory} are complete, but could not all be moved into it "
            f"({error}). peftstate loads them from where they are, and the next save moves them"
        )
        complete = str(directory / COMPLETE_NAME)
        raise UnfinishedSaveError(error.errno, message, complete) from error


def _finish(directory: Path) -> None:
    """Move what a committed save still holds to its places. Others may be doing so as well."""
    complete = pending(directory)
    if complete is None:
        return
    files, folders = tree(complete)
    for folder in folders:
        (directory / folder).mkdir(exist_ok=True)
    for file in sorted(files, key=_move_order):
        if file == _target(file):
            _move(complete / file, directory / file)
        elif os.path.lexists(complete / file):
            (directory / _target(file)).unlink(missing_ok=True)
    # On disk, what is moved or removed must be so before the last trace of the save is gone.
    for folder in (PurePath(), *folders):
        sync_folder(directory / folder)
    for file in files:
        if file != _target(file):
            (complete / file).unlink(missing_ok=True)
    for folder in (*reversed(folders), PurePath()):
        _remove_folder(complete / folder)


def _move_order(file: PurePath) -> tuple[bool, bool, bool]:
    """Manifests last and the root's the very last, for readers that do not know of all this."""
    is_manifest = file.name == MANIFEST_NAME
    return is_manifest and file.parent == PurePath(), is_manifest, file != _target(file)


def _target(file: PurePath) -> PurePath:
    """The file that a staged file replaces or, when it is a removal mark, removes."""
    return file.with_name(file.name.removeprefix(REMOVED_PREFIX))


def _move(source: Path, target: Path) -> None:
    """Rename a file, unless another saver has done so."""
    try:
        source.replace(target)
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise


def _remove_folder(folder: Path) -> None:
    """Remove an empty folder, unless another saver has done so and committed a save since."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
