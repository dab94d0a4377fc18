"""PEFT's own tests, with PEFT's classes and with ours: whatever passes must still pass.

    python -m tests.peft_suite.run                 the selection that CI runs
    python -m tests.peft_suite.run --full          all that can run without the Hub
    python -m tests.peft_suite.run test_mixed.py -k save

The tests are those of the installed version, from its source distribution on PyPI. Each runs with
PEFT's classes, and if it passes with ours as well. A test that fails then is run once more with
both, alone, so that one which fails now and then is not taken for a difference. The exit status is
1 if there is a difference that `differences.py` does not know, or one less than it knows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import attrs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.peft_suite.differences import (
    ANOTHER_BASE,
    DIFFERENCES,
    QUICK,
    UNUSABLE,
    Difference,
)

TESTS = Path(__file__).resolve().parent.parent
OURS = {
    "peftstate": "with peftstate's classes in place of PEFT's",
    "installed": "with PEFT's classes after peftstate.install()",
}
console = Console(highlight=False, soft_wrap=True, width=120)


@attrs.frozen
class Outcome:
    """What came of a test."""

    outcome: str
    reason: str

    @property
    def passed(self) -> bool:
        """Whether it passed."""
        return self.outcome == "passed"


@attrs.frozen
class Suite:
    """PEFT's tests, unpacked.

    Attributes:
        root: The folder of PEFT's source distribution.
        cache: The cache of the Hub that holds the models they load.
        processes: How many processes run them.
    """

    root: Path
    cache: Path
    processes: int

    def run(
        self,
        classes: str,
        tests: Mapping[str, str],
        *,
        only: Collection[str] | None = None,
        any_base: bool = False,
    ) -> dict[str, Outcome]:
        """Run tests.

        Args:
            classes: Whose classes they are given, as the plugin's option of that name.
            tests: The names of the test files, and what the ids of their tests have to match.
            only: The ids of the tests to run; by default all.
            any_base: Whether an adapter loads onto another base model than it was saved with.

        Returns:
            What came of each, by its id.
        """
        with tempfile.TemporaryDirectory(prefix="peft-suite-") as directory:
            outcomes = Path(directory, "outcomes.json")
            command = ["-p", "peft_suite.plugin", "--classes", classes]
            command += ["--outcomes", str(outcomes)]
            # PEFT's own settings want its coverage measured.
            settings = Path(directory, "pytest.ini")
            settings.write_text("[pytest]\n")
            command += ["-c", str(settings), "--rootdir", str(self.root)]
            command += ["-p", "no:cacheprovider", "-qq", "--no-header"]
            command += ["-W", "ignore", "--tb=short", "--show-capture=no", "-r", "N"]
            command += ["--continue-on-collection-errors", "-n", str(self.processes)]
            if any_base:
                command.append("--any-base")
            for option, value in (("tests", dict(tests)), ("only", only and sorted(only))):
                if value is not None:
                    listed = Path(directory, f"{option}.json")
                    listed.write_text(json.dumps(value))
                    command += [f"--{option}", str(listed)]
            command += [f"tests/{name}" for name in tests]
            # What needs the Hub fails.
            done = self.python("-m", "pytest", *command, folder=self.root, check=False)
            if not outcomes.exists():
                raise SystemExit(f"pytest did not run:\n{done.stdout}")
            read = json.loads(outcomes.read_text())
        return {name: Outcome(**fields) for name, fields in read.items()}

    def python(
        self, *arguments: str, folder: Path, check: bool
    ) -> subprocess.CompletedProcess[str]:
        """Run Python in a folder, offline."""
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
        environment = {
            "PYTHONPATH": path,
            "HF_HUB_CACHE": str(self.cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=check,
        )


def unpacked(folder: Path) -> Path:
    """The source distribution of the installed PEFT, downloaded if it is not there yet."""
    version = importlib.metadata.version("peft")
    root = folder / f"peft-{version}"
    if not (root / "tests" / "__init__.py").exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
        with tempfile.TemporaryDirectory(prefix="peft-suite-") as directory:
            arguments = ["--no-binary", "peft", "-d", directory, f"peft=={version}"]
            subprocess.run([*pip, *arguments], check=True)
            with tarfile.open(next(Path(directory).glob("peft-*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
        (root / "tests" / "__init__.py").touch()  # it is in PEFT's repository, but not in the sdist
    return root


@attrs.frozen
class Result:
    """What came of tests with PEFT's classes and with ours.

    Attributes:
        classes: Which classes of ours.
        theirs: The outcomes with PEFT's.
        ours: The outcomes with ours, of the tests that pass with PEFT's.
        refused: The ids of those that load onto another base model, and pass if that is no error.
    """

    classes: str
    theirs: dict[str, Outcome] = attrs.field(factory=dict)
    ours: dict[str, Outcome] = attrs.field(factory=dict)
    refused: set[str] = attrs.field(factory=set)

    def passed(self) -> list[str]:
        """The tests that pass with PEFT's classes."""
        return [name for name, outcome in self.theirs.items() if outcome.passed]

    def failed(self) -> list[str]:
        """Those among them that do not pass with ours, and should."""
        return [
            name for name in self.passed() if name not in self.refused and not self._passes(name)
        ]

    def expected(self) -> dict[str, Difference]:
        """The tests that fail with ours as they are expected to, and why."""
        return {
            name: difference
            for name in self.failed()
            for difference in DIFFERENCES
            if difference.names(name, self.classes) and difference.explains(self.reason(name))
        }

    def stale(self) -> list[str]:
        """The tests that are expected to fail, and pass."""
        return [
            name
            for name in self.passed()
            if self._passes(name) and any(its.names(name, self.classes) for its in DIFFERENCES)
        ]

    def reason(self, name: str) -> str:
        """Why a test failed with ours."""
        return self.ours[name].reason if name in self.ours else "it did not run"

    def _passes(self, name: str) -> bool:
        """Whether a test passes with ours."""
        return name in self.ours and self.ours[name].passed

    def run(self, suite: Suite, tests: Mapping[str, str]) -> None:
        """Run tests with PEFT's classes, and what passes with ours."""
        self.theirs.update(suite.run("peft", tests))
        if passed := self.passed():
            self.ours.update(suite.run(self.classes, tests, only=passed))
        if failed := self.failed():
            self._again(suite, dict.fromkeys(sorted(set(map(_file, failed))), ""), failed)

    def _again(self, suite: Suite, tests: Mapping[str, str], failed: Collection[str]) -> None:
        """Run what failed once more, to know which fail by chance and which for the base model."""
        for name, outcome in suite.run("peft", tests, only=failed).items():
            if not outcome.passed:
                self.theirs[name] = outcome
        for name, outcome in suite.run(self.classes, tests, only=failed, any_base=True).items():
            if outcome.passed and ANOTHER_BASE in self.reason(name):
                self.refused.add(name)
            else:
                self.ours[name] = outcome


