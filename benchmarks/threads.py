"""Loads and saves in many threads of one process, and some that are interrupted.

transformers sets the default dtype of the whole process while it loads a model, and PEFT keeps its
adapters in plain dictionaries. Each model and each adapter is checked afterwards, by what it
predicts, against the same one loaded alone. Ctrl-C, or a signal whose handler saves,
comes before lines of PEFT's and peftstate's code that are spread over the whole of it.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import peft
import torch
import transformers

import peftstate
from benchmarks import _interrupts, _page
from benchmarks._generations import (
    IDS,
    PEFT,
    PEFTSTATE,
    Generations,
    Library,
    make_base,
    silently,
)
from benchmarks._interrupts import Outcome

KINDS = ("fp32", "bf16", "nf4")
_SWITCH = 1e-5
"""Seconds until another thread may run: as if there were more cores."""


@attrs.frozen
class Workshop:
    """Saved models to load.

    Attributes:
        folder: Where they are.
        expected: What each one predicts, by its kind.
    """

    folder: Path
    expected: dict[str, torch.Tensor]

    def base(self, kind: str) -> Any:
        """A fresh base model of a kind."""
        options: dict[str, Any] = {"dtype": torch.float32 if kind == "fp32" else torch.bfloat16}
        if kind == "nf4":
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder / "base", **options)

    def load(self, library: Library, kind: str) -> Any:
        """Load a base model and its adapter."""
        if library is PEFTSTATE:
            return peftstate.AutoPeftModelForCausalLM.from_pretrained(
                self.folder / kind, is_trainable=False
            )
        # autocast_adapter_dtype: as the adapter was saved, which PEFT does not do by itself
        return peft.PeftModel.from_pretrained(
            self.base(kind), str(self.folder / kind), autocast_adapter_dtype=False
        )


@contextmanager
def workshop() -> Iterator[Workshop]:
    """Save a model of each kind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base().bfloat16().save_pretrained(folder / "base")
        made = Workshop(folder, {})
        for kind in KINDS:
            model = wrapped(made.base(kind), len(made.expected))
            made.expected[kind] = predicted(model)
            model.save_pretrained(folder / kind)
        yield made


def wrapped(base: Any, seed: int) -> Any:
    """A model with an adapter of the base's own dtype."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peftstate.get_peft_model(base, config, autocast_adapter_dtype=False)
    model.eval()
    return model


def predicted(model: Any) -> torch.Tensor:
    """What a model predicts; a fresh 4-bit one, as bitsandbytes repacks it when it runs."""
    with torch.no_grad():
        logits: torch.Tensor = copy.deepcopy(model).forward(input_ids=IDS).logits
    return logits


def in_threads(jobs: Sequence[Callable[[], object]]) -> list[str]:
    """Run jobs at the same time, each in a thread, and give what they raised."""
    failures: list[str] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> None:
        try:
            start.wait()
            job()
        except Exception as error:  # noqa: BLE001 - what is raised is what is measured
            failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return failures


def loads(made: Workshop, library: Library, times: int) -> Outcome:
    """Load models of mixed dtypes, a base model to each."""
    models: dict[int, Any] = {}

    def load(index: int) -> None:
        models[index] = made.load(library, KINDS[index % len(KINDS)])

    failures = in_threads([partial(load, index) for index in range(times)])
    wrong = []
    if torch.get_default_dtype() != torch.float32:
        wrong.append(f"the process is left with {torch.get_default_dtype()} as its default dtype")
        torch.set_default_dtype(torch.float32)
    for index, model in sorted(models.items()):
        kind = KINDS[index % len(KINDS)]
        try:
            if not torch.equal(predicted(model), made.expected[kind]):
                wrong.append(f"{index}, {kind}: other predictions")
        except RuntimeError as error:  # tensors of two dtypes do not multiply
            wrong.append(f"{index}, {kind}: {error}")
    what = f"{times} models loaded, {', '.join(KINDS)}"
    return Outcome(what, library, times, failures, wrong)


def adapters(made: Workshop, library: Library, times: int) -> Outcome:
    """Load adapters into one model."""
    live = wrapped(made.base("fp32"), 0)
    expected, broken = _adapter_folders(made, times)
    failures = in_threads(
        [_loading(library, live, made.folder / name, name) for name in (*expected, *broken)]
    )
    due = len(broken)
    wrong = [f"{due - len(failures)} damaged adapters loaded"] if len(failures) < due else []
    wrong += [f"{name} is left" for name in broken if _traces(live, name)]
    for name, logits in expected.items():
        if name not in live.peft_config:
            continue
        live.set_adapter(name)
        if not torch.equal(predicted(live), logits):
            wrong.append(f"{name}: other predictions")
    what = f"{times} adapters loaded into one model, {due} damaged ones meanwhile"
    return Outcome(what, library, times + due, failures[: len(failures) - due], wrong)


def _adapter_folders(made: Workshop, times: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Save adapters, and damaged ones: what the former predict, and the names of the latter."""
    expected, broken = {}, []
    for index in range(times):
        model = wrapped(made.base("fp32"), index)
        name = f"adapter-{index}"
        model.save_pretrained(made.folder / name)
        expected[name] = predicted(model)
        if index % 6 == 0:
            broken.append(f"damaged-{index}")
            shutil.copytree(made.folder / name, made.folder / broken[-1], dirs_exist_ok=True)
            weights = made.folder / broken[-1] / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1])
    return expected, broken


