"""The kinds of generator that numpy's global one can be, and their states as 32-bit words.

It is a Mersenne twister, unless a program calls `numpy.random.set_bit_generator`. The table is
closed: a manifest names one of these kinds and cannot name another class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

TWISTER = "MT19937"
"""The kind that numpy begins with."""
WORD = 2**32


@attrs.frozen
class _Part:
    """One part of a state.

    Attributes:
        path: Where it is in the dictionary that numpy gives.
        words: How many words a number of it takes.
        numbers: How many numbers it is an array of; `None` if it is a plain integer.
    """

    path: tuple[str, ...]
    words: int
    numbers: int | None = None


_HALF = (_Part(("has_uint32",), 1), _Part(("uinteger",), 1))
"""Half a number that was drawn and not asked for yet."""
_PCG = (_Part(("state", "state"), 4), _Part(("state", "inc"), 4), *_HALF)
_PARTS: Mapping[str, tuple[_Part, ...]] = {
    TWISTER: (_Part(("state", "key"), 1, 624),),  # its position is a field of the record
    "PCG64": _PCG,
    "PCG64DXSM": _PCG,
    "Philox": (
        _Part(("state", "counter"), 2, 4),
        _Part(("state", "key"), 2, 2),
        _Part(("buffer",), 2, 4),
        _Part(("buffer_pos",), 1),
        *_HALF,
    ),
    "SFC64": (_Part(("state", "state"), 2, 4), *_HALF),
}
"""The parts of each kind's state, in the order of their words."""


def _parts(kind: str) -> tuple[_Part, ...]:
    """The parts of a kind.

    Raises:
        ValueError: It is none of numpy's own.
    """
    if kind not in _PARTS:
        raise ValueError(
            f"numpy's global generator is a {kind}, of which the state cannot be saved; set one of "
            f"{', '.join(_PARTS)} with numpy.random.set_bit_generator"
        )
    return _PARTS[kind]


def words_of(state: Mapping[str, Any]) -> list[int]:
    """The state that numpy gives of its generator, as words, the lowest of a number first.

    Raises:
        ValueError: It is of a kind that is not numpy's own.
    """
    words: list[int] = []
    for part in _parts(state["bit_generator"]):
        value: Any = state
        for key in part.path:
            value = value[key]
        for number in [value] if part.numbers is None else value.tolist():
            words += [int(number) >> 32 * place & (WORD - 1) for place in range(part.words)]
    return words


def state_of(kind: str, words: Sequence[int]) -> dict[str, Any]:
    """The state as numpy takes it; of a twister, without its position.

    Raises:
        ValueError: There is no such kind, or these are not the words of its state.
    """
    import numpy as np

    parts = _parts(kind)
    length = sum(part.words * (part.numbers or 1) for part in parts)
    if len(words) != length or not all(0 <= word < WORD for word in words):
        raise ValueError(f"the state of a {kind} is {length} words of 32 bits")
    state: dict[str, Any] = {"bit_generator": kind}
    rest = iter(words)
    for part in parts:
        numbers = [
            sum(next(rest) << 32 * place for place in range(part.words))
            for _ in range(part.numbers or 1)
        ]
        width = np.uint32 if part.words == 1 else np.uint64
        holder = state
        for key in part.path[:-1]:
            holder = holder.setdefault(key, {})
        value = numbers[0] if part.numbers is None else np.array(numbers, dtype=width)
        holder[part.path[-1]] = value
    return state


def set_kind(kind: str) -> None:
    """Have numpy's global generator be of a kind; one that is stays the same object.

    Raises:
        ValueError: There is no such kind.
    """
    import numpy as np

    _parts(kind)
    if type(np.random.mtrand.get_bit_generator()).__name__ != kind:
        classes = (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM)
        known: dict[str, Any] = {
            cls.__name__: cls for cls in (*classes, np.random.Philox, np.random.SFC64)
        }
        np.random.mtrand.set_bit_generator(known[kind]())
