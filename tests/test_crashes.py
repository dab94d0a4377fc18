"""Saves that are killed, or whose disk fails; `benchmarks.crashes` tries every system call."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import torch

from benchmarks import crashes
from benchmarks._generations import PEFT, PEFTSTATE, Generations, silently
from benchmarks._syscalls import SUPPORTED, How, fail_from, kill_at, traced
from benchmarks.crashes import NEW, OLD, OVER_AN_ADAPTER, SCENARIOS
from peftstate._storage import COMPLETE_NAME, MANIFEST_NAME, RESERVED_PREFIX

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="system calls are traced on Linux on x86-64")


@pytest.fixture(scope="module")
def generations():
    """Three states of a model."""
    with silently():
        return Generations.of((crashes.OLD, crashes.NEW, crashes.NEXT))


@pytest.fixture(autouse=True)
def _quiet():
    """PEFT and transformers warn of a base model without a folder."""
    with silently():
        yield


def rewrite(folder):
    """Work of two files and a rename."""
    (folder / "new").write_bytes(b"12345678")
    (folder / "new").replace(folder / "file")


def test_a_traced_process_is_killed_torn_and_failed_where_it_is_asked_to(tmp_path):
    """The harness kills before a call, in the middle of a write, and makes calls fail."""
    run = traced(lambda: rewrite(tmp_path), tmp_path)
    assert [(event.name, *event.paths) for event in run.events] == [
        ("openat", "new"),
        ("write", "new"),
        ("rename", "new", "file"),
    ]
    assert run.status == 0
    (tmp_path / "file").unlink()
    run = traced(lambda: rewrite(tmp_path), tmp_path, kill_at(1))
    assert run.was_killed
    assert (tmp_path / "new").read_bytes() == b""
    assert traced(lambda: rewrite(tmp_path), tmp_path, kill_at(1, How.TEAR)).was_killed
    assert (tmp_path / "new").read_bytes() == b"1234"
    numbers = []

    def fail():
        with pytest.raises(OSError, match="quota") as caught:
            rewrite(tmp_path)
        numbers.append(caught.value.errno)
        assert numbers == [errno.EDQUOT]

    assert traced(fail, tmp_path, fail_from(0, errno.EDQUOT, "rename")).status == 0
    assert not (tmp_path / "file").exists()


def test_calls_in_other_folders_do_not_count(tmp_path):
    """Only what happens to the folder that is watched is an event."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert traced(lambda: rewrite(tmp_path / "one"), tmp_path / "two").events == ()


def test_the_harness_sees_what_plain_peft_leaves(generations):
    """Plain PEFT, killed, leaves mixtures that load without a word, and files that do not load."""
    before, within = crashes.kills(generations, PEFT, OVER_AN_ADAPTER)
    assert before.mixed
    assert before.unreadable
    assert within.unreadable


@pytest.mark.parametrize(
    ("scenario", "step"),
    [pytest.param(each, 13 if each is OVER_AN_ADAPTER else 31, id=each.name) for each in SCENARIOS],
)
def test_a_save_that_is_killed_leaves_the_old_or_the_new_generation(generations, scenario, step):
    """Whatever is saved over what; in the sub-folder too; and the next save leaves no trace."""
    tallies = crashes.kills(generations, PEFTSTATE, scenario, step=step)
    assert [text for tally in tallies for text in tally.broken] == []
    assert set(tallies[0].verdicts) == {OLD, NEW}
    assert set(tallies[1].verdicts) == {OLD}  # all is written before the save is committed


@pytest.mark.parametrize(
    ("error", "names"),
    [
        pytest.param(errno.ENOSPC, ("write", "sendfile", "openat", "mkdir"), id="no space"),
        pytest.param(errno.EDQUOT, ("write", "sendfile"), id="quota"),
        pytest.param(errno.EROFS, (), id="read-only"),
        pytest.param(errno.EXDEV, ("rename",), id="another file system"),
    ],
)
def test_a_disk_that_fails_is_a_save_error_and_the_old_generation_loads(generations, error, names):
    """No space, a quota, a read-only disk, a folder on another one: nothing is left behind."""
    step = 7 if names == ("rename",) else 23
    tally = crashes.errors(generations, PEFTSTATE, OVER_AN_ADAPTER, error, *names, step=step)
    assert tally.broken == []
    assert tally.verdicts[OLD]


