"""Reading files of strangers, and the steps of a save on the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from benchmarks._faults.edits import permissions_obeyed
from peftstate._disk import (
    alone,
    is_there,
    read_file,
    set_mode,
    sync_folder,
    tree,
    usual_mode,
)
from peftstate.errors import IntegrityError, UnreadableFileError


def test_read_file(tmp_path: Path) -> None:
    """A file is read as it is, up to and with the limit."""
    (tmp_path / "file").write_bytes(b"\0\r\n\xff")
    assert bytes(read_file(tmp_path / "file", inside=[tmp_path])) == b"\0\r\n\xff"
    assert bytes(read_file(tmp_path / "file", inside=[tmp_path], limit=4)) == b"\0\r\n\xff"
    with pytest.raises(IntegrityError, match="saved at most 3 bytes, found 4 bytes"):
        read_file(tmp_path / "file", inside=[tmp_path], limit=3)


@pytest.mark.parametrize("size", [0, 1, 2**16, 2**21 + 77, 2**24 + 77])
def test_read_into_memory_of_its_own(tmp_path: Path, size: int) -> None:
    """What is done to what was read changes neither the file nor what another reads."""
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    data, other = (read_file(tmp_path / "file", inside=[tmp_path]) for _ in range(2))
    assert bytes(data) == content
    data[:] = bytes(size)
    assert bytes(other) == content
    assert (tmp_path / "file").read_bytes() == content


def test_read_missing_file(tmp_path: Path) -> None:
    """A file is missing if nothing is there, also where a file stands in its folder's place."""
    (tmp_path / "file").touch()
    for name in ("missing", "file/missing"):
        with pytest.raises(FileNotFoundError):
            read_file(tmp_path / name, inside=[tmp_path])
        assert not is_there(tmp_path / name)
    assert is_there(tmp_path / "file")


def test_read_link_to_nothing(tmp_path: Path) -> None:
    """A link to a missing file is not nothing: what was there has been replaced."""
    (tmp_path / "link").symlink_to("missing")
    with pytest.raises(IntegrityError, match="found a link to nothing") as caught:
        read_file(tmp_path / "link", inside=[tmp_path])
    assert caught.value.file == str(tmp_path / "link")
    assert is_there(tmp_path / "link")


def test_read_file_of_a_size(tmp_path: Path) -> None:
    """A file of another size than the one that was saved is refused before it is read."""
    (tmp_path / "file").write_bytes(b"1234")
    assert bytes(read_file(tmp_path / "file", inside=[tmp_path], size=4)) == b"1234"
    with pytest.raises(IntegrityError, match="saved 5 bytes, found 4 bytes"):
        read_file(tmp_path / "file", inside=[tmp_path], size=5)


@pytest.mark.parametrize("closed", ["file", "folder/file"])
def test_read_closed_file(tmp_path: Path, closed: str) -> None:
    """A file that this process may not read is there, and the error says why it is not read."""
    path = tmp_path / closed
    path.parent.mkdir(exist_ok=True)
    path.touch()
    first = tmp_path / closed.partition("/")[0]
    first.chmod(0)
    with permissions_obeyed():
        assert is_there(path)
        with pytest.raises(UnreadableFileError, match="Permission denied") as caught:
            read_file(path, inside=[tmp_path])
    first.chmod(0o700)
    assert caught.value.file == str(path)
    assert isinstance(caught.value.__cause__, PermissionError)


def test_read_broken_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a disk fails to give is told as what could not be read."""
    (tmp_path / "file").touch()

    def fail(descriptor: int) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        with pytest.raises(UnreadableFileError, match="Input/output error"):
            read_file(tmp_path / "file", inside=[tmp_path])


def test_read_link(tmp_path: Path) -> None:
    """A link is followed inside the given folders, and refused when it leads out of them."""
    folder, other = tmp_path / "folder", tmp_path / "folder-of-another"
    for path in (folder, other):
        path.mkdir()
        (path / "file").write_text(path.name)
    (folder / "inside").symlink_to("file")
    (folder / "outside").symlink_to(other / "file")
    (folder / "linked").symlink_to(other)
    assert bytes(read_file(folder / "inside", inside=[folder])) == b"folder"
    assert bytes(read_file(folder / "outside", inside=[folder, other])) == b"folder-of-another"
    for name in ("outside", "linked/file"):
        with pytest.raises(IntegrityError, match="found a link to") as caught:
            read_file(folder / name, inside=[folder, folder / "linked"])
        assert caught.value.file == str(folder / name)


def test_read_link_loop(tmp_path: Path) -> None:
    """A link to itself is no file."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(IntegrityError, match="a link made just now, or one to itself"):
        read_file(tmp_path / "loop", inside=[tmp_path])


def test_read_file_exchanged_for_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that takes a file's place after its path was looked at is not followed."""
    path, other = tmp_path / "folder" / "file", tmp_path / "other"
    path.parent.mkdir()
    path.touch()
    other.touch()
    real_open = os.open

    def then_exchange(name: Path, flags: int) -> int:
        path.unlink()
        path.symlink_to(other)
        return real_open(name, flags)

    monkeypatch.setattr(os, "open", then_exchange)
    with pytest.raises(IntegrityError, match="a link made just now, or one to itself"):
        read_file(path, inside=[path.parent])


