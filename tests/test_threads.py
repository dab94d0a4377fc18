"""Loads and saves in threads, in signal handlers, and cut off by Ctrl-C at any point."""

from __future__ import annotations

import copy
import errno
import fcntl
import sys
import threading
import warnings
from collections import UserDict

import peft
import pytest
import torch
from peft.tuners.lora import LoraModel

import peftstate
from benchmarks import _interrupts, threads
from benchmarks._generations import PEFT, PEFTSTATE, Generations, make, outputs, silently
from benchmarks._interrupts import state_of
from peftstate import _steps, _storage, errors
from peftstate._disk import alone
from peftstate._snapshot import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


@pytest.fixture(scope="module")
def generations():
    """Some states of a model."""
    with silently():
        return Generations.of(range(3))


@pytest.fixture(scope="module")
def workshop():
    """A saved model of each dtype."""
    with silently(), threads.workshop() as made:
        yield made


@pytest.fixture(autouse=True)
def _quiet():
    """PEFT and transformers warn of a base model without a folder."""
    with silently():
        yield


def test_concurrent_loads_of_mixed_dtypes(workshop):
    """Models in fp32, bf16 and nf4, each loaded with its base model, are as they were saved."""
    assert threads.loads(workshop, PEFTSTATE, 9).broken == []


def test_concurrent_loads_into_one_model(workshop):
    """Adapters do not disturb each other; those that cannot be loaded are gone again."""
    assert threads.adapters(workshop, PEFTSTATE, 12).broken == []


def test_saves_during_loads(workshop):
    """What a save records is not what another thread is just doing."""
    assert threads.saves(workshop, 3).broken == []


@pytest.mark.parametrize("step", ["from_pretrained", "load_adapter"])
def test_models_made_in_other_threads_have_weights(generations, tmp_path, monkeypatch, step):
    """An adapter's layers are made without weights while it loads; what others make is not."""
    PEFTSTATE.save(generations.models[1], tmp_path)
    live = make(generations.base, 0) if step == "load_adapter" else None
    create = LoraModel._create_and_replace
    made = []

    def creating(*args, **kwargs):
        other = threading.Thread(target=lambda: made.append(torch.nn.Linear(8, 8).weight))
        other.start()
        other.join()
        create(*args, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", creating)
    if live is None:
        PEFTSTATE.load(copy.deepcopy(generations.base), tmp_path)
    else:
        live.load_adapter(tmp_path, "further")
    assert made
    assert all(weight.device.type == "cpu" and weight.any() for weight in made)


def test_the_model_runs_on_while_a_load_fails(generations, tmp_path, monkeypatch):
    """To put a model back does not take anything away that another thread is using."""
    PEFTSTATE.save(generations.models[1], tmp_path)
    live = make(generations.base, 0)
    expected = outputs(live)["default"]
    ended, failures = threading.Event(), []

    def run():
        while not ended.is_set():
            try:
                with torch.no_grad():
                    if not torch.equal(live(input_ids=threads.IDS).logits, expected):
                        failures.append("other predictions")
            except Exception as error:  # noqa: BLE001 - a thread's error must reach the test
                failures.append(repr(error))

    def fail(*args, **kwargs):
        raise RuntimeError("at the very end")

    monkeypatch.setattr("peftstate._loading.compare_restored", fail)
    runner = threading.Thread(target=run)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        runner.start()
        for _ in range(10):
            with pytest.raises(errors.PeftStateError, match="at the very end"):
                live.load_adapter(tmp_path, "second")
            assert list(live.peft_config) == ["default", "extra"]
    finally:
        ended.set()
        runner.join()
        sys.setswitchinterval(interval)
    assert failures == []


def test_a_snapshot_that_is_restored_keeps_what_did_not_change(load_base):
    """No attribute and no module is missing for a moment, and all are in their old order."""
    model = load_base()
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    children = list(model.model.layers[0]._modules)
    snapshot = Snapshot.of(model)
    layer = model.model.layers[0]
    layer.mlp, attention = torch.nn.Identity(), layer.self_attn
    del layer.self_attn
    layer.self_attn = attention
    layer.added, model.config.hidden_size = torch.nn.Identity(), 1
    snapshot.restore()
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before
    assert list(layer._modules) == children
    assert model.config.hidden_size == 64


def test_a_snapshot_empties_what_was_empty(load_base):
    """Most containers of a module hold nothing, of which it keeps no copy."""
    model = load_base()
    layer = model.model.layers[0]
    layer.seen, layer.kept, layer.names = [], {1: 2}, set()
    snapshot = Snapshot.of(model)
    layer.register_forward_hook(lambda *_: None)
    layer.seen.append(1)
    layer.kept.clear()
    layer.names.add("one")
    hooks = layer._forward_hooks
    snapshot.restore()
    assert (layer.seen, layer.kept, layer.names) == ([], {1: 2}, set())
    assert layer._forward_hooks is hooks
    assert not hooks


class Untrue(UserDict[int, int]):
    """A container that is not told empty by its truth, as a `TensorDict` is not."""

    def __bool__(self):
        raise RuntimeError("neither true nor false")


def test_a_snapshot_asks_no_container_whether_it_is_true(load_base):
    """Those of other classes than Python's own are copied, whatever is in them."""
    model = load_base()
    layer = model.model.layers[0]
    layer.kept = Untrue({1: 2})
    snapshot = Snapshot.of(model)
    layer.kept[3] = 4
    snapshot.restore()
    assert dict(layer.kept) == {1: 2}


def test_a_save_waits_for_a_load_but_not_for_ever(generations, tmp_path, monkeypatch):
    """A load that takes long, as one that downloads does, cannot keep a save from being made."""
    monkeypatch.setattr(_steps, "_PATIENCE", 0.05)
    taken, release = threading.Event(), threading.Event()

    def hold():
        with _steps.LOCK:
            taken.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(timeout=30)
    try:
        generations.models[1].save_pretrained(tmp_path)
    finally:
        release.set()
        holder.join()
    assert generations.told(PEFTSTATE, tmp_path) == 1


def test_a_lock_that_this_thread_has_is_not_waited_for(tmp_path, monkeypatch):
    """A saver that is interrupted by another one of its own thread cannot let go of the lock."""
    locked = []
    flock = fcntl.flock

    def observed(descriptor, operation):
        locked.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", observed)
    with alone(tmp_path, seconds=3600):
        before = len(locked)
        with alone(tmp_path, seconds=3600):
            assert len(locked) == before
    with alone(tmp_path, seconds=3600):
        assert len(locked) > before


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_a_save_in_a_signal_handler_during_a_save(generations, monkeypatch):
    """Wherever a save is interrupted by another save, nothing hangs and the folder stays whole."""
    monkeypatch.setattr(_storage, "_PATIENCE", 3600.0)
    assert _interrupts.saves_in_handlers(generations, 6).broken == []


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}], ids=["safe", "bin"])
def test_an_interrupted_save_leaves_model_and_folder_whole(generations, options):
    """Ctrl-C anywhere in a save: the old or the new generation, and the model as it was."""
    assert _interrupts.saves(generations, PEFTSTATE, 7, **options).broken == []


