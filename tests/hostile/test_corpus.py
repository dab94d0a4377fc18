"""Hostile folders that were thought of: what refuses each, and that none does anything."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import peftstate
from benchmarks._hostile import values
from benchmarks._hostile.case import CONFIG, SIDECAR, WEIGHTS, Case
from benchmarks._hostile.scene import CASES, Scene, Watch
from peftstate.errors import PeftStateError

WATCH = Watch()
"""One for all tests: an audit hook stays for as long as the process does."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A good folder, and what it is loaded onto; both loads have imported what they need."""
    scene = Scene.at(tmp_path_factory.mktemp("hostile"))
    for by_auto in (False, True):
        scene.load(scene.good, by_auto=by_auto)
    return scene


@pytest.fixture
def evil_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a file where it is imported, and the place of that file."""
    trace = tmp_path / "imported"
    code = f"open({str(trace)!r}, 'w').close()"
    (tmp_path / f"{values.EVIL}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return trace


def _numbers() -> list[float]:
    """The next random numbers of the process."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return numbers


def test_corpus() -> None:
    """There are as many as were asked for, each with a name of its own."""
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, scene: Scene, evil_module: Path) -> None:
    """A hostile folder is refused with the right error, or loads and does nothing.

    A load that fails has changed no random generator. No load starts a process, opens a socket,
    imports what it is told to, or writes anywhere else than to temporary folders.
    """
    folder = scene.make(case)
    environment, before = dict(os.environ), _numbers()
    with WATCH.over(scene.place) as seen:
        if case.error is None:
            scene.load(folder, by_auto=case.by_auto)
        else:
            with pytest.raises(case.error) as caught:
                scene.load(folder, by_auto=case.by_auto)
            assert isinstance(caught.value, PeftStateError)
            assert case.tells in str(caught.value)
            assert _numbers() == before
    assert seen == []
    assert not evil_module.exists()
    assert dict(os.environ) == environment


def test_base_is_left_alone(scene: Scene) -> None:
    """A load that fails late leaves no adapter in the base model, which predicts as before."""
    case = next(case for case in CASES if case.name == "ids beyond the embeddings")
    base = scene.base
    ids = torch.arange(4)[None]
    before = base(ids).logits
    folder = scene.make(case)
    with pytest.raises(PeftStateError):
        peftstate.PeftModel.from_pretrained(base, folder)
    assert torch.equal(base(ids).logits, before)
    assert not any("lora" in name for name, _ in base.named_modules())


def _without_manifest(case: Case) -> bool:
    """Whether a case is about what can be read without torch, and is refused there already."""
    return case.name.startswith(("a file's name", "schema", "60 MB"))


@pytest.mark.parametrize(
    "case", [case for case in CASES if _without_manifest(case)], ids=lambda case: case.name
)
@pytest.mark.parametrize("read", [peftstate.read_manifest, peftstate.verify_files])
def test_reading_alone(case: Case, scene: Scene, read: Callable[[Path], Any]) -> None:
    """What only reads a manifest refuses it with the same error."""
    assert case.error is not None
    with pytest.raises(case.error, match=r"peftstate\.json"):
        read(scene.make(case))


@pytest.mark.parametrize("name", [SIDECAR, WEIGHTS, CONFIG])
def test_hard_link(name: str, scene: Scene) -> None:
    """A hard link is a file like any other: what counts is what is in it."""

    def make(folder: Path) -> None:
        (folder.parent / name).hardlink_to(folder / name)

    scene.load(scene.make(Case(name=name, attacks="", make=make, error=None)))


def test_template_is_not_written_elsewhere(scene: Scene, tmp_path: Path) -> None:
    """Names of chat templates that are no paths are restored, and saved to the tokenizer's folder.

    Those that are paths (``"../../evil"`` in the corpus) would be written wherever they say by a
    `save_pretrained` of the tokenizer, in older versions of transformers.
    """
    import copy

    def edit(record: dict[str, Any]) -> None:
        record["chat_templates"]["tool_use"] = "user says"

    from benchmarks._hostile.case import section

    case = Case(name="", attacks="", make=section("tokenizer", edit), error=None)
    tokenizer = copy.deepcopy(scene.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peftstate.PeftModel.from_pretrained(
            copy.deepcopy(scene.base),
            scene.make(case),
            tokenizer=tokenizer,
            on_mismatch={"tokenizer": "warn"},
        )
    assert tokenizer.chat_template["tool_use"] == "user says"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.fixture(autouse=True)
def _no_litter(scene: Scene) -> Iterator[None]:
    """A case leaves nothing beside its own folder and the good one."""
    yield
    assert {path.name for path in scene.place.iterdir()} <= {"base", "good", "bad"}
