"""What is measured as a user meets it, as a process with the start of Python in it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import attrs

from benchmarks.performance._measure import Comparison, Sample, alternately, timed_process

PYTHON = "python -c pass"
IMPORT_PEFT = 'python -c "import peft"'
IMPORT = 'python -c "import peftstate"'
IMPORT_COMMANDS = 'python -c "import peftstate.cli.app"'
VERIFY = "peftstate verify"
_CODE = {
    PYTHON: "pass",
    IMPORT_PEFT: "import peft",
    IMPORT: "import peftstate",
    IMPORT_COMMANDS: "import peftstate.cli.app",
}


def _verify(*arguments: str) -> list[str]:
    """The command that verifies."""
    return [sys.executable, "-m", "peftstate", "verify", *arguments]


def starts(adapter: Path, repetitions: int) -> dict[str, tuple[Sample, ...]]:
    """Python alone, with an import, and the verification of an adapter, in turn.

    Args:
        adapter: The adapter's folder.
        repetitions: How many runs of each count.

    Returns:
        The runs by command.
    """
    commands = {name: [sys.executable, "-c", code] for name, code in _CODE.items()}
    commands[VERIFY] = _verify(str(adapter))
    runs = {name: partial(timed_process, command) for name, command in commands.items()}
    return alternately(runs, repetitions)


def against_peft(runs: Mapping[str, tuple[Sample, ...]], name: str) -> Comparison:
    """One of the commands, beside the import of PEFT."""
    return Comparison(runs[IMPORT_PEFT], runs[name])


@attrs.frozen(kw_only=True)
class Tree:
    """The verification of many adapters, beside reading their files.

    Attributes:
        adapters: How many adapters there are.
        files: How many files.
        size: Bytes of all files.
        times: The runs; the other ones are those of ``cat``.
    """

    adapters: int
    files: int
    size: int
    times: Comparison


def verify_tree(adapter: Path, folder: Path, adapters: int, repetitions: int) -> Tree:
    """``peftstate verify --recursive`` over copies of an adapter.

    Args:
        adapter: The adapter's folder.
        folder: Where the copies go; they are removed afterwards.
        adapters: How many there are to be.
        repetitions: How many runs of each count.
    """
    for number in range(adapters):
        shutil.copytree(adapter, folder / f"adapter-{number}")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    runs = {
        "cat": partial(timed_process, ["cat", *map(str, files)]),
        VERIFY: partial(timed_process, _verify("--recursive", str(folder))),
    }
    found = alternately(runs, repetitions)
    shutil.rmtree(folder)
    times = Comparison(found["cat"], found[VERIFY])
    return Tree(adapters=adapters, files=len(files), size=size, times=times)
