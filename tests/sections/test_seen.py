"""A further adapter does not read a base model that was read, unless it looks different."""

from __future__ import annotations

import gc
import weakref

import attrs
import peft
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import peftstate
from benchmarks.performance._workloads import bare
from peftstate import errors
from peftstate.sections import _bitsandbytes, _seen
from peftstate.sections._base_tensors import base_tensors
from peftstate.sections._tensors import tensor_record
from peftstate.sections._view import ModelView

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


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


def test_verify_reads_all_of_the_base(live, digested):
    """Whatever was seen: who asks wants to know."""
    model, folder = live
    digested.clear()
    peftstate.verify(model, folder)
    assert tuple(model.get_input_embeddings().weight.shape) in digested


@pytest.fixture
def large(large_base, tmp_path):
    """A live model of tensors of several strides, in bf16, and the folder that it came from."""
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peftstate.get_peft_model(large_base(), lora)
    model.save_pretrained(tmp_path)
    return peftstate.PeftModel.from_pretrained(bare(model), tmp_path, is_trainable=False), tmp_path


def test_all_is_read_again_when_one_tensor_has_changed(large):
    """What changed it may have changed others where no look falls, as it did here."""
    model, folder = large
    layers = model.get_base_model().model.layers
    weight = layers[1].mlp.up_proj.base_layer.weight
    start = _seen.PLACE // weight.element_size()
    weight.data.view(-1)[start] += 1  # just behind the first place
    model.load_adapter(folder, "second")  # which is not seen
    layers[0].mlp.up_proj.base_layer.weight.data.view(-1)[0] += 1
    with pytest.raises(errors.BaseModelMismatchError) as caught:
        model.load_adapter(folder, "third")
    assert len(caught.value.mismatches) == 2


def test_a_write_as_long_as_a_stride_is_seen_wherever_it_is(large):
    """For it covers a place."""
    model, folder = large
    weight = model.get_base_model().get_input_embeddings().weight.data.view(-1)
    length = _seen.STRIDE // weight.element_size()
    for number, start in enumerate((1, length // 2, len(weight) - length)):
        piece = weight[start : start + length]
        before = piece.clone()
        piece.mul_(2)
        with pytest.raises(errors.BaseModelMismatchError, match="embed_tokens"):
            model.load_adapter(folder, "refused")
        piece.copy_(before)
        model.load_adapter(folder, f"taken-{number}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16])
def test_the_same_bytes_of_another_dtype_are_read(large, dtype):
    """Which are other values."""
    model, folder = large
    weight = model.get_base_model().model.norm.weight
    weight.requires_grad_(requires_grad=False)
    weight.data = weight.data.view(dtype)
    with pytest.raises(errors.BaseModelMismatchError, match=r"model\.norm\.weight"):
        model.load_adapter(folder, "second")


@pytest.mark.parametrize("fingerprint", ["sampled", "off"])
def test_nothing_is_looked_at_that_is_not_read(large_base, tmp_path, monkeypatch, fingerprint):
    """Where not every byte is compared, a look would cost what is to be saved."""
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peftstate.get_peft_model(large_base(), lora)
    model.save_pretrained(tmp_path, fingerprint=fingerprint)
    monkeypatch.setattr(_seen.Looks, "of", lambda _: pytest.fail("looked"))
    loaded = peftstate.PeftModel.from_pretrained(large_base(), tmp_path, is_trainable=False)
    loaded.load_adapter(tmp_path, "second")


def test_what_was_never_digested_is_not_known(large_base, tmp_path):
    """A manifest without digests says nothing of them."""
    base = large_base()
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peftstate.get_peft_model(base, lora)
    model.save_pretrained(tmp_path, fingerprint="off")
    saved = peftstate.read_manifest(tmp_path).sections["base_model"].tensors
    bases = base_tensors(ModelView(model=model.get_base_model()))
    looks = _seen.Looks.of(bases)
    looks.note({name: attrs.evolve(record, digest="0") for name, record in saved.items()}.items())
    other = {name: attrs.evolve(record, dtype="float32") for name, record in saved.items()}
    assert looks.unchanged(other) == frozenset()


@pytest.mark.parametrize("more", [0, 1, 63, 64, 65, _seen.STRIDE - 1, _seen.STRIDE])
def test_no_stride_is_without_a_place(more):
    """Of tensors of any size."""
    size = 2 * _seen.STRIDE + more
    before = _seen._places(torch.zeros(size, dtype=torch.uint8))
    last = size - _seen.STRIDE
    for start in {0, 1, 63, 64, 65, _seen.STRIDE - 1, last // 2, last - 65, last - 1, last}:
        tensor = torch.zeros(size, dtype=torch.uint8)
        tensor[start : start + _seen.STRIDE] = 1
        assert not torch.equal(_seen._places(tensor), before), start


def test_the_scales_of_a_quantized_weight_are_looked_at(live):
    """They are no parameters: a change of them alone is seen."""
    model, folder = live
    layer = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    scales = _bitsandbytes.scales_of(layer, layer.weight)
    if not scales:
        assert type(layer) is torch.nn.Linear
        return
    scales[0].view(-1)[0] += 1
    with pytest.raises(errors.BaseModelMismatchError, match=r"down_proj\.weight\."):
        model.load_adapter(folder, "second")


def test_a_base_of_inference_tensors_loads(load_base, with_lora, tmp_path):
    """These have no version, so they are read each time."""
    with_lora(load_base()).save_pretrained(tmp_path)
    with torch.inference_mode():
        base = load_base()
    for _ in range(2):
        base = bare(peftstate.PeftModel.from_pretrained(base, tmp_path, is_trainable=False))


def test_models_that_are_gone_are_forgotten(load_base, with_lora, tmp_path):
    """What is known of a tensor does not keep it."""
    with_lora(load_base()).save_pretrained(tmp_path)
    model = peftstate.PeftModel.from_pretrained(load_base(), tmp_path, is_trainable=False)
    weight = weakref.ref(model.get_base_model().model.norm.weight)
    assert weight() in _seen._tensors()
    del model
    gc.collect()
    assert weight() is None


def test_a_tensor_that_is_made_of_others_is_read_each_time():
    """There is no memory of its own to look at."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4)))
    bases = base_tensors(ModelView(model=module))
    assert set(bases) == {"weight.a", "weight.b"}
    looks = _seen.Looks.of(bases)
    records = {name: tensor_record(base.tensor) for name, base in bases.items()}
    looks.note(records.items())
    assert looks.unchanged(records) == frozenset()
