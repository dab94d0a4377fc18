"""How a reload went, and how it should have gone."""

from __future__ import annotations

import enum
import re

import attrs

from benchmarks.fidelity._compare import Difference
from peftstate.errors import (
    PeftStateError,
    PeftStateWarning,
    StateMismatchWarning,
    TrainModeWarning,
)

NOWHERE = r"(?!)"
"""A regular expression that is found nowhere."""


class Kind(enum.Enum):
    """How a reload went; the value is what a table says."""

    EXACT = "exact"
    TOLD = "differs, and a warning names it"
    REFUSED = "typed error"
    CRASHED = "crash"
    SILENT = "differs silently"


@attrs.frozen(kw_only=True)
class Message:
    """A warning, or what a library logged as one.

    Attributes:
        text: The text.
        category: The class of the warning; `None` of a log.
    """

    text: str
    category: type[Warning] | None = None


@attrs.frozen(kw_only=True)
class Outcome:
    """What came of saving and reloading with one library.

    Attributes:
        kind: How it went.
        difference: What differs, if anything was loaded.
        error: What was raised.
        at: Where it was raised: ``"save"`` or ``"load"``.
        messages: The warnings of the save and the load.
        named: Those of them that name the difference.
    """

    kind: Kind
    difference: Difference | None = None
    error: Exception | None = None
    at: str = ""
    messages: tuple[Message, ...] = ()
    named: tuple[Message, ...] = ()

    def judged(self, named: tuple[Message, ...]) -> Outcome:
        """The outcome, given the messages that name the difference."""
        kind = Kind.TOLD if named and self.kind is Kind.SILENT else self.kind
        return attrs.evolve(self, kind=kind, named=named)

    def __str__(self) -> str:
        if self.error is not None:
            how = "crash: " if self.kind is Kind.CRASHED else ""
            return f"{how}`{type(self.error).__name__}` at {self.at}"
        if self.kind is Kind.TOLD:
            category = self.named[0].category
            name = "a log" if category is None else f"`{category.__name__}`"
            return f"{name}: {self.difference}"
        if self.kind is Kind.SILENT:
            return f"**{self.kind.value}**: {self.difference}"
        return str(self.kind.value)


@attrs.frozen(kw_only=True)
class Expected:
    """What should come of it with peftstate.

    Attributes:
        kind: How it should go.
        category: The class of the error.
        match: What the error or the warning must say, a regular expression.
        beside: What other warnings may say, a regular expression.
    """

    kind: Kind
    category: type[PeftStateError] | None = None
    match: str = NOWHERE
    beside: str = NOWHERE

    def problem(self, outcome: Outcome) -> str | None:
        """Say in what an outcome is another one; `None` if it is the expected one."""
        if outcome.kind is not self.kind:
            return f"expected: {self.kind.value}, but: {outcome} ({outcome.error!r})"
        if self.category is not None:
            if type(outcome.error) is not self.category:
                return f"expected a {self.category.__name__}, but: {outcome.error!r}"
            if not re.search(self.match, str(outcome.error)):
                return f"expected {self.match!r} in: {outcome.error}"
            return None
        unexpected = [text for text in outcome.messages if self._is_unexpected(text)]
        return f"unexpected warnings: {unexpected}" if unexpected else None

    def _is_unexpected(self, message: Message) -> bool:
        """Whether a warning of peftstate's should not be there."""
        if message.category is None or not issubclass(message.category, PeftStateWarning):
            return False
        if message.category is TrainModeWarning:  # most models are saved in train mode here
            return False
        is_known = re.search(self.match, message.text) or re.search(self.beside, message.text)
        return not (message.category is StateMismatchWarning and is_known)


EXACT = Expected(kind=Kind.EXACT)
"""The reload is the saved model, and there is no warning."""


def exact_but(beside: str) -> Expected:
    """The reload is the saved model, and a warning tells of something beside it."""
    return Expected(kind=Kind.EXACT, beside=beside)


def refused(error: type[PeftStateError], match: str) -> Expected:
    """An error of just this class is raised, at save or on load."""
    return Expected(kind=Kind.REFUSED, category=error, match=match)


def told(match: str, *, beside: str = NOWHERE) -> Expected:
    """The reload differs, and a warning names in what."""
    return Expected(kind=Kind.TOLD, match=match, beside=beside)
