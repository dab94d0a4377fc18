"""What a fault is, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from benchmarks._faults.scene import Case, Outcome
from peftstate import verify_files
from peftstate.errors import PeftStateError


@attrs.frozen(kw_only=True)
class Fault:
    """Something that goes wrong between a save and a load.

    Attributes:
        key: A letter for the kind, and a number.
        what: What it is, in a few words.
        inject: Changes the case.
        error: The error that peftstate must raise; `None` if it must load the saved model.
        names: What the text of the error must hold; of a load that must succeed, what its warning
            must hold or, if it gives none, what the report of `verify_files` must mention.
        is_ours: Whether it is a fault of files that plain PEFT does not know.
        is_warned: Whether the load must succeed with a warning.
    """

    key: str
    what: str
    inject: Callable[[Case], object]
    error: type[PeftStateError] | None = None
    names: str = ""
    is_ours: bool = False
    is_warned: bool = False

    @property
    def is_mentioned(self) -> bool:
        """Whether `verify_files` must say something of it that is no difference."""
        return self.error is None and not self.is_warned and bool(self.names)

    def complaints(self, case: Case, found: Outcome) -> list[str]:
        """What is not as it must be of a load with peftstate; nothing, if all is.

        Args:
            case: The case, as it was loaded.
            found: What came of the load.
        """
        if found.hung:
            return ["the load hung"]
        if self.error is not None:
            return self._of_error(found)
        if found.error is not None or found.is_wrong:
            return [f"the saved model must be loaded, found {found}"]
        if self.is_warned:
            text = "".join(found.warned)
            return [] if self.names in text and text else [f"no warning names {self.names}"]
        if found.warned or not found.same_draws:
            return [f"the saved state must be loaded without a warning, found {found}"]
        text = str(verify_files(case.folder))
        return [] if self.names in text else [f"verify_files does not mention {self.names}: {text}"]

    def _of_error(self, found: Outcome) -> list[str]:
        """What is not as it must be of a load that must fail."""
        wanted = self.error or PeftStateError
        if not isinstance(found.error, wanted):
            return [f"{wanted.__name__} must be raised, found {found}"]
        if not found.left_alone:
            return ["a load that fails must leave the random generators as they were"]
        text = str(found.error)
        return [] if self.names in text else [f"the error must name {self.names!r}: {text}"]
