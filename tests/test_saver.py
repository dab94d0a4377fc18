"""Who still writes to a staging folder, and who is dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftstate._saver import STAGING_PREFIX, is_abandoned, staging_name

NAME = "import os; from peftstate._saver import staging_name; print(staging_name().__enter__())"


def name_of(pid: int, name: str) -> str:
    """A staging folder's name with another process in it."""
    return name.replace(f"-{os.getpid()}-", f"-{pid}-")


def make(folder: Path, name: str) -> Path:
    """A staging folder."""
    staging = folder / name
    staging.mkdir()
    return staging


def test_own_staging_folder(tmp_path: Path) -> None:
    """A staging folder of this process is in use until its save ends, and abandoned after it."""
    with staging_name() as name:
        staging = make(tmp_path, name)
        assert not is_abandoned(staging, now=time.time())
        assert not is_abandoned(staging, now=time.time() + 1e9)
    assert is_abandoned(staging, now=time.time())


def test_names_differ() -> None:
    """No two saves share a staging folder."""
    with staging_name() as first, staging_name() as second:
        assert first != second
        assert first.startswith(STAGING_PREFIX)


def test_ended_process(tmp_path: Path) -> None:
    """A staging folder is abandoned as soon as its process has ended."""
    command = [sys.executable, "-c", NAME]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert is_abandoned(make(tmp_path, name), now=time.time())


def test_process_that_nobody_has_waited_for(tmp_path: Path) -> None:
    """A process that has ended is dead, though its parent keeps its number in the table."""
    command = [sys.executable, "-c", NAME]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        staging = make(tmp_path, process.stdout.readline().strip())
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_abandoned(staging, now=time.time())


def test_living_process(tmp_path: Path) -> None:
    """A staging folder is in use while its process lives, however long it writes nothing."""
    command = [sys.executable, "-c", f"{NAME}; import sys; sys.stdout.flush(); input()"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        staging = make(tmp_path, process.stdout.readline().strip())
        assert not is_abandoned(staging, now=time.time() + 1e9)
        process.communicate("\n")
    assert is_abandoned(staging, now=time.time())


def test_process_number_taken_by_another(tmp_path: Path) -> None:
    """A living process that only has the number of the saver does not keep its folder."""
    with staging_name() as name:
        pass
    machine, _, rest = name.removeprefix(STAGING_PREFIX).partition("-")
    pid, start_time, token = rest.split("-")
    earlier = f"{STAGING_PREFIX}{machine}-{os.getppid()}-{int(start_time) + 1}-{token}"
    assert pid == str(os.getpid())
    assert is_abandoned(make(tmp_path, earlier), now=time.time())


def test_process_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may not be looked at counts as alive."""

    def refuse(pid: int, signal: int) -> None:
        assert signal == 0
        raise PermissionError(pid)

    with staging_name() as name:
        pass
    monkeypatch.setattr(os, "kill", refuse)
    staging = make(tmp_path, name_of(os.getppid(), name))
    assert not is_abandoned(staging, now=time.time() + 1e9)


@pytest.mark.parametrize("name", ["of-an-older-version", "0123456789ab-1-1-0123"])
def test_process_of_another_machine(tmp_path: Path, name: str) -> None:
    """Where the process cannot be judged, a day without a write counts, in sub-folders too."""
    staging = make(tmp_path, f"{STAGING_PREFIX}{name}")
    (staging / "extra").mkdir()
    (staging / "extra" / "file").touch()
    now = (staging / "extra" / "file").stat().st_mtime
    os.utime(staging, (0, 0))
    day = 24 * 60 * 60
    assert not is_abandoned(staging, now=now + day - 1)
    assert is_abandoned(staging, now=now + day + 1)


def test_staging_folder_that_vanishes(tmp_path: Path) -> None:
    """A folder that another saver removes at this moment is left to it."""
    assert not is_abandoned(tmp_path / f"{STAGING_PREFIX}gone", now=time.time() + 1e9)
