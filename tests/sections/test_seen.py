"""A further adapter does not read a base model that was read, unless something speaks for it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import peftstate
from peftstate import errors
from peftstate.sections import _seen, _tensors

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


@pytest.fixture
def digested(monkeypatch):
    """The shapes of all tensors that are digested."""
    shapes = []
    original = _tensors.pieces_digest

    def counting(dtype, shape, data):
        shapes.append(tuple(shape))
        return original(dtype, shape, data)

    monkeypatch.setattr(_tensors, "pieces_digest", counting)
    return shapes


@pytest.fixture(params=["bf16", "nf4", "int8"])
def live(request, load_base, with_lora, tmp_path):
    """A loaded model, and the folder that it came from."""
    with_lora(load_base(request.param)).save_pretrained(tmp_path)
    base = load_base(request.param)
    return peftstate.PeftModel.from_pretrained(base, tmp_path, is_trainable=False), tmp_path


def test_a_further_adapter_reads_no_tensor_of_the_base(live, digested):
    """What the load of the first one read is known."""
    model, folder = live
    shapes = {tuple(tensor.shape) for tensor in model.get_base_model().state_dict().values()}
    own = {tuple(tensor.shape) for name, tensor in model.named_parameters() if "lora" in name}
    digested.clear()
    model.load_adapter(folder, "second")
    assert own <= set(digested)
    assert not (shapes - own) & set(digested)


def test_what_torch_knows_to_have_changed_is_read_again(live):
    """One value, written by torch, is enough."""
    model, folder = live
    with torch.no_grad():
        model.get_base_model().model.norm.weight[-1] += 1
    with pytest.raises(errors.BaseModelMismatchError, match=r"model\.norm\.weight"):
        model.load_adapter(folder, "second")


def test_what_is_written_past_torch_is_seen_in_places(live):
    """`.data` has no version, so a few places of each tensor are read."""
    model, folder = live
    model.get_base_model().model.embed_tokens.weight.data.mul_(1.5)
    with pytest.raises(errors.BaseModelMismatchError, match="embed_tokens"):
        model.load_adapter(folder, "second")


def test_another_tensor_in_its_place_is_read(live):
    """The same parameter with other data."""
    model, folder = live
    weight = model.get_base_model().lm_head.weight
    weight.data = weight.data.clone()
    weight.data[3, 3] += 1
    with pytest.raises(errors.BaseModelMismatchError, match=r"lm_head"):
        model.load_adapter(folder, "second")


def test_trainable_tensors_are_read_each_time(live, digested):
    """Optimizers write from kernels of their own."""
    model, folder = live
    weight = model.get_base_model().model.norm.weight.requires_grad_()
    digested.clear()
    model.load_adapter(folder, "second")
    assert tuple(weight.shape) in digested


def test_a_load_onto_a_base_reads_all_of_it(live, load_base, digested):
    """Only a live model's further adapters rely on what was seen."""
    model, folder = live
    base = model.unload()
    vars(base).pop("peft_config", None)  # which older releases of PEFT leave there
    digested.clear()
    peftstate.PeftModel.from_pretrained(base, folder, is_trainable=False)
    assert tuple(base.get_input_embeddings().weight.shape) in digested


def test_models_that_are_gone_are_forgotten(load_base, with_lora, tmp_path):
    """What is known of a tensor does not keep it."""
    with_lora(load_base()).save_pretrained(tmp_path)
    model = peftstate.PeftModel.from_pretrained(load_base(), tmp_path, is_trainable=False)
    weight = weakref.ref(model.get_base_model().model.norm.weight)
    assert weight() in _seen._tensors()
    del model
    gc.collect()
    assert weight() is None
