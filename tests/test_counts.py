"""What a save and a load cost in passes, reads and walks, which no timing would hold."""

from __future__ import annotations

import gc
from collections import Counter

import pytest

import peftstate
from benchmarks.performance._workloads import bare
from peftstate import _disk
from peftstate.sections import _ahead, _remembered, _tensors, _walk

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


@pytest.fixture
def counts(monkeypatch):
    """How often tensors are digested, by shape; files are read, by name; and models walked over."""
    counted = {"digested": Counter(), "read": Counter(), "walked": 0}
    digest, read, walk = _tensors.pieces_digest, _disk._read, _walk.sites

    def counting_digest(dtype, shape, data):
        counted["digested"][dtype, tuple(shape)] += 1
        return digest(dtype, shape, data)

    def counting_read(path, *arguments):
        counted["read"][path.name] += 1
        return read(path, *arguments)

    def counting_walk(model, adapters):
        counted["walked"] += 1
        return walk(model, adapters)

    monkeypatch.setattr(_tensors, "pieces_digest", counting_digest)
    monkeypatch.setattr(_disk, "_read", counting_read)
    monkeypatch.setattr(_walk, "sites", counting_walk)
    return counted


def kinds(model, *, of_adapter):
    """The dtypes and shapes of the tensors of a model's base, or of its adapters, with numbers."""
    found = Counter()
    for name, tensor in model.named_parameters():
        if ("lora_" in name) == of_adapter:
            found[str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)] += 1
    return found


def test_a_load_passes_over_the_base_once(load_base, with_lora, tmp_path, counts):
    """Each tensor of the base is digested once, each of the adapter when read and when in place."""
    with_lora(load_base("bf16")).save_pretrained(tmp_path)
    base = load_base("bf16")
    counts["digested"].clear()
    counts["read"].clear()
    counts["walked"] = 0
    model = peftstate.PeftModel.from_pretrained(base, tmp_path, is_trainable=False)
    base_kinds, adapter_kinds = (kinds(model, of_adapter=is_so) for is_so in (False, True))
    for kind, number in base_kinds.items():
        assert counts["digested"][kind] == number, kind
    for kind, number in adapter_kinds.items():
        assert counts["digested"][kind] == 2 * number, kind
    assert counts["read"] == {
        "adapter_config.json": 1,
        "adapter_model.safetensors": 1,
        "peftstate.json": 1,
        "peftstate.tensors": 1,
    }
    assert counts["walked"] <= 2


def test_tied_embeddings_are_read_once(tied_lm, load_base, with_lora, tmp_path, counts):
    """By a save, by a load, and by one that digests them meanwhile; they have two names."""
    model = with_lora(load_base("bf16", tied_lm))
    kind = "bfloat16", tuple(model.get_input_embeddings().weight.shape)
    number = kinds(model, of_adapter=False)[kind]
    names = set(peftstate.capture(model).sections["base_model"].tensors)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= names
    for large in (_ahead.LARGE, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_ahead, "LARGE", large)
            counts["digested"].clear()
            model.save_pretrained(tmp_path)
            assert counts["digested"][kind] == number
            peftstate.PeftModel.from_pretrained(load_base("bf16", tied_lm), tmp_path)
            assert counts["digested"][kind] == 2 * number


def test_a_third_load_onto_a_base_digests_nothing_but_the_adapter(
    load_base, with_lora, tmp_path, counts, monkeypatch
):
    """XXH3 reads the base model of earlier loads."""
    monkeypatch.setattr(_remembered, "WORTH_IT", 0)
    with_lora(load_base("bf16")).save_pretrained(tmp_path)
    base = load_base("bf16")
    for _ in range(3):
        counts["digested"].clear()
        counts["walked"] = 0
        model = peftstate.PeftModel.from_pretrained(base, tmp_path, is_trainable=False)
        adapter = kinds(model, of_adapter=True)
        base = bare(model)
    assert {kind: counts["digested"][kind] for kind in adapter} == {
        kind: 2 * number for kind, number in adapter.items()
    }
    assert not (kinds(base, of_adapter=False).keys() - adapter.keys()) & counts["digested"].keys()
    assert counts["walked"] <= 2


def test_a_further_adapter_passes_over_nothing_but_itself(load_base, with_lora, tmp_path, counts):
    """The second one on a base model digests no tensor of that."""
    with_lora(load_base("bf16")).save_pretrained(tmp_path)
    model = peftstate.PeftModel.from_pretrained(load_base("bf16"), tmp_path, is_trainable=False)
    adapter = kinds(model, of_adapter=True)
    counts["digested"].clear()
    counts["read"].clear()
    counts["walked"] = 0
    model.load_adapter(tmp_path, "second")
    assert {kind: counts["digested"][kind] for kind in adapter} == {
        kind: 2 * number for kind, number in adapter.items()
    }
    base = kinds(model, of_adapter=False).keys() - adapter.keys()
    assert not base & counts["digested"].keys()
    assert counts["read"]["adapter_model.safetensors"] == 1
    assert counts["walked"] <= 2


def test_garbage_is_not_looked_for_during_a_load(load_base, with_lora, tmp_path):
    """A load makes thousands of objects that stay; it would be done again and again."""
    with_lora(load_base("bf16")).save_pretrained(tmp_path)
    base = load_base("bf16")
    collections: Counter[str] = Counter()

    def count(phase: str, _: object) -> None:
        collections[phase] += 1

    gc.collect()
    gc.callbacks.append(count)
    try:
        model = peftstate.PeftModel.from_pretrained(base, tmp_path, is_trainable=False)
        model.load_adapter(tmp_path, "second")
    finally:
        gc.callbacks.remove(count)
    assert collections["start"] <= 2  # one after each, when the usual threshold holds again


def test_a_save_passes_over_the_base_once(load_base, with_lora, tmp_path, counts):
    """Each tensor of the base is digested once."""
    model = with_lora(load_base("bf16"))
    counts["digested"].clear()
    counts["walked"] = 0
    model.save_pretrained(tmp_path)
    for kind, number in kinds(model, of_adapter=False).items():
        assert counts["digested"][kind] == number, kind
    assert counts["walked"] <= 2
