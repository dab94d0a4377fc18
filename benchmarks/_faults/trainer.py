"""The random generators as the `Trainer` of transformers keeps them, in a process that may die.

A bad position makes NumPy read beyond its state, so the loads run in a process of their own.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs

from benchmarks._faults.edits import flip
from benchmarks._faults.scene import draws, generators, seed_all

RNG_FILE = "rng_state.pth"
SEED = 7


@attrs.frozen(kw_only=True)
class Restored:
    """What came of a restore by the Trainer.

    Attributes:
        error: The class of the error, if one was raised; ``"killed"`` if the process died.
        same_draws: Whether the random numbers go on as after the save.
        left_alone: Whether a restore that failed left the generators as they were.
    """

    error: str = ""
    same_draws: bool = False
    left_alone: bool = False


def save(folder: Path) -> Any:
    """Save the generators as a Trainer does, and give the trainer."""
    import transformers
    from torch import nn

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no"
    )
    trainer = transformers.Trainer(model=nn.Linear(2, 2), args=arguments)
    seed_all(SEED)
    trainer._save_rng_state(str(folder))
    return trainer


def restored(flips: Sequence[tuple[int, int]], folder: Path) -> Iterator[Restored]:
    """Flip single bits of the Trainer's file, and have the Trainer restore from each.

    Args:
        flips: Offset and bit of each flip.
        folder: Where `save` saved.
    """
    done = 0
    while done < len(flips):
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_restore_all, args=(flips[done:], folder, theirs))
        process.start()
        theirs.close()
        try:
            while done < len(flips):
                yield mine.recv()
                done += 1
        except EOFError:
            yield Restored(error="killed")
            done += 1
        process.join()


def _restore_all(flips: Sequence[tuple[int, int]], folder: Path, results: Connection) -> None:
    """Restore from one damaged file after the other, and send what came of it."""
    with tempfile.TemporaryDirectory(prefix="trainer-") as directory:
        trainer = save(Path(directory))
        expected = draws()
        file = Path(directory, RNG_FILE)
        for offset, bit in flips:
            shutil.copy(folder / RNG_FILE, file)
            flip(file, offset, bit)
            results.send(_restore(trainer, Path(directory), expected))


def _restore(trainer: Any, folder: Path, expected: list[float]) -> Restored:
    """Restore once."""
    seed_all(0)
    before = generators()
    try:
        trainer._load_rng_state(str(folder))
    except Exception as error:  # noqa: BLE001 - which errors come is what is measured
        return Restored(error=type(error).__name__, left_alone=generators() == before)
    return Restored(same_draws=draws() == expected)