def report(result: Result) -> list[str]:
    """Print what came out.

    Returns:
        What is wrong, a line each.
    """
    expected = result.expected()
    wrong = sorted(set(result.failed()) - expected.keys())
    table = Table("file", "tests", "pass with PEFT", "with peftstate", "another base", "expected")
    columns = [
        Counter(map(_file, names))
        for names in (
            result.theirs,
            result.passed(),
            set(result.passed()) - set(result.failed()) - result.refused,
            result.refused,
            expected,
        )
    ]
    for file in sorted(columns[0]):
        table.add_row(file, *(str(column[file]) for column in columns))
    table.add_section()
    table.add_row("all", *(str(column.total()) for column in columns))
    console.print(table)
    for difference, number in Counter(expected.values()).items():
        console.print(f"{number} expected: {escape(difference.reason)}")
    for name in wrong:
        console.print(f"\n[bold red]{escape(name)}[/]\n{escape(result.reason(name))}")
    return [
        *(f"{name} passes with PEFT's classes only" for name in wrong),
        *(f"{name} passes, and differences.py expects that it fails" for name in result.stale()),
    ]


def _file(name: str) -> str:
    """The name of a test's file."""
    return name.partition("::")[0].removeprefix("tests/")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", help="test files of PEFT; by default a selection")
    parser.add_argument("-k", dest="pattern", default="", help="what is in the ids of FILES' tests")
    parser.add_argument("--full", action="store_true", help="all files that can run")
    parser.add_argument("--classes", choices=sorted(OURS), default="peftstate")
    parser.add_argument(
        "--folder", type=Path, default=Path(".demo", "peft-suite"), help="where to unpack"
    )
    parser.add_argument("-n", dest="processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    suite = Suite(unpacked(folder), folder / "hub", arguments.processes)
    suite.python("-m", "tests.peft_suite.hub", str(suite.cache), folder=TESTS.parent, check=True)
    present = sorted(path.name for path in suite.root.glob("tests/test_*.py"))
    if arguments.files:
        tests = dict.fromkeys(arguments.files, arguments.pattern)
    elif arguments.full:
        tests = {name: "" for name in present if name not in UNUSABLE}
    else:
        tests = {name: pattern for name, pattern in QUICK.items() if name in present}
    start = time.monotonic()
    result = Result(arguments.classes)
    result.run(suite, tests)
    wrong = report(result)
    version = importlib.metadata.version("peft")
    console.print(f"PEFT {version}, {OURS[arguments.classes]}, {time.monotonic() - start:.0f} s")
    if not result.passed():
        wrong.append("no test ran")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
