"""Whether PEFT is being called by us, so that what `install` put over its methods steps aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IN_PEFT = ContextVar("peftstate_in_peft", default=False)


@contextmanager
def calling_peft() -> Iterator[None]:
    """Have PEFT's methods be PEFT's own in this thread, for a call of ours."""
    token = _IN_PEFT.set(True)
    try:
        yield
    finally:
        _IN_PEFT.reset(token)


def is_calling_peft() -> bool:
    """Whether this thread is within a call of ours of one of PEFT's methods."""
    return _IN_PEFT.get()