def test_read_pipe_socket_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no regular file is refused at once, without waiting for a writer."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "folder", "socket"):
            with pytest.raises(IntegrityError, match="saved a file, found"):
                read_file(tmp_path / name, inside=[tmp_path])


def test_read_file_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that somebody writes to in place is not taken for a whole one."""
    (tmp_path / "file").write_bytes(b"1234")
    fstat = os.fstat

    def then_grow(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        with (tmp_path / "file").open("ab") as file:
            file.write(b"5")
        return status

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", then_grow)
        with pytest.raises(IntegrityError, match="saved 4 bytes, found a file that is being"):
            read_file(tmp_path / "file", inside=[tmp_path])


@pytest.mark.parametrize("size", [4, 2**24])
def test_read_file_that_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A file that was cut off meanwhile is none either, however long it is."""
    (tmp_path / "file").write_bytes(bytes(size))
    fstat = os.fstat

    def then_shrink(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        os.truncate(tmp_path / "file", size - 1)
        return status

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", then_shrink)
        with pytest.raises(IntegrityError, match=f"saved {size} bytes, found a file that is being"):
            read_file(tmp_path / "file", inside=[tmp_path])


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="files are read in one go")
def test_read_what_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may give less than it is asked for, and the rest when it is asked again."""
    content = random.Random(0).randbytes(2**24 + 5)
    (tmp_path / "file").write_bytes(content)
    preadv = os.preadv

    def in_parts(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        (buffer,) = buffers
        return preadv(descriptor, [buffer[: 2**20 + 1]], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", in_parts)
        assert bytes(read_file(tmp_path / "file", inside=[tmp_path])) == content


def test_read_without_reads_from_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where a file is read from its beginning to its end."""
    content = random.Random(0).randbytes(2**21 + 5)
    (tmp_path / "file").write_bytes(content)
    monkeypatch.delattr(os, "preadv", raising=False)
    assert bytes(read_file(tmp_path / "file", inside=[tmp_path])) == content


def test_read_leaves_no_descriptor(tmp_path: Path) -> None:
    """Descriptors are closed, whether the file is taken or refused."""
    (tmp_path / "file").write_bytes(b"1234")
    free = os.open(tmp_path, os.O_RDONLY)
    os.close(free)
    read_file(tmp_path / "file", inside=[tmp_path])
    for name, limit in (("file", 1), (".", None)):
        with pytest.raises(IntegrityError):
            read_file(tmp_path / name, inside=[tmp_path], limit=limit)
    now_free = os.open(tmp_path, os.O_RDONLY)
    os.close(now_free)
    assert now_free == free


def test_tree(tmp_path: Path) -> None:
    """A folder comes before what is in it; links to folders are not followed."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "link").symlink_to("a")
    files, folders = tree(tmp_path)
    assert {file.as_posix() for file in files} == {"a/b/file", "link"}
    assert [folder.as_posix() for folder in folders] == ["a", "a/b"]
    assert tree(tmp_path / "missing") == ([], [])


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_usual_mode(tmp_path: Path, umask: int) -> None:
    """The mode of a new file is found without a trace."""
    before = os.umask(umask)
    try:
        assert usual_mode(tmp_path, "probe") == 0o666 & ~umask
    finally:
        os.umask(before)
    assert not list(tmp_path.iterdir())


def test_set_mode_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without modes, such as FAT, does not stop a save."""
    path = tmp_path / "file"
    path.touch(mode=0o600)
    set_mode(path, 0o644)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    set_mode(path, 0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize(("number", "is_error"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_sync_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, is_error: bool
) -> None:
    """A file system that cannot sync folders is put up with, a failing disk is not."""

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if is_error:
        with pytest.raises(OSError, match="Input/output error"):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)


def test_alone(tmp_path: Path) -> None:
    """Two bodies do not overlap, and the lock leaves no trace."""
    order = []

    def second() -> None:
        with alone(tmp_path, seconds=60):
            order.append("second")

    thread = threading.Thread(target=second)
    with alone(tmp_path, seconds=60):
        thread.start()
        thread.join(timeout=0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_alone_is_not_waited_for_long(tmp_path: Path, seconds: float) -> None:
    """A body runs all the same when the lock is not to be had in time."""
    with alone(tmp_path, seconds=60), alone(tmp_path, seconds=seconds):
        pass


def test_alone_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body runs at once on a disk that has no locks."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, f"{descriptor} {operation}")

    monkeypatch.setattr(fcntl, "flock", refuse)
    start = time.monotonic()
    with alone(tmp_path, seconds=60):
        pass
    assert time.monotonic() - start < 30


def test_alone_ends_with_the_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is given up after an error too, and though a forked child has the descriptor."""
    copies = []
    flock = fcntl.flock

    def observed(descriptor: int, operation: int) -> None:
        copies.append(os.dup(descriptor))  # a copy holds a lock as a child's descriptor does
        flock(descriptor, operation)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="of the body"):  # noqa: PT012
        patch.setattr(fcntl, "flock", observed)
        with alone(tmp_path, seconds=60):
            raise ValueError("of the body")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for opened in (descriptor, *copies):
        os.close(opened)
