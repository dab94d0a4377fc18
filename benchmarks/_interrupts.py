"""Saves and loads that are interrupted at a line of their code: by Ctrl-C, or by another save."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import peft
import torch

import peftstate
from benchmarks._generations import PEFT, PEFTSTATE, Generations, Library, make

PACKAGES = tuple(str(Path(package.__file__ or "").parent) for package in (peft, peftstate))
TRACES = ".peftstate-*"


@attrs.frozen
class Outcome:
    """What came of some work that was done several times.

    Attributes:
        what: The work.
        library: Whose it is.
        times: How often it was done.
        failures: What was raised that should not have been.
        wrong: What did not come out as it should, in words.
    """

    what: str
    library: Library
    times: int
    failures: list[str] = attrs.field(factory=list)
    wrong: list[str] = attrs.field(factory=list)

    @property
    def broken(self) -> list[str]:
        """The promises that were broken, in words."""
        if self.library is PEFT:
            return []
        return [f"{self.what}: {text}" for text in (*self.failures, *self.wrong)]

    def row(self) -> list[str]:
        """The cells of a table."""
        counts = (self.times, len(self.failures), len(self.wrong))
        return [self.what, self.library.name, *map(str, counts)]


def lines_of(work: Callable[[], object]) -> list[str]:
    """The lines of PEFT and peftstate that some work runs, as the functions that they are in."""
    functions: list[str] = []
    at_line(-1, lambda: None, work, functions)
    return functions


def at_line(
    line: int,
    action: Callable[[], object],
    work: Callable[[], object],
    functions: list[str] | None = None,
) -> None:
    """Do some work, and something else before its n-th line of PEFT or peftstate.

    How threads share their work is left to chance, so there is one only; so is where the memory of
    a small file begins, and with it whether its tensors are copied, so each is read as a large one.

    Args:
        line: The number of the line, from 0 on.
        action: What is done there.
        work: The work.
        functions: Takes the names of the functions, line by line.
    """
    seen = [] if functions is None else functions
    thread = threading.current_thread()

    def trace(frame: Any, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGES):
            return None
        if event == "line" and threading.current_thread() is thread:
            seen.append(frame.f_code.co_name)
            if len(seen) - 1 == line:
                action()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        one_thread = mock.patch("peftstate._work.usable_cores", return_value=1)
        with one_thread, mock.patch("peftstate._disk._LARGE", 1):
            work()
    finally:
        sys.settrace(before)


def spread(number: int, end: int) -> list[int]:
    """Some numbers up to an end, which is among them."""
    return [end - (end * index) // number for index in range(number)]


def state_of(model: Any) -> dict[str, Any]:
    """All that a save or a load could leave behind on a model."""
    configs = getattr(model, "peft_config", {})
    return {
        "class": type(model),
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": {name: list(vars(module)) for name, module in model.named_modules()},
        "flags": {name: module.training for name, module in model.named_modules()},
        "tensors": {
            name: (id(tensor), tensor.dtype, tensor.requires_grad, tensor.sum().item())
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        },
        "configs": {name: dict(vars(config)) for name, config in configs.items()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "rng": torch.get_rng_state().tolist(),
    }


def _interrupt() -> None:
    """What Ctrl-C does, wherever it comes."""
    raise KeyboardInterrupt


def loads(generations: Generations, library: Library, times: int) -> Outcome:
    """Interrupt a load, until the model is there: the base model must be as it was."""
    work = _Load("a load", library, lambda: copy.deepcopy(generations.base), library.load)
    return work.interrupted(generations, times)


def adapters(generations: Generations, library: Library, times: int) -> Outcome:
    """Interrupt a load of an adapter into a model: the model must be as it was."""
    cls: Any = peft.PeftModel if library is PEFT else peftstate.PeftModel
    work = _Load(
        "load_adapter",
        library,
        lambda: make(generations.base, 0),
        lambda model, folder: cls.load_adapter(model, str(folder), "second"),
    )
    return work.interrupted(generations, times)


@attrs.frozen
class _Load:
    """Something that loads into a model.

    Attributes:
        what: Its name.
        library: Whose it is.
        fresh: Makes a model to load into.
        load: Loads a folder.
    """

    what: str
    library: Library
    fresh: Callable[[], Any]
    load: Callable[[Any, Path], object]

    def interrupted(self, generations: Generations, times: int) -> Outcome:
        """Interrupt it at lines up to its end, and look whether it left the model alone."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.library.save(generations.models[1], folder)
            self.load(self.fresh(), folder)  # what is made once is made
            once = self.fresh()
            lines = lines_of(lambda: self.load(once, folder))
            what = f"{self.what}, Ctrl-C at one of {len(lines):,} lines"
            outcome = Outcome(what, self.library, times)
            for line in spread(times, self._end(lines)):
                model = self.fresh()
                before = state_of(model)
                _try(outcome, line, lines, partial(self.load, model, folder))
                after = state_of(model)
                if after != before:
                    changed = ", ".join(key for key in before if after[key] != before[key])
                    outcome.wrong.append(f"{changed} changed at line {line}, in {lines[line]}")
            return outcome

    def _end(self, lines: list[str]) -> int:
        """The last line at which a load is undone; what follows only hands the model out."""
        if self.library is PEFT:
            return len(lines) - 1
        return max(i for i, function in enumerate(lines) if function == "undone_on_failure")


