"""Saves that are killed, fail, or run at the same time: the folder reads as one generation."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from peftstate import _storage
from peftstate._folder import AdapterFolder
from peftstate._storage import (
    ADAPTER_CONFIG_NAME,
    COMPLETE_NAME,
    MANIFEST_NAME,
    RESERVED_PREFIX,
    SIDECAR_NAME,
    WEIGHTS_NAMES,
    UnfinishedSaveError,
    mark_removed,
    pending,
    staged,
    write_file,
)
from peftstate.errors import ManifestNotFoundError

SAFETENSORS, BIN = WEIGHTS_NAMES
EXTRA = "extra"
"""The sub-folder of a second adapter."""


class MixedError(Exception):
    """A read gave files of two generations."""


class Killed(BaseException):
    """The process is dead: from here on nothing that it does has an effect."""


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses what the disk has not written yet, and waiting for it takes long."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def _no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have savers go on at once without the lock, as on a disk that has none."""
    monkeypatch.setattr(_storage, "_PATIENCE", 0.0)


def write_adapter(folder: Path, files: dict[str, str]) -> None:
    """Stage an adapter: what PEFT writes, then the manifest that names its digests."""
    for name in (*WEIGHTS_NAMES, SIDECAR_NAME):
        mark_removed(folder / name)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    manifest = {"files": digests, "tag": files[ADAPTER_CONFIG_NAME]}
    write_file(folder / MANIFEST_NAME, json.dumps(manifest).encode())


def save(directory: Path, tag: str) -> None:
    """Save two adapters as a generation; every second one has other files."""
    files = {ADAPTER_CONFIG_NAME: tag}
    if int(tag) % 2:
        files |= {SAFETENSORS: f"weights {tag}", SIDECAR_NAME: f"sidecar {tag}"}
    else:
        files |= {BIN: f"weights {tag}"}
    with staged(directory) as staging:
        write_adapter(staging / EXTRA, files)
        write_adapter(staging, files)


def saved_files(tag: str) -> set[str]:
    """The paths that a folder holds after `save`."""
    weights = {SAFETENSORS, SIDECAR_NAME} if int(tag) % 2 else {BIN}
    names = {ADAPTER_CONFIG_NAME, MANIFEST_NAME, *weights}
    return names | {f"{EXTRA}/{name}" for name in names} | {EXTRA}


def read_adapter(folder: AdapterFolder) -> str:
    """The generation of an adapter, each file held against its digest."""
    manifest = json.loads(folder.read_bytes(MANIFEST_NAME))
    for name, digest in manifest["files"].items():
        try:
            data = folder.read_bytes(name)
        except FileNotFoundError as error:
            raise MixedError(name) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise MixedError(name)
    return str(manifest["tag"])


def read(directory: Path) -> str | None:
    """The generation that a folder reads as, and its sub-folder, opened either way."""
    root = AdapterFolder.at(directory)
    try:
        tag = read_adapter(root)
    except ManifestNotFoundError:
        assert not root.exists(f"{EXTRA}/{MANIFEST_NAME}")
        return None
    for extra in (root.subfolder(EXTRA), AdapterFolder.at(directory / EXTRA)):
        assert read_adapter(extra) == tag
    return tag


