"""Loads while others save, and files that change between the check and the use."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys

import attrs
import peft
import pytest
import safetensors.torch
import torch

import peftstate
from benchmarks import races
from benchmarks._generations import EXTRA, PEFT, PEFTSTATE, Generations, make, outputs, silently
from peftstate import _files, errors
from peftstate._digest import file_digest
from peftstate._folder import AdapterFolder
from peftstate.manifest import FileRecord
from peftstate.sections._tensors import tensor_records

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")

BASE_KEY = "base_model.model.model.layers.0.mlp.up_proj.weight"
"""A tensor of the base model, under the name by which PEFT would load it into that model."""


@pytest.fixture(scope="module")
def generations():
    """Some states of a model."""
    with silently():
        return Generations.of(range(4))


@pytest.fixture(autouse=True)
def _quiet():
    """PEFT and transformers warn of a base model without a folder."""
    with silently():
        yield


needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="the harness forks")


@needs_fork
@pytest.mark.parametrize(
    "race",
    [
        races.Race(library=PEFTSTATE, adapters=2, only_files=True),
        races.Race(library=PEFTSTATE, savers=2, locks="flock lies", only_files=True),
        races.Race(library=PEFTSTATE, locks="flock fails"),
    ],
    ids=["files", "two savers without locks", "models"],
)
def test_every_load_during_saves_is_of_one_generation(generations, race):
    """Each load gives one whole generation, with one saver nearly always; no save fails."""
    outcome = races.run(race, generations, seconds=2.0)
    assert outcome.broken == []


@needs_fork
def test_the_harness_sees_what_plain_peft_loads(generations):
    """Plain PEFT, loading while another process saves, gives mixtures, or errors."""
    outcomes = (races.run(races.Race(library=PEFT), generations, seconds=2.0) for _ in range(5))
    assert any(outcome.mixed + outcome.untyped for outcome in outcomes)


def test_a_folder_is_read_again_while_saves_go_on(generations, tmp_path, monkeypatch):
    """A read that a save spoils is repeated, as often as saves come between."""
    folder = tmp_path / "adapter"
    PEFTSTATE.save(generations.models[0], folder)
    spoiled = iter([1, 2, 3])
    read = AdapterFolder.read

    def spoil(self, name, **options):
        data = read(self, name, **options)
        if name == "adapter_model.safetensors" and (number := next(spoiled, None)) is not None:
            PEFTSTATE.save(generations.models[number], folder)
        return data

    monkeypatch.setattr(AdapterFolder, "read", spoil)
    assert generations.read(folder) == 3
    assert next(spoiled, None) is None


def test_a_folder_that_is_damaged_is_not_read_over_and_over(generations, tmp_path, monkeypatch):
    """Without a save in between there is nothing to wait for."""
    PEFTSTATE.save(generations.models[0], tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.setattr(_files.time, "sleep", lambda _: pytest.fail("waited"))
    assert generations.read(tmp_path) == "IntegrityError"


def of_another_generation(folder, generations):
    """All files of another save, which fit together."""
    shutil.rmtree(folder)
    PEFTSTATE.save(generations.models[1], folder)


def with_base_weights(folder, generations):
    """Weights with a tensor of the base model among them."""
    for place in (folder, folder / EXTRA):
        path = place / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors[BASE_KEY] = torch.full((128, 64), 7.0)
        write_aside(path, safetensors.torch.save(tensors, {"format": "pt"}))


def of_other_shapes(folder, generations):
    """Weights that do not fit the config."""
    for place in (folder, folder / EXTRA):
        path = place / "adapter_model.safetensors"
        tensors = {k: t[:1].clone() for k, t in safetensors.torch.load_file(path).items()}
        write_aside(path, safetensors.torch.save(tensors, {"format": "pt"}))


def with_another_config(folder, generations):
    """A config that injects other layers."""
    for place in (folder, folder / EXTRA):
        path = place / "adapter_config.json"
        config = json.loads(path.read_bytes())
        write_aside(path, json.dumps({**config, "r": 2, "target_modules": ["v_proj"]}).encode())


def without_anything(folder, generations):
    """No folder any more."""
    shutil.rmtree(folder)


def write_aside(path, data):
    """Replace a file, as a save does it."""
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


SWAPS = [
    of_another_generation,
    with_base_weights,
    of_other_shapes,
    with_another_config,
    without_anything,
]


def swap_before(monkeypatch, function, swap):
    """Have files exchanged when all was read and checked, and PEFT has not loaded yet."""
    original = getattr(peftstate._models, function)
    calls = []

    def swapped(*args, **kwargs):
        calls.append(function)
        swap()
        return original(*args, **kwargs)

    monkeypatch.setattr(peftstate._models, function, swapped)
    return calls


@pytest.mark.parametrize("swap", SWAPS)
def test_what_was_checked_is_what_is_loaded(generations, tmp_path, monkeypatch, swap):
    """Files that change after they were read have no part in the model, nor in its base."""
    folder = tmp_path / "adapter"
    PEFTSTATE.save(generations.models[0], folder)
    base = copy.deepcopy(generations.base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    calls = swap_before(monkeypatch, "load_model", lambda: swap(folder, generations))
    loaded = peftstate.PeftModel.from_pretrained(base, folder, is_trainable=False)
    assert calls
    found = outputs(loaded)
    assert all(torch.equal(found[name], generations.outputs[0][name]) for name in found)
    assert found.keys() == {"default", EXTRA}
    loaded.unload()
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("swap", SWAPS)
def test_what_was_checked_is_what_is_loaded_into_a_live_model(
    generations, tmp_path, monkeypatch, swap
):
    """The same of `load_adapter`, with which PEFT reads the config, too."""
    folder = tmp_path / "adapter"
    PEFTSTATE.save(generations.models[0], folder)
    live = make(generations.base, 2)
    before = outputs(live)
    calls = swap_before(monkeypatch, "load_adapter", lambda: swap(folder, generations))
    live.load_adapter(folder, "new")
    assert calls
    after = outputs(live)
    assert torch.equal(after.pop("new"), generations.outputs[0]["default"])
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_plain_peft_loads_base_weights_that_come_with_an_adapter(generations, tmp_path):
    """That is why PEFT must not read a file again: it writes what it finds into the base model."""
    PEFT.save(generations.models[0], tmp_path)
    with_base_weights(tmp_path, generations)
    base = copy.deepcopy(generations.base)
    peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, torch.full((128, 64), 7.0))


def with_base_weights_that_the_manifest_names(folder, key):
    """A manifest that somebody made for weights with a tensor of the base model among them."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors[key] = torch.full(SHAPES[key], 7.0)
    data = safetensors.torch.save(tensors, {"format": "pt"})
    path.write_bytes(data)
    manifest = peftstate.read_manifest(folder)
    record = manifest.sections["adapters"]
    adapter = attrs.evolve(record.adapters["default"], tensors=tensor_records(tensors))
    sections = {
        **manifest.sections,
        "adapters": attrs.evolve(record, adapters={**record.adapters, "default": adapter}),
    }
    found = FileRecord(size=len(data), sha256=file_digest(data))
    files = {**manifest.files, path.name: found}
    (folder / "peftstate.json").write_bytes(
        attrs.evolve(manifest, sections=sections, files=files).to_json()
    )


