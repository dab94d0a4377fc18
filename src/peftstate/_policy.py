"""What to do about a difference: `on_mismatch`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import attrs

from peftstate._diff import Mismatch, steps
from peftstate._report import Report
from peftstate._warn import warn
from peftstate.errors import StateMismatchWarning
from peftstate.sections import SECTIONS

Action: TypeAlias = Literal["error", "warn", "ignore"]
OnMismatch: TypeAlias = Action | Mapping[str, Action]

_BY_DEFAULT: dict[str, Action] = {
    "environment": "warn",
    "implementation.hooks": "warn",  # NEFTune's and the like act in train mode only
    "implementation.kernels": "warn",  # nothing can put them back; the predictions tell
    "rng.accelerators": "warn",  # this machine may have other devices
    "rng.process": "ignore",  # `rng` itself warns, and says what it restored
    "runtime": "warn",
}
"""What is not an error, by section or by section and first field."""


@attrs.frozen
class Policy:
    """The action for each section.

    Attributes:
        chosen: What the caller chose, by section.
    """

    chosen: Mapping[str, Action]

    @classmethod
    def of(cls, on_mismatch: OnMismatch | None) -> Policy:
        """Take what a caller passed.

        Raises:
            ValueError: There is no such action or section.
        """
        names = [section.name for section in SECTIONS]
        if on_mismatch is None:
            return cls({})
        if isinstance(on_mismatch, str):
            on_mismatch = dict.fromkeys(names, on_mismatch)
        for name, action in on_mismatch.items():
            if name not in names:
                raise ValueError(f"on_mismatch: there is no section {name!r}; there are {names}")
            if action not in get_args(Action):
                raise ValueError(f"on_mismatch: {action!r} is none of {get_args(Action)}")
        return cls(on_mismatch)

    def handles(self, section: str) -> bool:
        """Whether a section is restored and compared at all."""
        return self.chosen.get(section) != "ignore"

    def is_strict(self, section: str) -> bool:
        """Whether any difference in a section is an error."""
        return self.chosen.get(section, _BY_DEFAULT.get(section, "error")) == "error"

    def action(self, mismatch: Mismatch) -> Action:
        """What to do about one difference."""
        field = next(iter(steps(mismatch.field)), "")
        by_default = _BY_DEFAULT.get(
            f"{mismatch.section}.{field}", _BY_DEFAULT.get(mismatch.section, "error")
        )
        return self.chosen.get(mismatch.section, by_default)

    def apply(self, report: Report) -> None:
        """Raise, warn of, or pass over the differences of a report.

        Raises:
            StateMismatchError: A difference is an error. It holds the others that are.
        """
        by_action: dict[Action, list[Mismatch]] = {"error": [], "warn": [], "ignore": []}
        for mismatch in report.mismatches:
            by_action[self.action(mismatch)].append(mismatch)
        if by_action["error"]:
            Report(tuple(by_action["error"]), report.sections).raise_for_mismatch()
        if by_action["warn"]:
            text = "\n".join(f"  {mismatch}" for mismatch in by_action["warn"])
            message = f"The loaded model differs from the saved state:\n{text}"
            warn(message, StateMismatchWarning)