def listing(directory: Path) -> set[str]:
    """All paths below a folder."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


@attrs.define
class Disk:
    """The file system, seen through the calls that change it, one of which may go wrong."""

    fail_at: int
    error: Callable[[], BaseException]
    count: int = 0
    calls: list[str] = attrs.field(factory=list)

    def step(self, name: str) -> None:
        """Count a call; a process that was killed can do nothing any more."""
        self.count += 1
        self.calls.append(name)
        error = self.error()
        if self.count == self.fail_at or (self.count > self.fail_at and isinstance(error, Killed)):
            raise error

    def wrap(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        """Count a function's calls."""

        def counted(*args: object, **options: object) -> object:
            self.step(name)
            return real(*args, **options)

        return counted

    def write_file(self) -> Callable[[Path, bytes], int]:
        """A `Path.write_bytes` that writes in two halves, with a step between."""

        def write_bytes(path: Path, data: bytes) -> int:
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                self.step("write")
                file.write(data[len(data) // 2 :])
            return len(data)

        return write_bytes


@contextlib.contextmanager
def disk(fail_at: int, error: Callable[[], BaseException] = Killed) -> Iterator[Disk]:
    """Let the n-th call that changes the file system go wrong."""
    faulty = Disk(fail_at, error)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "open", "fsync", "chmod", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, faulty.wrap(name, getattr(os, name)))
        patch.setattr(Path, "write_bytes", faulty.write_file())
        yield faulty


def kill(directory: Path, tag: str, at: int) -> bool:
    """Save, but die at the n-th step. Tells whether the save came to its end before."""
    with disk(at) as faulty, contextlib.suppress(Killed):
        save(directory, tag)
    return faulty.count < at


def kill_at_call(directory: Path, tag: str, name: str, number: int) -> None:
    """Save, but die at the n-th call of one function."""
    copy = directory.with_name(f"{directory.name}-copy")
    if directory.exists():
        shutil.copytree(directory, copy)
    with disk(sys.maxsize) as observed:
        save(copy, tag)
    steps = [step for step, call in enumerate(observed.calls, start=1) if call == name]
    assert not kill(directory, tag, steps[number - 1])


def previous(directory: Path, kind: str) -> str | None:
    """Bring a folder into the state before a save, and give the generation that it reads as."""
    if kind == "nothing":
        return None
    save(directory, "1")
    if kind == "committed":
        return "1"
    kill_at_call(directory, "2", "replace", 4)
    return "2"


@pytest.mark.parametrize("before", ["nothing", "committed", "pending"])
def test_killed_at_any_step(tmp_path: Path, before: str) -> None:
    """A save killed at any step leaves the old or the new generation, and no litter for long."""
    old = previous(tmp_path / "before", before)
    outcomes = []
    for step in range(1, 10_000):
        directory = tmp_path / f"{step}"
        if old is not None:
            shutil.copytree(tmp_path / "before", directory)
        ended = kill(directory, "3", step)
        outcomes.append(read(directory))
        if step % 2:
            save(directory, "4")
            assert read(directory) == "4"
            assert listing(directory) == saved_files("4")
        else:
            save(directory, "5")
            assert read(directory) == "5"
            assert listing(directory) == saved_files("5")
        if ended:
            break
    assert outcomes[-1] == "3"
    commit = outcomes.index("3")
    assert outcomes == [old] * commit + ["3"] * (len(outcomes) - commit)
    assert commit > 20
    assert len(outcomes) - commit > 20


@pytest.mark.parametrize("before", ["nothing", "committed", "pending"])
def test_disk_error_at_any_step(tmp_path: Path, before: str) -> None:
    """An error of the disk surfaces; the old files stay, or the save is committed and says so."""
    old = previous(tmp_path / "before", before)
    for step in range(1, 10_000):
        directory = tmp_path / f"{step}"
        if old is not None:
            shutil.copytree(tmp_path / "before", directory)
        raised: OSError | None = None
        with disk(step, lambda: OSError(errno.ENOSPC, "No space left on device")) as faulty:
            try:
                save(directory, "3")
            except OSError as error:
                raised = error
        assert raised is None or raised.errno == errno.ENOSPC
        is_committed = raised is None or isinstance(raised, UnfinishedSaveError)
        assert read(directory) == ("3" if is_committed else old)
        assert not list(directory.glob(f"{RESERVED_PREFIX}staging-*"))
        save(directory, "4")
        assert listing(directory) == saved_files("4")
        if faulty.count < step:
            break
    assert step > 40


KILLED_SAVER = """
import os, signal, sys
from pathlib import Path
from peftstate._storage import staged

function, number, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
real, calls = getattr(os, function), 0

def dies(*args, **options):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)

setattr(os, function, dies)
with staged(directory) as staging:
    for name in ("adapter_config.json", "adapter_model.safetensors", "peftstate.json"):
        (staging / name).write_text("new")
"""


@pytest.mark.parametrize(
    ("function", "number", "survivor"),
    [("fsync", 2, "old"), ("rename", 1, "old"), ("replace", 1, "new"), ("rmdir", 1, "new")],
)
def test_killed_process(tmp_path: Path, function: str, number: int, survivor: str) -> None:
    """What a process killed by the system leaves is read whole, and cleared by the next save."""
    names = (ADAPTER_CONFIG_NAME, SAFETENSORS, MANIFEST_NAME)
    for name in names:
        (tmp_path / name).write_text("old")
    command = [sys.executable, "-c", KILLED_SAVER, function, str(number), str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    folder = AdapterFolder.at(tmp_path)
    assert {folder.read_bytes(name) for name in names} == {survivor.encode()}
    assert list(tmp_path.glob(f"{RESERVED_PREFIX}*"))
    save(tmp_path, "1")
    assert listing(tmp_path) == saved_files("1")


LIVE_SAVER = """
import sys
from pathlib import Path
from peftstate._storage import staged

with staged(Path(sys.argv[1])) as staging:
    (staging / "adapter_config.json").write_text("of the other process")
    print("writing", flush=True)
    sys.stdin.readline()
"""


def test_live_saver_keeps_its_staging_folder(tmp_path: Path) -> None:
    """A save clears up after dead savers only; one that is still writing can commit later."""
    command = [sys.executable, "-c", LIVE_SAVER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as saver:
        assert saver.stdout is not None
        assert saver.stdout.readline() == "writing\n"
        with staged(tmp_path) as staging:
            (staging / ADAPTER_CONFIG_NAME).write_text("of this thread")
            save(tmp_path, "1")
        assert (tmp_path / ADAPTER_CONFIG_NAME).read_text() == "of this thread"
        saver.communicate("go on\n")
    assert saver.returncode == 0
    assert (tmp_path / ADAPTER_CONFIG_NAME).read_text() == "of the other process"
    assert listing(tmp_path) == saved_files("1")


def test_staging_folder_of_another_machine(tmp_path: Path) -> None:
    """A staging folder that nobody here can judge goes when nothing was written for a day."""
    long_ago = 1_000_000_000.0
    for name in ("recent", "writing", "abandoned"):
        staging = tmp_path / f"{RESERVED_PREFIX}staging-{name}"
        staging.mkdir()
        (staging / ADAPTER_CONFIG_NAME).write_text("1")
        if name == "abandoned":
            os.utime(staging / ADAPTER_CONFIG_NAME, (long_ago, long_ago))
        if name != "recent":
            os.utime(staging, (long_ago, long_ago))
    save(tmp_path, "1")
    left = {path.name.rpartition("-")[2] for path in tmp_path.glob(f"{RESERVED_PREFIX}*")}
    assert left == {"recent", "writing"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_in_body(tmp_path: Path, error: type[BaseException]) -> None:
    """When the body fails, the folder is as it was and the error goes on."""
    save(tmp_path, "1")

    def fail() -> None:
        with staged(tmp_path) as staging:
            write_adapter(staging, {ADAPTER_CONFIG_NAME: "2"})
            raise error

    with pytest.raises(error):
        fail()
    assert read(tmp_path) == "1"
    assert listing(tmp_path) == saved_files("1")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes(tmp_path: Path, umask: int, mode: int) -> None:
    """Files get the mode of any new file, whatever the body gave them or the old ones had."""
    before = os.umask(umask)
    try:
        save(tmp_path, "1")
        with staged(tmp_path) as staging:
            write_adapter(staging / EXTRA, {ADAPTER_CONFIG_NAME: "2"})
            (staging / EXTRA / SAFETENSORS).touch(mode=0o600)
            (staging / ADAPTER_CONFIG_NAME).touch(mode=0o640)
            (staging / ADAPTER_CONFIG_NAME).chmod(0o777)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {
        path.name: mode for path in files
    }


def test_complete_folder_is_readable_by_others(tmp_path: Path) -> None:
    """A server of another user can read a save that was not moved to the end."""
    before = os.umask(0o022)
    try:
        kill_at_call(tmp_path / "adapter", "1", "replace", 1)
    finally:
        os.umask(before)
    complete = tmp_path / "adapter" / COMPLETE_NAME
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (complete, complete / EXTRA)}
    assert modes == {0o755}
    files = [path for path in complete.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def test_other_files_stay(tmp_path: Path) -> None:
    """A save replaces what it writes and removes what was marked, nothing else."""
    save(tmp_path, "1")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / EXTRA / "notes").write_text("mine")
    save(tmp_path, "2")
    assert listing(tmp_path) == saved_files("2") | {"README.md", f"{EXTRA}/notes"}


def test_mark_for_a_file_that_is_written(tmp_path: Path) -> None:
    """A removal mark is void when the new generation has the file."""
    for written_first in (True, False):
        with staged(tmp_path) as staging:
            if written_first:
                write_file(staging / SIDECAR_NAME, b"new")
            mark_removed(staging / SIDECAR_NAME)
            if not written_first:
                write_file(staging / SIDECAR_NAME, b"newer")
    assert listing(tmp_path) == {SIDECAR_NAME}
    assert (tmp_path / SIDECAR_NAME).read_bytes() == b"newer"


def test_manifests_move_last(tmp_path: Path) -> None:
    """For readers that know nothing of complete folders, the root's manifest comes last."""
    save(tmp_path, "1")
    moved: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        replace = os.replace

        def observed(source: Path, target: Path) -> None:
            moved.append(target.relative_to(tmp_path).as_posix())
            if target.name == MANIFEST_NAME:
                assert listing(tmp_path) & saved_files("1") <= saved_files("2")
            replace(source, target)

        patch.setattr(os, "replace", observed)
        save(tmp_path, "2")
    assert moved[-2:] == [f"{EXTRA}/{MANIFEST_NAME}", MANIFEST_NAME]
    assert len(moved) == 6


def test_all_is_on_disk_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are forced to disk before the commit, the commit before moves, and moves at the end."""
    save(tmp_path, "1")
    synced: list[set[int]] = [set()]
    calls = []

    def observe(name: str) -> None:
        real = getattr(os, name)

        def observed(path: Path, *rest: Path) -> None:
            calls.append((name, Path(path)))
            synced.append(set())
            real(path, *rest)

        monkeypatch.setattr(os, name, observed)

    monkeypatch.setattr(os, "fsync", lambda file: synced[-1].add(os.fstat(file).st_ino))
    for name in ("rename", "replace", "rmdir"):
        observe(name)
    save(tmp_path, "3")
    names = [name for name, _ in calls]
    commit, removal = names.index("rename"), names.index("rmdir")
    assert names == ["rename"] + ["replace"] * 8 + ["rmdir"] * 2
    files = {(tmp_path / name).stat().st_ino for name in saved_files("3")}
    folders = {folder.stat().st_ino for folder in (tmp_path, tmp_path / EXTRA)}
    assert files - folders <= synced[commit]
    assert len(synced[commit] - files) == 4  # the staging folders, and a mark in each
    assert tmp_path.stat().st_ino in synced[commit + 1]
    assert folders <= synced[removal]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_in_the_way(tmp_path: Path, kind: str) -> None:
    """What could not be moved to its place is refused before anything is committed."""
    with staged(tmp_path) as staging:
        write_adapter(staging, {ADAPTER_CONFIG_NAME: "1"})
    if kind == "file":
        (tmp_path / EXTRA).write_text("mine")
        expected: type[OSError] = NotADirectoryError
    else:
        (tmp_path / BIN).mkdir()
        expected = IsADirectoryError
    before = listing(tmp_path)
    with pytest.raises(expected, match=r"in the f\w+'s place"):
        save(tmp_path, "2")
    assert listing(tmp_path) == before
    assert read_adapter(AdapterFolder.at(tmp_path)) == "1"


def test_folder_is_a_file(tmp_path: Path) -> None:
    """Saving to a file is refused as Python refuses it."""
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(FileExistsError):
        save(tmp_path / "adapter", "1")
    assert listing(tmp_path) == {"adapter"}


def test_unfinished_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A committed save whose files cannot be moved says so, and is read from where it is."""
    save(tmp_path, "1")

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name == SAFETENSORS:
            raise PermissionError(errno.EACCES, "The file is in use", str(source))
        Path(source).rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(UnfinishedSaveError, match="the next save moves them") as caught:
            save(tmp_path, "3")
    assert caught.value.errno == errno.EACCES
    assert caught.value.filename == str(tmp_path / COMPLETE_NAME)
    assert isinstance(caught.value.__cause__, PermissionError)
    assert AdapterFolder.at(tmp_path).is_pending
    assert read(tmp_path) == "3"
    save(tmp_path, "5")
    assert not AdapterFolder.at(tmp_path).is_pending
    assert listing(tmp_path) == saved_files("5")


def test_next_save_finishes_before_it_writes(tmp_path: Path) -> None:
    """The body of a save finds the files of the one before in their places, as PEFT's card does."""
    save(tmp_path, "1")
    kill_at_call(tmp_path, "2", "replace", 1)
    with staged(tmp_path):
        assert (tmp_path / ADAPTER_CONFIG_NAME).read_text() == "2"
        assert pending(tmp_path) is None
    assert read(tmp_path) == "2"
    assert listing(tmp_path) == saved_files("2")


def test_save_into_a_subfolder_of_an_unfinished_save(tmp_path: Path) -> None:
    """Saving one adapter of a folder finishes the folder's save first, so that it lasts."""
    save(tmp_path, "1")
    kill_at_call(tmp_path, "2", "replace", 1)
    with staged(tmp_path / EXTRA) as staging:
        write_adapter(staging, {ADAPTER_CONFIG_NAME: "3"})
    assert read_adapter(AdapterFolder.at(tmp_path / EXTRA)) == "3"
    assert read_adapter(AdapterFolder.at(tmp_path)) == "2"
    assert pending(tmp_path) is None


def test_save_over_an_unfinished_save_of_a_subfolder(tmp_path: Path) -> None:
    """Saving a folder finishes the saves of its sub-folders first, so that it lasts."""
    save(tmp_path, "1")
    kill_at_call(tmp_path / EXTRA, "2", "replace", 1)
    assert read_adapter(AdapterFolder.at(tmp_path).subfolder(EXTRA)) == "2"
    save(tmp_path, "3")
    assert read(tmp_path) == "3"
    assert pending(tmp_path / EXTRA) is None


@pytest.mark.usefixtures("_no_lock")
def test_slow_saver_does_not_undo_a_later_save(tmp_path: Path) -> None:
    """A saver that stops in the middle of its moves, and goes on later, moves nothing twice."""
    save(tmp_path, "1")
    stopped, go_on = threading.Event(), threading.Event()
    replace = os.replace
    slow = threading.Thread(target=save, args=(tmp_path, "2"))
    moves = 0

    def observed(source: Path, target: Path) -> None:
        nonlocal moves
        if threading.current_thread() is slow:
            moves += 1
            if moves == 3:
                stopped.set()
                assert go_on.wait(timeout=30)
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", observed)
        slow.start()
        assert stopped.wait(timeout=30)
        assert read(tmp_path) == "2"
        save(tmp_path, "3")
        assert read(tmp_path) == "3"
        go_on.set()
        slow.join()
    assert read(tmp_path) == "3"
    assert listing(tmp_path) == saved_files("3")


def read_during_saves(directory: Path) -> str | None:
    """Read as a load does: again, when a save came in between."""
    for _ in range(1000):
        with contextlib.suppress(MixedError, AssertionError):
            return read(directory)
    raise MixedError


def save_in_threads(directory: Path, *all_tags: range) -> str:
    """Save from several threads at a time, read meanwhile, and give the generation that is left."""

    def save_often(tags: range) -> None:
        for tag in tags:
            save(directory, str(tag))

    savers = [threading.Thread(target=save_often, args=(tags,)) for tags in all_tags]
    for saver in savers:
        saver.start()
    seen = set()
    while any(saver.is_alive() for saver in savers):
        seen.add(read_during_saves(directory))
    for saver in savers:
        saver.join()
    last = read(directory)
    assert last in {str(tags[-1]) for tags in all_tags}
    assert len(seen) > 2
    return str(last)


def test_two_threads_save(tmp_path: Path) -> None:
    """Savers of one process leave exactly the last generation of one, and all reads are whole."""
    save(tmp_path, "1")
    last = save_in_threads(tmp_path, range(100, 120), range(201, 221))
    assert listing(tmp_path) == saved_files(last)


@pytest.mark.usefixtures("_no_lock")
def test_threads_save_without_lock(tmp_path: Path) -> None:
    """Where no lock can be had the same holds, as long as all generations have the same files."""
    save(tmp_path, "2")
    last = save_in_threads(tmp_path, range(100, 140, 2), range(200, 240, 2), range(300, 340, 2))
    assert listing(tmp_path) == saved_files(last)


OFTEN_SAVER = """
import sys
from pathlib import Path
from peftstate._storage import staged, write_file

names = ("adapter_config.json", "adapter_model.safetensors", "extra/a", "extra/b", "peftstate.json")
for number in range(6):
    with staged(Path(sys.argv[1])) as staging:
        for name in names:
            write_file(staging / name, f"{sys.argv[2]}-{number}".encode())
"""


def test_two_processes_save(tmp_path: Path) -> None:
    """Savers of two processes leave the whole last generation of one of them."""
    command = [sys.executable, "-c", OFTEN_SAVER, str(tmp_path)]
    savers = [subprocess.Popen([*command, name]) for name in ("first", "second")]
    assert [saver.wait() for saver in savers] == [0, 0]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    contents = {path.read_text() for path in files}
    assert len(contents) == 1
    assert contents <= {"first-5", "second-5"}


def test_pending_in_a_sticky_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder such as /tmp, a complete folder that another user made is no save."""
    complete = tmp_path / COMPLETE_NAME
    complete.mkdir()
    lstat = Path.lstat

    def of_another_user(path: Path) -> os.stat_result:
        fields = list(lstat(path))
        fields[stat.ST_UID] = os.geteuid() + 1
        return os.stat_result(fields)

    tmp_path.chmod(0o1777)
    assert pending(tmp_path) == complete
    monkeypatch.setattr(Path, "lstat", of_another_user)
    assert pending(tmp_path) is None
    (complete / "file").touch()
    with pytest.raises(OSError, match=r"not empty|exists"):
        save(tmp_path, "1")
    tmp_path.chmod(0o777)
    assert pending(tmp_path) == complete


def test_complete_name_is_taken_by_a_link(tmp_path: Path) -> None:
    """A link in the complete folder's place is neither read nor followed by a save."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ADAPTER_CONFIG_NAME).write_text("planted")
    directory = tmp_path / "adapter"
    save(directory, "1")
    (directory / COMPLETE_NAME).symlink_to(elsewhere)
    assert read(directory) == "1"
    with pytest.raises(NotADirectoryError):
        save(directory, "2")
    assert listing(elsewhere) == {ADAPTER_CONFIG_NAME}