def _try(outcome: Outcome, line: int, lines: list[str], work: Callable[[], object]) -> None:
    """Do some work and interrupt it."""
    try:
        at_line(line, _interrupt, work)
    except KeyboardInterrupt:
        return
    except Exception as error:  # noqa: BLE001 - what is raised is what is measured
        outcome.failures.append(f"{type(error).__name__} at line {line}, in {lines[line]}: {error}")
    else:
        outcome.failures.append(f"no interrupt at line {line}, in {lines[line]}")


def saves(generations: Generations, library: Library, times: int, **options: bool) -> Outcome:
    """Interrupt a save over another one: the folder and the model must be whole."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "adapter")
        model = generations.models[1]
        save = partial(library.save, model, folder, **options)
        save()
        lines = lines_of(save)
        kind = ", ".join(f"{key}={value}" for key, value in options.items())
        what = f"a save{f' ({kind})' * bool(kind)}, Ctrl-C at one of {len(lines):,} lines"
        outcome = Outcome(what, library, times)
        for line in spread(times, len(lines) - 1):
            shutil.rmtree(folder)
            library.save(generations.models[0], folder)
            before = state_of(model)
            _try(outcome, line, lines, save)
            after = state_of(model)
            told = generations.told(library, folder)
            litter = [path.name for path in Path(name).iterdir() if path != folder]
            if told not in (0, 1) or after != before or litter:
                changed = [key for key in before if after[key] != before[key]]
                outcome.wrong.append(f"{told}, {changed}, {litter} at line {line}, {lines[line]}")
            for key, value in before["configs"].items():
                vars(model.peft_config[key]).update(value)
        return outcome


def saves_in_handlers(generations: Generations, times: int) -> Outcome:
    """Save in a signal handler, in the middle of another save: nothing hangs, all is whole."""
    first, second = generations.models[:2]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "adapter")
        save = partial(PEFTSTATE.save, first, folder)
        save()
        lines = lines_of(save)
        what = f"a save in a signal handler, at one of {len(lines):,} lines of a save"
        outcome = Outcome(what, PEFTSTATE, times)
        told: list[int | str] = []

        def handle(_: int, __: object) -> None:
            PEFTSTATE.save(second, folder)
            told.append(generations.told(PEFTSTATE, folder))

        before = signal.signal(signal.SIGUSR1, handle)
        try:
            for line in spread(times, len(lines) - 1):
                at_line(line, lambda: os.kill(os.getpid(), signal.SIGUSR1), save)
                told.append(generations.told(PEFTSTATE, folder))
                litter = [path.name for path in folder.rglob(TRACES)]
                if told[-2:-1] != [1] or told[-1] not in (0, 1) or litter:
                    outcome.wrong.append(f"{told[-2:]}, {litter} at line {line}, {lines[line]}")
        finally:
            signal.signal(signal.SIGUSR1, before)
        return outcome
