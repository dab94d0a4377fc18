"""Telling whether the process that writes to a staging folder is still alive.

The folder's name says which process that is. On the same machine the process table knows; a saver
on another machine that shares the disk, or in another container, is given a day without a write.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from peftstate._disk import tree

STAGING_PREFIX = ".peftstate-staging-"

_NAME = re.compile(rf"{re.escape(STAGING_PREFIX)}([0-9a-f]+)-(\d+)-(\d*)-[0-9a-f]+")
_ABANDONED_AFTER = 24 * 60 * 60
"""Seconds without a write."""

_in_use: set[str] = set()
"""The staging folders of this process."""


@contextmanager
def staging_name() -> Iterator[str]:
    """A new name for a staging folder of this process, which counts as alive in the body."""
    pid = os.getpid()
    name = f"{STAGING_PREFIX}{_machine()}-{pid}-{_start_time(pid)}-{secrets.token_hex(4)}"
    _in_use.add(name)
    try:
        yield name
    finally:
        _in_use.discard(name)


def is_abandoned(staging: Path, *, now: float) -> bool:
    """Whether nobody will ever finish a staging folder.

    Args:
        staging: A folder whose name begins with `STAGING_PREFIX`.
        now: The time by the clock of the disk, which may be another machine's.
    """
    owner = _NAME.fullmatch(staging.name)
    # On Windows os.kill sends an event even where it is asked only to look.
    if owner is None or owner[1] != _machine() or sys.platform == "win32":
        return _is_untouched(staging, now)
    pid, start_time = int(owner[2]), owner[3]
    if pid == os.getpid() and start_time == _start_time(pid):
        return staging.name not in _in_use
    return _has_ended(pid, start_time)


def _is_untouched(staging: Path, now: float) -> bool:
    """Whether nothing was written to a staging folder for long."""
    try:
        written = [(staging / file).stat().st_mtime for file in (PurePath(), *tree(staging)[0])]
    except OSError:
        return False  # somebody is at work on it
    return now - max(written) > _ABANDONED_AFTER


def _has_ended(pid: int, start_time: str) -> bool:
    """Whether a process of this machine has ended, its number taken by another one or not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False  # it is another user's; where the system hides those, nothing more is known
    found = _start_time(pid)
    return bool(start_time and found) and found != start_time


def _start_time(pid: int) -> str:
    """When a process started, as Linux counts; empty where that is unknown."""
    try:
        # proc_pid_stat(5): the name in parentheses may hold anything, the state follows it
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "0" if stat[0] in "ZX" else stat[19]


@functools.cache
def _machine() -> str:
    """A name for this machine since its last start, and for its numbering of processes."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
