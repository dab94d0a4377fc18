"""How a situation is run: made and trained once, saved and reloaded with each of the libraries."""

from __future__ import annotations

import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.state
import numpy as np
import torch
import transformers

from benchmarks.fidelity._compare import Difference, difference
from benchmarks.fidelity._libraries import PEFT, PEFTSTATE, Library
from benchmarks.fidelity._models import SEED, Place
from benchmarks.fidelity._outcome import Kind, Message, Outcome
from benchmarks.fidelity._situation import Situation
from peftstate.errors import PeftStateError

OTHER_SEED = 12345
"""What a reload starts from: it is another process, some time later."""
_LOGGERS = ("accelerate", "bitsandbytes", "peft", "transformers", "trl")


def run(
    situation: Situation, place: Place, libraries: Sequence[Library] = (PEFT, PEFTSTATE)
) -> list[Outcome]:
    """Make the model of a situation, and save and reload it with each of some libraries.

    There is one model. What it computes is read after our save, which leaves it as it was, and
    before PEFT's, which does not.

    Args:
        situation: What to do.
        place: Where the base models are.
        libraries: The libraries.

    Returns:
        An outcome for each library.
    """
    outcomes: dict[Library, Outcome] = {}
    # below the working directory, PEFT writes what it offloads anew (`PeftModel._update_offload`)
    with isolated(), tempfile.TemporaryDirectory() as name, chdir(name):
        folders = {library: Path(name, library.name) for library in libraries}

        def save(library: Library) -> None:
            if library in libraries:
                outcomes[library] = _save(situation, library, model, folders[library])

        with situation.saving():
            with _heard([]):
                transformers.set_seed(SEED)
                model = situation.build(place)
                saved = dict(situation.state(model))
            save(PEFTSTATE)
            with _heard([]):
                saved |= situation.answers(model)
            save(PEFT)
        for library, folder in folders.items():
            if outcomes[library].error is None:
                situation.after_save(folder)
                load = partial(situation.load, library, partial(situation.base, place), folder)
                outcomes[library] = _reload(situation, load, saved, outcomes[library])
    return [outcomes[library] for library in libraries]


def _save(situation: Situation, library: Library, model: Any, folder: Path) -> Outcome:
    """Save with a library."""
    return _attempt("save", [], lambda: situation.save(library, model, folder))


def _reload(
    situation: Situation, load: Callable[[], Any], saved: dict[str, Any], save: Outcome
) -> Outcome:
    """Load what was saved, as in another process, and compare."""

    def steps() -> Difference | None:
        with isolated(), situation.loading():
            transformers.set_seed(OTHER_SEED)
            model = load()
            found = dict(situation.state(model))
            found |= situation.answers(model)
            return difference(saved, found)

    outcome = _attempt("load", list(save.messages), steps)
    named = tuple(message for message in outcome.messages if situation.is_named_by(message))
    return outcome.judged(named)


def _attempt(at: str, messages: list[Message], steps: Callable[[], Difference | None]) -> Outcome:
    """Take steps that give what differs, if anything is loaded by them."""
    try:
        with _heard(messages):
            found = steps()
    except PeftStateError as error:
        return Outcome(kind=Kind.REFUSED, error=error, at=at, messages=tuple(messages))
    except Exception as error:  # noqa: BLE001 - what is raised is what is measured
        return Outcome(kind=Kind.CRASHED, error=error, at=at, messages=tuple(messages))
    kind = Kind.SILENT if found else Kind.EXACT
    return Outcome(kind=kind, difference=found, messages=tuple(messages))


@contextmanager
def isolated() -> Iterator[None]:
    """Leave the process's random numbers and settings as they are."""
    setters: dict[Callable[[Any], Any], Any] = {
        random.setstate: random.getstate(),
        np.random.set_state: np.random.get_state(),
        torch.set_rng_state: torch.get_rng_state(),
        torch.set_default_dtype: torch.get_default_dtype(),
        torch.set_float32_matmul_precision: torch.get_float32_matmul_precision(),
        torch.use_deterministic_algorithms: torch.are_deterministic_algorithms_enabled(),
        torch.set_num_threads: torch.get_num_threads(),
    }
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        for setter, value in setters.items():
            setter(value)


@contextmanager
def _heard(messages: list[Message]) -> Iterator[None]:
    """Collect every warning and every log of the libraries, and have none shown."""
    handler = _Collector(messages)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    _forget_what_was_logged_once()
    transformers.utils.logging.disable_progress_bar()
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        messages += [
            Message(text=str(warning.message), category=warning.category) for warning in caught
        ]
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        transformers.utils.logging.enable_progress_bar()


def _forget_what_was_logged_once() -> None:
    """Have transformers log again what it logs only once a process."""
    transformers.utils.logging.warning_once.cache_clear()


class _Collector(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self, messages: list[Message]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self._messages.append(Message(text=record.getMessage()))