SHAPES = {
    BASE_KEY: (128, 64),
    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": (64, 64),
    "base_model.model.model.norm.weight": (64,),
}


@pytest.mark.parametrize("key", SHAPES)
def test_base_weights_that_a_manifest_names_do_not_stay(generations, tmp_path, key):
    """PEFT loads them into the base model; that is undone, and an error names the tensor."""
    generations.models[0].save_pretrained(tmp_path)
    with_base_weights_that_the_manifest_names(tmp_path, key)
    base = copy.deepcopy(generations.base)
    live = make(generations.base, 2)
    for model, load in (
        (base, lambda: peftstate.PeftModel.from_pretrained(base, tmp_path)),
        (live, lambda: live.load_adapter(tmp_path, "new")),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(errors.AdapterMismatchError, match=key.rpartition("layers")[2]):
            load()
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture
def loaded_by_peft(monkeypatch):
    """Have PEFT load the weights, as it does of all but plain LoRA."""
    monkeypatch.setattr("peftstate._placeholders.suffice", lambda *_: False)


@pytest.mark.usefixtures("loaded_by_peft")
def test_a_load_leaves_no_temporary_folder(generations, tmp_path, monkeypatch):
    """What PEFT is handed is gone after a load, and after one that fails."""
    PEFTSTATE.save(generations.models[0], tmp_path / "adapter")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert generations.told(PEFTSTATE, tmp_path / "adapter") == 0

    def fail(*args, **kwargs):
        assert list((tmp_path / "tmp").iterdir())
        raise RuntimeError("no more")

    monkeypatch.setattr("peft.peft_model.set_peft_model_state_dict", fail)
    assert "Error" in str(generations.told(PEFTSTATE, tmp_path / "adapter"))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.usefixtures("loaded_by_peft")
def test_a_load_on_a_read_only_disk(generations, tmp_path, monkeypatch):
    """Where there is no place for temporary files, shared memory does; else the error is typed."""
    PEFTSTATE.save(generations.models[0], tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    if os.path.isdir("/dev/shm"):  # noqa: PTH112, S108
        assert generations.told(PEFTSTATE, tmp_path) == 0

    def refuse(**options):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(errors.RestoreError, match="no temporary folder can be made"):
        peftstate.PeftModel.from_pretrained(copy.deepcopy(generations.base), tmp_path)
