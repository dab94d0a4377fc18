"""Faults between a save and a load: what plain PEFT makes of each, and what peftstate does.

A tiny Llama with two LoRA adapters is saved once. For each fault a copy of the folder, or what the
adapter is loaded onto, is changed; then it is loaded with PEFT and with peftstate, and the logits
are compared with the saved model's, bit for bit.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import transformers

from benchmarks import _page
from benchmarks._faults.catalogue import FAULTS
from benchmarks._faults.fault import Fault
from benchmarks._faults.scene import Case, Outcome, Saved, ours, outcome, plain_peft
from benchmarks._generations import silently

_STUDIED = {"w": 17, "c": 16, "d": 2, "r": 7}
"""The last number of each kind in the first study of plain PEFT."""


@attrs.frozen(kw_only=True)
class Result:
    """What came of one fault.

    Attributes:
        fault: The fault.
        peft: What plain PEFT made of it; `None` if it concerns files that PEFT does not know.
        ours: What peftstate made of it.
        complaints: What peftstate should have done, and did not.
    """

    fault: Fault
    peft: Outcome | None
    ours: Outcome
    complaints: Sequence[str]


def measure(faults: Sequence[Fault], root: Path) -> Iterator[Result]:
    """Inject faults, one at a time.

    Args:
        faults: The faults.
        root: An empty folder.
    """
    saved = Saved.make(root)
    for fault in faults:
        case = Case.of(saved, root / fault.key / "adapter")
        fault.inject(case)
        peft = None if fault.is_ours else outcome(case, plain_peft)
        found = outcome(case, ours)
        complaints = fault.complaints(case, found)
        yield Result(fault=fault, peft=peft, ours=found, complaints=complaints)


def summary(results: Sequence[Result]) -> _page.Table:
    """What the outcomes add up to."""
    met = [result for result in results if result.peft is not None]
    studied = [result for result in met if _is_of_the_study(result.fault.key)]
    rows = []
    for which, some in (
        (f"the {len(studied)} that were studied first", studied),
        (f"all {len(met)} that plain PEFT can meet", met),
    ):
        plain = [result.peft for result in some if result.peft is not None]
        rows.append([which, "plain PEFT", *_counts(plain)])
        rows.append([which, "peftstate", *_counts([result.ours for result in some])])
    every = [result.ours for result in results]
    rows.append([f"all {len(every)}", "peftstate", *_counts(every)])
    foreign = sum(found.error is not None and not found.is_typed for found in every)
    return _page.Table(
        name="faults",
        command="python -m benchmarks.faults",
        columns=(
            "faults",
            "loaded by",
            "loads without a word",
            "**of these with another output**",
            "loads with a warning",
            "of these with another output",
            "errors",
            "classes of these",
        ),
        rows=rows,
        note=f"Of peftstate's errors, {foreign} are another library's or Python's own.",
    )


def _counts(found: Sequence[Outcome]) -> list[str]:
    """How many outcomes there are of each kind."""
    silent = [outcome for outcome in found if outcome.is_silent]
    warned = [outcome for outcome in found if outcome.warned]
    errors = [type(outcome.error) for outcome in found if outcome.error is not None]
    return [
        str(len(silent)),
        f"**{sum(outcome.is_wrong for outcome in silent)}**",
        str(len(warned)),
        str(sum(outcome.is_wrong for outcome in warned)),
        str(len(errors)),
        str(len(set(errors))),
    ]


def _is_of_the_study(key: str) -> bool:
    """Whether a fault is one of those that were found with plain PEFT, before peftstate was."""
    return int(key[1:]) <= _STUDIED.get(key[0], 0)


def details(results: Sequence[Result]) -> _page.Table:
    """What came of each fault."""
    rows = [
        (
            result.fault.key,
            result.fault.what,
            *(("", "") if result.peft is None else (_told(result.peft), _output(result.peft))),
            _told(result.ours) + ("; `verify_files` names it" if result.fault.is_mentioned else ""),
            _output(result.ours),
        )
        for result in results
    ]
    return _page.Table(
        name="faults-each",
        command="python -m benchmarks.faults",
        columns=("", "fault", "plain PEFT", "its output", "peftstate", "its output"),
        rows=rows,
    )


def _told(found: Outcome) -> str:
    """What the caller is told."""
    if found.error is not None:
        told = f"`{type(found.error).__name__}`"
    else:
        told = "loads, with a warning" if found.warned else "loads"
    return f"hangs, then {told}" if found.hung else told


def _output(found: Outcome) -> str:
    """What the loaded model predicts."""
    if found.delta is None:
        return ""
    if not found.is_wrong:
        return "same"
    if math.isnan(found.delta):
        return "**NaN**"
    return "**other shape**" if math.isinf(found.delta) else f"**off by {found.delta:.2g}**"


def first_of_each_kind() -> list[Fault]:
    """The first fault of each letter."""
    return list({fault.key[0]: fault for fault in reversed(FAULTS)}.values())[::-1]


def main() -> int:
    """Run the benchmark; the status tells whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first fault of each kind")
    parser.add_argument("--write", action="store_true", help="put the figures on their page")
    arguments = parser.parse_args()
    faults = first_of_each_kind() if arguments.quick else FAULTS
    transformers.utils.logging.disable_progress_bar()
    with silently(), tempfile.TemporaryDirectory(prefix="faults-") as directory:
        results = list(measure(faults, Path(directory)))
    tables = (details(results), summary(results))
    print(*(table.markdown() for table in tables), sep="\n\n")
    broken = [f"{r.fault.key}: {complaint}" for r in results for complaint in r.complaints]
    print(*broken, sep="\n", file=sys.stderr)
    if arguments.write:
        for table in tables:
            _page.write(table, "reliability.md")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
