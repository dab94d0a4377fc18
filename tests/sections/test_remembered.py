"""A load reads all of a base model, whatever it has been through since an earlier load."""

from __future__ import annotations

import peft
import pytest
import torch

import peftstate
from benchmarks.performance._workloads import bare
from peftstate import errors
from peftstate.sections import _remembered
from peftstate.sections._remembered import WORTH_IT, remembered_digest
from peftstate.sections._tensors import digest

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


@pytest.fixture(autouse=True)
def _nothing_remembered():
    """Each test begins with nothing."""
    _remembered.forget()


@pytest.fixture
def xxh3(monkeypatch):
    """The sizes of all that XXH3 reads."""
    sizes = []
    original = _remembered.xxh3_128_digest

    def counting(data, *seed):
        sizes.append(len(data))
        return original(data, *seed)

    monkeypatch.setattr(_remembered, "xxh3_128_digest", counting)
    return sizes


@pytest.fixture
def loaded(large_base, tmp_path):
    """A base model that was loaded onto three times, bare, and the folder of the adapter."""
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    base = large_base()
    model = peftstate.get_peft_model(base, lora)
    model.save_pretrained(tmp_path)
    bare(model)
    for _ in range(3):
        bare(peftstate.PeftModel.from_pretrained(base, tmp_path, is_trainable=False))
    return base, tmp_path


def is_refused(base, folder):
    """Have a load refuse a base model, and give the names of the tensors that differ."""
    with pytest.raises(errors.BaseModelMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(base, folder)
    fields = [mismatch.field for mismatch in caught.value.mismatches]
    return {field.removeprefix("tensors[").partition("]")[0] for field in fields}


def test_the_third_load_digests_no_large_tensor(loaded, digested, xxh3):
    """It reads all of them all the same, each once."""
    base, folder = loaded
    digested.clear()
    xxh3.clear()
    peftstate.PeftModel.from_pretrained(base, folder, is_trainable=False)
    large = [tensor for tensor in base.parameters() if tensor.nbytes >= WORTH_IT]
    assert sorted(xxh3) == sorted(tensor.nbytes for tensor in large)
    assert len(large) > 10
    assert not {tuple(tensor.shape) for tensor in large} & set(digested)


def test_the_third_save_digests_no_large_tensor(large_base, tmp_path, digested, xxh3):
    """As a training run saves checkpoints; to look at the model before it is trained is a first."""
    base = large_base()
    model = peftstate.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    for number in range(3):
        digested.clear()
        xxh3.clear()
        model.save_pretrained(tmp_path / str(number))
    frozen = [tensor for name, tensor in base.named_parameters() if "lora" not in name]
    large = [tensor for tensor in frozen if tensor.nbytes >= WORTH_IT]
    assert sorted(xxh3) == sorted(tensor.nbytes for tensor in large)
    assert len(large) > 10
    assert not {tuple(tensor.shape) for tensor in large} & set(digested)
    first, last = (peftstate.read_manifest(tmp_path / number) for number in "02")
    assert last.sections["base_model"] == first.sections["base_model"]


def test_a_save_sees_one_value(loaded, large_base):
    """One that no look falls on is in the manifest of the next save, by its name."""
    base, folder = loaded
    model = peftstate.PeftModel.from_pretrained(base, folder, is_trainable=False)
    model.get_base_model().get_input_embeddings().weight.data[5, 77] += 1
    model.save_pretrained(folder)
    saved = peftstate.read_manifest(folder).sections["base_model"]
    assert saved.changed == ("model.embed_tokens.weight",)
    loaded_again = peftstate.PeftModel.from_pretrained(large_base(), folder, is_trainable=False)
    now = loaded_again.get_base_model().get_input_embeddings().weight
    assert torch.equal(now, base.get_input_embeddings().weight)


def test_one_value_is_seen(loaded):
    """Written past torch, and to none of the places that a look falls on."""
    base, folder = loaded
    base.get_input_embeddings().weight.data[5, 77] += 1
    assert is_refused(base, folder) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_a_merge_and_its_reversal_are_seen(loaded, size):
    """They round a few values, past torch's versions."""
    base, folder = loaded
    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0])
    model = peft.get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, size)
    model.merge_adapter()
    model.unmerge_adapter()
    base = bare(model)
    changed = {n for n, tensor in base.named_parameters() if not torch.equal(tensor, before[n])}
    assert changed
    assert is_refused(base, folder) == changed


def test_a_fused_optimizer_is_seen(loaded):
    """It writes past torch's versions, and the tensor is frozen again."""
    base, folder = loaded
    weight = base.get_input_embeddings().weight.requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0, fused=True)
    base(input_ids=torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    optimizer.step()
    weight.requires_grad_(requires_grad=False)
    assert is_refused(base, folder) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("form", ["dtype", "shape"])
def test_the_same_bytes_in_another_form_are_seen(loaded, form):
    """Which are other values."""
    base, folder = loaded
    weight = base.get_input_embeddings().weight
    weight.data = weight.data.view(torch.float16 if form == "dtype" else (256, 512))
    assert "model.embed_tokens.weight" in is_refused(base, folder)


def test_the_digest_is_the_same():
    """The first time, the second, from memory, in another object, and of what is strided."""
    tensor = torch.rand(300, 400)
    expected = digest(tensor)
    assert [remembered_digest(tensor) for _ in range(4)] == [expected] * 4
    assert remembered_digest(tensor.clone()) == expected
    assert [remembered_digest(tensor.T) for _ in range(3)] == [digest(tensor.T)] * 3
    half = digest(tensor, "float16")
    assert [remembered_digest(tensor, "float16") for _ in range(3)] == [half] * 3


def test_bytes_that_change_while_they_are_read_are_not_remembered(monkeypatch):
    """Or what they were before would pass for what they became."""
    tensor = torch.rand(300, 400)
    before = tensor.clone()
    expected = digest(before)
    remembered_digest(tensor)

    def and_change(data):
        tensor[0, 0] += 1
        return digest(data)

    with monkeypatch.context() as patch:
        patch.setattr(_remembered, "digest", and_change)
        remembered_digest(tensor)
    tensor.copy_(before)
    assert remembered_digest(tensor) == expected


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch):
    """Then it begins anew."""
    monkeypatch.setattr(_remembered, "_MOST", 4)
    tensors = [torch.full((WORTH_IT,), number, dtype=torch.uint8) for number in range(9)]
    for _ in range(3):
        for tensor in tensors:
            assert remembered_digest(tensor) == digest(tensor)
            assert len(_remembered._met) <= 4
            assert len(_remembered._digests) <= 4
