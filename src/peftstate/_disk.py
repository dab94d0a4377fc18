"""Small steps on the file system that the standard library leaves to its callers."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

from peftstate._work import in_threads
from peftstate.errors import IntegrityError, UnreadableFileError

if sys.platform != "win32":
    import fcntl

_of_thread = threading.local()
"""Which folders the thread has locked, or waits for."""


@contextlib.contextmanager
def alone(folder: Path, *, seconds: float) -> Iterator[None]:
    """Keep other savers of a folder out while the body runs.

    This is politeness, nothing to rely on: when the lock cannot be had in time, as when a saver
    hangs, or at all, as on Windows and many network file systems, the body runs all the same. The
    folder itself is locked, so that no lock file is left in it. A save in a signal handler, which
    interrupts another one of its thread, could wait for ever; it does not wait.
    """
    mine: set[Path] = vars(_of_thread).setdefault("locked", set())
    if sys.platform == "win32" or folder in mine:
        yield
        return
    mine.add(folder)
    try:
        with _locked(folder, seconds):
            yield
    finally:
        mine.discard(folder)


@contextlib.contextmanager
def _locked(folder: Path, seconds: float) -> Iterator[None]:
    """Hold the lock of a folder while the body runs, if it can be had."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, seconds)
        yield
    finally:
        # Closing alone releases nothing while a child forked meanwhile has the descriptor too.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, seconds: float) -> None:
    """Wait for a lock, but not for ever."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return
        else:
            return


def tree(root: Path) -> tuple[list[PurePath], list[PurePath]]:
    """The files and the folders below a folder, relative to it, a folder before what is in it."""
    files: list[PurePath] = []
    folders: list[PurePath] = []
    waiting = [root]
    while waiting:
        # Another process may be moving the files away and removing the folders.
        with contextlib.suppress(FileNotFoundError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                is_folder = entry.is_dir(follow_symlinks=False)
                (folders if is_folder else files).append(PurePath(entry.path).relative_to(root))
                if is_folder:
                    waiting.append(Path(entry.path))
    return files, folders


def usual_mode(folder: Path, probe_name: str) -> int:
    """The mode that a new file gets in a folder.

    It is read off a file made for it, since the umask can only be read by setting it, for all
    threads, and is not all that counts.
    """
    probe = folder / probe_name
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def set_mode(path: Path, mode: int) -> None:
    """Set a file's mode, where the file system has modes."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with contextlib.suppress(PermissionError, NotImplementedError):
            path.chmod(mode)


def sync_file(path: Path) -> None:
    """Force a file's bytes to disk."""
    # Windows flushes only through a descriptor that may write.
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Force a folder's entries to disk, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Several FUSE and network file systems do not know fsync of a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def is_there(path: Path) -> bool:
    """Whether there is anything at a path; what this process may not look at could be there."""
    try:
        path.lstat()
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EPERM, errno.EIO)
    return True


def read_file(
    path: Path, *, inside: Iterable[Path], limit: int | None = None, size: int | None = None
) -> memoryview:
    """Read a file as it is at one moment, into memory that is the caller's.

    Args:
        path: The file, or a link to it.
        inside: Folders in one of which the file must lie, links resolved. They are taken as they
            are named: one that is a link itself holds nothing.
        limit: The most bytes that it may have.
        size: The bytes that it must have.

    Raises:
        IntegrityError: It is elsewhere, no regular file, of another size, or being written in
            place, or it cannot be read.
        FileNotFoundError: There is no such file.
    """
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(folder) for folder in inside):
        raise IntegrityError(str(path), "a file of this folder", f"a link to {real}")
    try:
        return _read(path, _open(path, real), limit, size)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise IntegrityError(str(path), "a file", f"a link to nothing ({real})") from error
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, "a file is in a folder's place", str(path)) from error
    except OSError as error:
        raise UnreadableFileError(str(path), error.strerror or str(error)) from error


def _read(path: Path, descriptor: int, limit: int | None, size: int | None) -> memoryview:
    """Read an open file, and close it."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError(str(path), "a file", stat.filemode(status.st_mode))
        if limit is not None and status.st_size > limit:
            raise IntegrityError(str(path), f"at most {limit} bytes", f"{status.st_size} bytes")
        if size is not None and status.st_size != size:
            raise IntegrityError(str(path), f"{size} bytes", f"{status.st_size} bytes")
        data = _memory(status.st_size)
        is_whole = _fill(data, descriptor)
    finally:
        os.close(descriptor)
    if not is_whole:
        raise IntegrityError(str(path), f"{status.st_size} bytes", "a file that is being written")
    return data


def _fill(data: memoryview, descriptor: int) -> bool:
    """Read an open file into memory, and say whether it has as many bytes.

    Most of the time goes into giving the memory its pages, which several threads do at once.
    """
    if not hasattr(os, "preadv"):  # on Windows
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.readinto(data) == len(data) and not file.read(1)
    starts = range(0, len(data), _AT_ONCE)
    filled = in_threads(
        starts,
        lambda start: _fill_piece(data[start : start + _AT_ONCE], descriptor, start),
        nbytes=len(data),
    )
    return all(filled) and not os.pread(descriptor, 1, len(data))


def _fill_piece(piece: memoryview, descriptor: int, start: int) -> bool:
    """Read the bytes of an open file from one on, and say whether there are as many."""
    filled = 0
    while filled < len(piece):  # a network file system may give less than it is asked for
        read = os.preadv(descriptor, [piece[filled:]], start + filled)
        if read == 0:
            return False
        filled += read
    return True


_AT_ONCE = 8 * 1024 * 1024
"""Bytes that a thread reads before it asks for more."""
BOUNDARY = 64
"""Bytes; where torch puts tensors (`c10/core/alignment.h`)."""
_LARGE = 64 * 1024
"""Bytes for which pages of their own are worth asking for."""


def _memory(size: int) -> memoryview:
    """Memory for the content of a file.

    The first touch of each page of 4 KB takes the system as long as reading the page does, so large
    files get larger pages where these are to be had. The last byte lies before a boundary, so that
    the tensors of safetensors, which come last in their file, can begin at one.
    """
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(bytearray(size))
    begin = -size % BOUNDARY
    pages = mmap.mmap(-1, begin + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)[begin:]


def _open(path: Path, real: Path) -> int:
    """Open a file for reading that is no link any more."""
    flags = os.O_RDONLY
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        return os.open(real, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise IntegrityError(
                str(path), "a file", "a link made just now, or one to itself"
            ) from error
        if error.errno == errno.ENXIO:
            raise IntegrityError(str(path), "a file", "a socket") from error
        raise