def _loading(library: Library, live: Any, folder: Path, name: str) -> Callable[[], object]:
    """Loads an adapter into a model."""
    load = live.load_adapter
    if library is PEFT:
        load = peft.PeftModel.load_adapter.__get__(live)
    return partial(load, str(folder), name)


def _traces(live: Any, name: str) -> list[str]:
    """What a model has of an adapter."""
    modules = [found for found, _ in live.named_modules() if name in found.split(".")]
    return modules + [name] * (name in live.peft_config)


def saves(made: Workshop, times: int) -> Outcome:
    """Save models while others are loaded, in other dtypes, and into the models that are saved."""
    live = wrapped(made.base("fp32"), 0)
    live.save_pretrained(made.folder / "more")
    folders = [made.folder / f"saved-{index}" for index in range(times)]
    jobs: list[Callable[[], object]] = []
    for index, folder in enumerate(folders):
        jobs += [
            partial(live.save_pretrained, folder),
            partial(made.load, PEFTSTATE, KINDS[index % len(KINDS)]),
            _loading(PEFTSTATE, live, made.folder / "more", f"more-{index}"),
        ]
    failures = in_threads(jobs)
    wrong = []
    for folder in folders:
        loaded = peftstate.PeftModel.from_pretrained(made.base("fp32"), folder)
        if not torch.equal(predicted(loaded), predicted(live)):
            wrong.append(f"{folder.name}: other predictions")
        if torch.get_default_dtype() != torch.float32:
            wrong.append(f"{folder.name}: the default dtype of a load was saved")
            torch.set_default_dtype(torch.float32)
    what = f"{times} saves of one model, while adapters and other models are loaded"
    return Outcome(what, PEFTSTATE, len(jobs), failures, wrong)


def measure(*, quick: bool = False) -> Iterator[Outcome]:
    """Do all the work, or a part that takes seconds."""
    models, many, some, lines = (12, 18, 4, 8) if quick else (40, 72, 24, 60)
    with silently(), workshop() as made:
        generations = Generations.of(range(2))
        for library in (PEFT, PEFTSTATE):
            yield loads(made, library, models)
            yield adapters(made, library, many)
            yield _interrupts.loads(generations, library, lines)
            yield _interrupts.adapters(generations, library, lines)
            yield _interrupts.saves(generations, library, lines)
            yield _interrupts.saves(generations, library, lines, safe_serialization=False)
        yield saves(made, some)
        yield _interrupts.saves_in_handlers(generations, lines)


def table(outcomes: Sequence[Outcome]) -> _page.Table:
    """The figures."""
    return _page.Table(
        name="threads",
        command="python -m benchmarks.threads",
        columns=["what", "by", "times", "failed", "wrong, silently"],
        rows=[outcome.row() for outcome in outcomes],
    )


def main() -> int:
    """Run the benchmark; the status tells whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer threads")
    parser.add_argument("--write", action="store_true", help="put the figures on their page")
    arguments = parser.parse_args()
    outcomes = []
    for outcome in measure(quick=arguments.quick):
        print(*outcome.row(), *outcome.broken, sep=" | ", file=sys.stderr, flush=True)
        outcomes.append(outcome)
    result = table(outcomes)
    print(result.markdown())
    if arguments.write:
        _page.write(result, "reliability.md")
    return any(outcome.broken for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
