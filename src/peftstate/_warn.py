"""Warnings that point at the caller's line, however deep in the libraries they arise."""

from __future__ import annotations

import sys
import warnings

_LIBRARIES = frozenset({"contextlib", "peft", "peftstate", "transformers"})
"""Top-level packages whose frames are passed over."""


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning for the line that called into the libraries.

    Args:
        message: The text.
        category: The class.
    """
    level = 1
    while _is_library(level + 1):
        level += 1
    warnings.warn(message, category, stacklevel=level + 1)


def _is_library(depth: int) -> bool:
    """Whether the frame so many levels up belongs to one of the libraries."""
    try:
        frame = sys._getframe(depth)
    except ValueError:
        return False
    return frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES
