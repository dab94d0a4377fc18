"""The tables of the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs

from benchmarks._page import Table
from benchmarks.fidelity._outcome import Kind, Outcome
from benchmarks.fidelity._situation import Situation
from benchmarks.fidelity.situations import CAUSES

COMMAND = "python -m benchmarks.fidelity"
_COLUMNS = ("plain PEFT", "peftstate")


@attrs.frozen(kw_only=True)
class Row:
    """A situation, and what came of it.

    Attributes:
        situation: The situation.
        peft: With plain PEFT.
        ours: With peftstate.
    """

    situation: Situation
    peft: Outcome
    ours: Outcome

    @property
    def problem(self) -> str | None:
        """In what the outcome with peftstate is not the expected one."""
        return self.situation.ours.problem(self.ours)


def tables(rows: Sequence[Row]) -> list[Table]:
    """The counts, the situations of the causes, and the others."""
    of_causes = [row for row in rows if row.situation.cause]
    others = [row for row in rows if not row.situation.cause]
    return [
        _counts(of_causes, others),
        Table(
            name="fidelity-causes",
            command=COMMAND,
            columns=["cause", "situation", *_COLUMNS],
            rows=_with_causes(of_causes),
        ),
        Table(
            name="fidelity-further",
            command=COMMAND,
            columns=["situation", *_COLUMNS],
            rows=[_cells(row) for row in others],
        ),
    ]


def _cells(row: Row) -> list[str]:
    """The cells of a row but the first."""
    return [row.situation.title, str(row.peft), str(row.ours)]


def _with_causes(rows: Sequence[Row]) -> list[list[str]]:
    """The rows, the cause before the first of its situations."""
    seen: set[str] = set()
    cells = []
    for row in rows:
        cause = row.situation.cause
        cells.append(["" if cause in seen else f"{cause} {CAUSES[cause]}", *_cells(row)])
        seen.add(cause)
    return cells


def _counts(of_causes: Sequence[Row], others: Sequence[Row]) -> Table:
    """How often each outcome came about."""
    counted = [
        Counter(outcome.kind for outcome in outcomes)
        for rows in (of_causes, others)
        for outcomes in ([row.peft for row in rows], [row.ours for row in rows])
    ]
    counts = [[kind.value, *(str(count[kind]) for count in counted)] for kind in Kind]
    totals = ["situations", *(str(count.total()) for count in counted)]
    columns = [f"{group}: {name}" for group in ("causes", "further") for name in _COLUMNS]
    return Table(
        name="fidelity",
        command=COMMAND,
        columns=["outcome", *columns],
        rows=[*counts, totals],
        note=_sum(of_causes, counted[0], counted[1]),
    )


def _sum(rows: Sequence[Row], peft: Counter[Kind], ours: Counter[Kind]) -> str:
    """What the situations of the causes add up to."""
    silent = [row.peft.difference for row in rows if row.peft.kind is Kind.SILENT]
    computed = sum(found is not None and found.is_computed for found in silent)
    causes = len({row.situation.cause for row in rows})
    return (
        f"In {len(rows)} situations of {causes} causes, plain PEFT gives back the saved model "
        f"{peft[Kind.EXACT]} times. It gives another one {peft[Kind.SILENT]} times without a word; "
        f"{computed} of these compute something else, the others differ in their state only. "
        f"peftstate gives back the saved model {ours[Kind.EXACT]} times, refuses "
        f"{ours[Kind.REFUSED]} times with an error that says what differs, warns of what differs "
        f"{ours[Kind.TOLD]} times, and gives another model without a word {ours[Kind.SILENT]} "
        "times."
    )
