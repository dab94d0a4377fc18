"""What a section is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Generic, TypeVar

import attrs

from peftstate._codec import alike, decode, encode
from peftstate._diff import Json, Mismatch, diff

if TYPE_CHECKING:
    from peftstate.errors import StateMismatchError
    from peftstate.sections._view import ModelView

R = TypeVar("R", bound=attrs.AttrsInstance)


def _capture_again(capture: Callable[[ModelView], R]) -> Callable[[ModelView, R], R]:
    """How a section is captured to be compared with a record, unless it says otherwise."""
    return lambda view, _: capture(view)


@attrs.frozen(kw_only=True)
class Section(Generic[R]):
    """One kind of state: how it is captured, and how it is put back.

    There is no hand-written check: a record is compared with a fresh capture, field by field, also
    after `restore`, so that a setter that silently did nothing shows.

    Attributes:
        name: The JSON key; also the name of the source file, the test file and the errors' field.
        record: The frozen attrs class of its values. It knows no torch, so that manifests can be
            read without it.
        capture: Reads the state off a model. Draws no random number, changes nothing, and never
            calls ``model.state_dict()``, which repacks 4-bit weights.
        capture_like: Captures what is to be compared with a record that was saved, where it
            matters how that one was captured (over which dtypes, in which form).
        capture_restored: Captures what is to be compared after a restore, where not all need be
            read again.
        read_ahead: Has other threads read what `capture_like` and `capture_restored` will ask for,
            while other sections are compared; at its end nothing is read any more.
        prepare: Puts the state back on the bare base model, before the adapter is injected.
        restore: Puts the state back on the wrapped model.
        finish: What must come after every `restore`, for it depends on what these did.
        restored: Names of the fields that `prepare` or `restore` set; a difference there is no
            reason to refuse a base model before it is touched.
        checked_on_base: Whether the section is compared on the bare base model, before it is
            touched.
        per_adapter: Whether the record depends on which adapters are looked at, so that the
            folder of an extra adapter has another one. Such a record has a method `for_adapters`.
        is_captured: Whether there is anything to capture; a section that has this is in a manifest
            only where it says so.
        unknown: The record that says nothing, in the manifest of an adapter that was made without
            peftstate, where nobody knows any more; `None` if a load of that adapter tells. Such a
            record is neither restored nor compared.
        error: What a difference raises.
    """

    name: str
    record: type[R]
    capture: Callable[[ModelView], R]
    capture_like: Callable[[ModelView, R], R] = attrs.field(
        default=attrs.Factory(lambda self: _capture_again(self.capture), takes_self=True)
    )
    capture_restored: Callable[[ModelView, R], R] = attrs.field(
        default=attrs.Factory(lambda self: self.capture_like, takes_self=True)
    )
    read_ahead: Callable[[ModelView, R], AbstractContextManager[None]] | None = None
    prepare: Callable[[R, ModelView], None] | None = None
    restore: Callable[[R, ModelView], None] | None = None
    finish: Callable[[R, ModelView], None] | None = None
    restored: frozenset[str] = frozenset()
    checked_on_base: bool = False
    per_adapter: bool = False
    is_captured: Callable[[ModelView], bool] | None = None
    unknown: R | None = attrs.field(default=None, hash=False)
    error: type[StateMismatchError]

    @property
    def is_optional(self) -> bool:
        """Whether a manifest may lack the section."""
        return self.is_captured is not None

    def applies_to(self, view: ModelView) -> bool:
        """Whether there is anything of this kind in what is looked at."""
        return self.is_captured is None or self.is_captured(view)

    def is_known(self, record: R) -> bool:
        """Whether a record says anything."""
        return self.unknown is None or record != self.unknown

    def encode(self, record: R) -> dict[str, Json]:
        """A record as JSON."""
        return encode(record)

    def decode(self, value: Json) -> R:
        """JSON as a record.

        Raises:
            DecodeError: The value is no such record.
        """
        return decode(value, self.record)

    def compare(self, saved: R, found: R) -> tuple[Mismatch, ...]:
        """The fields in which two records differ."""
        if alike(saved, found):
            return ()
        return diff(self.name, encode(saved), encode(found))
