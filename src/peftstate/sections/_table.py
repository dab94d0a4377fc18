"""A value for each of many names, written as the usual value and the exceptions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

import attrs

V = TypeVar("V")


@attrs.frozen(kw_only=True)
class Table(Generic[V]):
    """A value for each name.

    Attributes:
        default: The value that most names have; `None` if there are no names.
        exceptions: The names that have another value.
    """

    default: V | None
    exceptions: Mapping[str, V]

    @classmethod
    def of(cls, values: Mapping[str, V]) -> Table[V]:
        """Make the table of a plain mapping; equal mappings give equal tables."""
        default = _usual(values.values())
        return cls(
            default=default,
            exceptions={name: value for name, value in values.items() if value != default},
        )

    def __getitem__(self, name: str) -> V | None:
        return self.exceptions.get(name, self.default)


def _usual(values: Iterable[V]) -> V | None:
    """The most frequent value; of equally frequent ones the first by its text."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], repr(value)), default=None)
