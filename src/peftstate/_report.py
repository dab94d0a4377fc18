"""The outcome of a comparison."""

from __future__ import annotations

import attrs

from peftstate import errors
from peftstate._diff import Mismatch, steps

FILES = "files"
"""What stands for a section in the reports of `verify_files`."""

_ERRORS: dict[str, type[errors.StateMismatchError]] = {
    **{error.section: error for error in errors.StateMismatchError.__subclasses__()},
    "extra_tensors": errors.AdapterMismatchError,
}
"""What a difference raises, by section: what `Section.error` says, without importing sections."""


@attrs.frozen
class Report:
    """What was compared and what differs.

    Attributes:
        mismatches: Every difference, in the order of the sections.
        sections: Names of the sections that were compared.
        notes: What is worth knowing and no difference, in sentences.
    """

    mismatches: tuple[Mismatch, ...]
    sections: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.mismatches

    def of(self, *sections: str) -> Report:
        """The part of the report that concerns some sections, without notes."""
        return Report(
            tuple(mismatch for mismatch in self.mismatches if mismatch.section in sections),
            tuple(section for section in self.sections if section in sections),
        )

    def raise_for_mismatch(self) -> None:
        """Do nothing if all is as saved.

        Raises:
            StateMismatchError: The class is that of the first section that differs; the error
                holds the mismatches of all sections.
            IntegrityError: The report is one of `verify_files`; the error names the first file.
        """
        if self.mismatches:
            raise self.error()

    def error(self) -> errors.StateMismatchError | errors.IntegrityError:
        """The error that stands for this report, which must hold a mismatch."""
        first = self.mismatches[0]
        if first.section == FILES:
            file = steps(first.field)[0]
            return errors.IntegrityError(file, str(first.saved), str(first.found))
        return _ERRORS.get(first.section, errors.StateMismatchError)(self)

    def _repr_html_(self) -> str:
        """The report as a notebook shows it."""
        from peftstate._html import report_html

        return report_html(self)

    def __str__(self) -> str:
        differing = {mismatch.section for mismatch in self.mismatches}
        width = max(map(len, self.sections), default=0)
        lines = []
        for section in self.sections:
            lines.append(f"{section:<{width}}  {'differs' if section in differing else 'ok'}")
            lines += [f"  {mismatch}" for mismatch in self.of(section).mismatches]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)