def test_files_that_may_not_grow(generations):
    """A limit of the process on the size of a file is a `SaveError` too."""
    tally = crashes.limits(generations, PEFTSTATE, OVER_AN_ADAPTER, steps=2)
    assert tally.broken == []
    assert tally.verdicts[OLD]


def test_saves_that_are_killed_over_and_over_do_not_pile_up(generations):
    """A folder does not grow by saves that are killed."""
    assert crashes.litter(generations, saves=4).broken == []


@pytest.fixture(scope="module")
def saved(generations, tmp_path_factory):
    """A folder that was saved twice, and the calls of the second save."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    with silently():
        PEFTSTATE.save(generations.models[OLD], folder)
        before = os.umask(0o027)
        try:
            return folder, crashes.run_of(generations, PEFTSTATE, NEW, folder)
        finally:
            os.umask(before)


def test_every_file_and_folder_is_on_disk_before_the_save_counts(saved):
    """After the last write to a file comes an fsync of it and of its folder, then the commit."""
    _, run = saved
    events = [(event.name, event.paths) for event in run.events]
    complete = f"adapter/{COMPLETE_NAME}"
    commit = next(i for i, (_, paths) in enumerate(events) if paths[-1] == complete)
    staging = events[commit][1][0]
    assert staging.startswith(f"adapter/{RESERVED_PREFIX}staging-")
    written = {
        paths[-1]: number
        for number, (name, paths) in enumerate(events[:commit])
        if name in ("write", "renameat", "rename", "chmod") and paths[-1].startswith(staging)
    }
    folders = {staging, f"{staging}/extra"}
    changed = {os.path.dirname(path): number for path, number in written.items()}  # noqa: PTH120
    synced = {
        paths[0]: number for number, (name, paths) in enumerate(events[:commit]) if name == "fsync"
    }
    files = {path for path in written if ".tmp" not in path}
    assert f"{staging}/{MANIFEST_NAME}" in files
    assert files | folders <= synced.keys()
    assert all(synced[path] > written[path] for path in files)
    assert all(synced[folder] > changed[folder] for folder in folders)
    moves = [number for number, (name, _) in enumerate(events) if name == "rename"]
    assert ("fsync", ("adapter",)) in events[commit : moves[moves.index(commit) + 1]]
    assert {"adapter", "adapter/extra"} <= {
        paths[0] for name, paths in events[moves[-1] :] if name == "fsync"
    }


def test_no_file_is_written_through_memory(saved):
    """Nothing escapes the harness: no file is mapped for writing."""
    _, run = saved
    assert {event.name for event in run.events} <= {
        "chmod",
        "fsync",
        "ftruncate",
        "mkdir",
        "openat",
        "rename",
        "renameat",
        "rmdir",
        "sendfile",
        "unlink",
        "write",
    }


def test_files_have_the_mode_that_the_umask_says(saved):
    """The weights too, which safetensors makes readable for their owner only."""
    folder, run = saved
    assert run.status == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 9
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_a_full_disk_leaves_the_model_as_it_was(generations, tmp_path, monkeypatch):
    """PEFT edits the configs while it saves, and would leave them so when it fails."""
    model = generations.models[NEW]
    before = {name: dict(vars(config)) for name, config in model.peft_config.items()}

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for config in model.peft_config.values():
        monkeypatch.setattr(config, "save_pretrained", fail, raising=False)
    expected = {name: {**fields, "save_pretrained": fail} for name, fields in before.items()}
    with pytest.raises(crashes.SaveError, match="No space left on device"):
        model.save_pretrained(tmp_path / "adapter")
    assert {name: dict(vars(config)) for name, config in model.peft_config.items()} == expected
    assert list(tmp_path.iterdir()) == []
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
