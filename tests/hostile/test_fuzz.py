"""Manifests and folders at random: errors of peftstate's only, soon, in bounded memory."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import hostile
from benchmarks._hostile import fuzz
from benchmarks._hostile.case import MANIFEST, SIDECAR
from benchmarks._hostile.scene import Scene
from peftstate._codec import DecodeError, loads
from peftstate._weights import parse_weights
from peftstate.errors import IntegrityError
from tests.hostile.test_corpus import WATCH

TIMEBOX = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A good folder, and what it is loaded onto."""
    scene = Scene.at(tmp_path_factory.mktemp("hostile"))
    scene.load(scene.good)
    return scene


@settings(TIMEBOX, max_examples=300)
@given(st.randoms(use_true_random=False))
def test_manifests(scene: Scene, choices: random.Random) -> None:
    """A manifest at random is read, or refused with an error of peftstate's."""
    tally = fuzz.Tally()
    fuzz.read_one((scene.good / MANIFEST).read_bytes(), fuzz.Mutator(choices), tally, "manifest")
    assert tally.broken == []


@settings(TIMEBOX, max_examples=60)
@given(st.randoms(use_true_random=False))
def test_folders(scene: Scene, choices: random.Random) -> None:
    """A folder at random is loaded, or refused with an error of peftstate's, and does nothing."""
    tally = fuzz.Tally()
    fuzz.load_one(scene, WATCH, fuzz.Mutator(choices), tally, "folder")
    assert tally.broken == []


@settings(TIMEBOX, max_examples=300)
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_json(data: bytes) -> None:
    """Of any bytes, JSON is read as Python reads it, or refused."""
    try:
        value = loads(data)
    except DecodeError:
        return
    assert value == json.loads(data)


@settings(TIMEBOX, max_examples=200)
@given(st.randoms(use_true_random=False))
def test_tensors(scene: Scene, choices: random.Random) -> None:
    """A file of tensors at random gives tensors whose bytes it has, or is refused."""
    mutator = fuzz.Mutator(choices)
    good = (scene.good / SIDECAR).read_bytes()
    data = mutator.header(good) if mutator.likely(70) else mutator.binary(good)
    try:
        tensors = parse_weights(SIDECAR, data)
    except IntegrityError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(data)


def test_fuzzer_finds(scene: Scene) -> None:
    """The fuzzer reaches all there is: it loads some, and has errors of every kind come up."""
    tally = fuzz.Tally()
    for seed in range(60):
        fuzz.load_one(scene, WATCH, fuzz.Mutator(random.Random(seed)), tally, str(seed))
    assert tally.broken == []
    assert tally.loaded
    wanted = {"ManifestDecodeError", "IntegrityError", "AdapterLoadError", "RestoreError"}
    assert wanted <= tally.refused.keys()


def test_tally() -> None:
    """What no load may do is counted as broken: another error, or a time that is too long."""

    def fail() -> None:
        raise KeyError("a")

    tally = fuzz.Tally()
    tally.count("fails", fail)
    tally.count("works", lambda: None)
    assert (tally.tried, tally.loaded, tally.refused) == (2, 1, {})
    assert tally.broken == ["fails: KeyError: 'a'"]


def test_harness() -> None:
    """A short run of the harness breaks no promise, and makes a table of what it did."""
    rows = hostile.measure(quick=True, seconds=2)
    assert [text for row in rows for text in row.tally.broken] == []
    table = hostile.table(rows, seconds=2)
    assert len(table.rows) == len(rows) == 6
    assert "0 of " in table.note
