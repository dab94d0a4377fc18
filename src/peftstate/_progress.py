"""Progress bars for what takes long, by the settings that transformers and the Hub's library have.

A bar appears after a second, if standard error is a terminal. There is one at a time, that of the
main thread: what a program does beside that is not what its user waits for.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE = 1.0
"""Seconds before a bar appears."""


def are_disabled() -> bool:
    """Whether bars were switched off.

    ``HF_HUB_DISABLE_PROGRESS_BARS`` does so, and `disable_progress_bar` of transformers, which
    calls that of huggingface_hub.
    """
    from huggingface_hub.utils import are_progress_bars_disabled

    return are_progress_bars_disabled()


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Show how far the body is, if it takes long.

    Args:
        title: What is being done.
        total: When it is done.
        unit: What is counted; ``"B"`` for bytes.

    Yields:
        What is told how far it is.
    """
    if not _is_seen():
        yield _not_shown
        return
    from huggingface_hub.utils import tqdm

    with tqdm(
        desc=title,
        total=total,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        delay=_PATIENCE,
        leave=False,
    ) as bar:
        yield lambda reached: bar.update(reached - bar.n)


def _is_seen() -> bool:
    """Whether anybody would see a bar."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    return threading.current_thread() is threading.main_thread() and not are_disabled()


def _not_shown(_: int) -> None:
    """Stands in for a bar that is not shown."""