def test_an_interrupted_load_leaves_the_base_model_as_it_was(generations):
    """Ctrl-C anywhere in a load, until the model is there."""
    assert _interrupts.loads(generations, PEFTSTATE, 10).broken == []


def test_an_interrupted_load_adapter_leaves_the_model_as_it_was(generations):
    """The same of an adapter that is loaded into a live model."""
    assert _interrupts.adapters(generations, PEFTSTATE, 8).broken == []


def test_the_harness_sees_what_plain_peft_leaves(generations):
    """Plain PEFT, interrupted, leaves a base model with an adapter in it, and mixed folders."""
    assert _interrupts.loads(generations, PEFT, 4).wrong
    assert _interrupts.saves(generations, PEFT, 12).wrong


def test_a_warning_that_is_an_error_undoes_the_load(generations, tmp_path):
    """What fails a load at its very end fails it as a whole."""
    model = make(generations.base, 1)
    model.train()
    PEFTSTATE.save(model, tmp_path)
    base = copy.deepcopy(generations.base)
    before = state_of(base)
    with pytest.warns(errors.TrainModeWarning):
        peftstate.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.TrainModeWarning)
        with pytest.raises(errors.TrainModeWarning):
            peftstate.PeftModel.from_pretrained(base, tmp_path)
    assert state_of(base) == before


def test_an_interrupt_while_peft_saves_leaves_the_configs(generations, tmp_path, monkeypatch):
    """PEFT would leave `inference_mode` and, when it converts, an adapter behind."""
    model = generations.models[2]
    before = state_of(model)
    saved = peft.PeftConfig.save_pretrained

    def stop(config, *args, **kwargs):
        assert config.inference_mode
        saved(config, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(peft.PeftConfig, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "adapter")
    assert state_of(model) == before
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_does_not_lose_the_work(generations, tmp_path):
    """What cannot be saved where it was asked for is saved whole beside it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "extra").write_text("mine")
    with pytest.raises(errors.SaveError, match="a file is in the folder's place") as caught:
        generations.models[1].save_pretrained(folder)
    assert caught.value.rescued == str(tmp_path / "adapter.rescued-0")
    assert [path.name for path in folder.iterdir()] == ["extra"]
    assert generations.told(PEFTSTATE, tmp_path / "adapter.rescued-0") == 1


def test_a_rescue_that_fails_leaves_no_trace(generations, tmp_path, monkeypatch):
    """On a full disk nothing can be rescued, and half a rescue would only take more of it."""
    PEFTSTATE.save(generations.models[0], tmp_path / "adapter")

    def fail(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peftstate._saving.write_file", fail)
    with pytest.raises(errors.SaveError, match="No space left on device") as caught:
        generations.models[1].save_pretrained(tmp_path / "adapter")
    assert caught.value.rescued is None
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert generations.told(PEFTSTATE, tmp_path / "adapter") == 0
