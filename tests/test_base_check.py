"""The large tensors of a base model are compared while it gets its adapter."""

from __future__ import annotations

import sys
import traceback
import warnings
from contextlib import nullcontext
from functools import partial

import peft
import pytest
import torch
import transformers

import peftstate
from peftstate import _loading, _models, _work, errors
from peftstate.sections import _ahead

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


@pytest.fixture
def all_large(monkeypatch):
    """Have every tensor be one that is compared meanwhile."""
    monkeypatch.setattr(_ahead, "LARGE", 0)


@pytest.fixture
def saved(load_base, with_lora, tmp_path):
    """The folder of an adapter of a base model in bf16."""
    with_lora(load_base("bf16")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def another(load_base):
    """The base model with one other value."""
    base = load_base("bf16")
    base.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    return base


def state(model):
    """What a load could leave behind."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "flags": [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
    }


def refusal(base, folder, error):
    """The text with which a load is refused, which leaves the base model alone."""
    before = state(base)
    with pytest.raises(error) as caught:
        peftstate.PeftModel.from_pretrained(base, folder)
    assert state(base) == before
    return str(caught.value)


def test_another_base_is_refused_in_the_same_words(saved, load_base, monkeypatch):
    """Whether a tensor was compared before or meanwhile is not to be seen."""
    before = refusal(another(load_base), saved, errors.BaseModelMismatchError)
    monkeypatch.setattr(_ahead, "LARGE", 0)
    meanwhile = refusal(another(load_base), saved, errors.BaseModelMismatchError)
    assert meanwhile == before
    assert "base_model.tensors[model.layers.0.mlp.up_proj.weight].digest" in before


@pytest.mark.parametrize("large", [_ahead.LARGE, 0])
def test_a_traceback_has_one_error(saved, load_base, monkeypatch, large):
    """That of the base model, however it was found out."""
    monkeypatch.setattr(_ahead, "LARGE", large)
    base = another(load_base)
    with pytest.raises(errors.BaseModelMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(base, saved)
    text = "".join(traceback.format_exception(caught.value))
    assert text.count("BaseModelMismatchError: ") == 1
    assert "RestoreError" not in text


@pytest.mark.usefixtures("all_large")
def test_all_differences_are_named(saved, load_base):
    """Where something else differs, too, the tensors are in the same error."""
    base = another(load_base)
    base.config.rms_norm_eps = 0.5
    text = refusal(base, saved, errors.BaseModelMismatchError)
    assert "rms_norm_eps" in text
    assert "up_proj" in text


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("fails", [False, True])
def test_threads_wait_as_long_as_before(saved, load_base, monkeypatch, fails):
    """Those that digest must not wait for Python's lock; after a load all is as it was."""
    usual, during, wrap = sys.getswitchinterval(), [], _models.wrap

    def wrapping(*args, **kwargs):
        during.append(sys.getswitchinterval())
        if fails:
            raise ValueError("does not fit")
        return wrap(*args, **kwargs)

    monkeypatch.setattr(_models, "wrap", wrapping)
    with pytest.raises(errors.AdapterLoadError) if fails else nullcontext():
        peftstate.PeftModel.from_pretrained(load_base("bf16"), saved)
    assert during == [pytest.approx(1e-4)]
    assert sys.getswitchinterval() == usual


@pytest.mark.usefixtures("all_large")
def test_an_adapter_that_another_base_cannot_take(saved, load_base, monkeypatch):
    """What fails on a base model that is not the saved one fails for that reason."""

    def fail(*_, **__):
        raise ValueError("does not fit")

    monkeypatch.setattr(_models, "wrap", fail)
    refusal(another(load_base), saved, errors.BaseModelMismatchError)
    text = refusal(load_base("bf16"), saved, errors.AdapterLoadError)
    assert text == "adapters: the adapter could not be loaded (ValueError: does not fit)"


@pytest.mark.usefixtures("all_large")
def test_a_base_that_changes_meanwhile_is_refused(saved, load_base, monkeypatch):
    """What was digested is what the adapter is put into."""
    monkeypatch.setattr(_ahead.Ahead, "agrees", lambda _: False)
    text = refusal(load_base("bf16"), saved, errors.RestoreError)
    assert text == "base_model: the base model changed while its adapter was loaded"


@pytest.mark.usefixtures("all_large")
def test_another_base_can_be_let_through(saved, load_base, logits):
    """`on_mismatch` makes a warning of it, as ever."""
    with pytest.warns(errors.StateMismatchWarning, match="up_proj"):
        model = peftstate.PeftModel.from_pretrained(
            another(load_base), saved, on_mismatch={"base_model": "warn"}
        )
    assert torch.isfinite(logits(model)).all()


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8"])
def test_the_same_base_loads_exactly(kind, load_base, with_lora, logits, tmp_path):
    """Also where quantized weights, and casts of the base model, are under way."""
    model = with_lora(load_base(kind))
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base(kind), tmp_path, is_trainable=False)
    assert torch.equal(logits(loaded), logits(model.eval()))


@pytest.fixture(params=["bf16", "nf4"])
def merged(request, load_base, with_lora, tmp_path):
    """The folder of an adapter that is merged, and what makes its base model."""
    model = with_lora(load_base(request.param)).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merge lora module to 4-bit linear")
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    return tmp_path, partial(load_base, request.param)


@pytest.mark.usefixtures("all_large")
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning")
@pytest.mark.parametrize("late", [False, True], ids=["another base", "a late failure"])
def test_a_merge_is_undone(merged, monkeypatch, late):
    """PEFT adds to the weights in place; the base model of a refused load has its own again."""
    folder, make_base = merged
    base = make_base()

    def fail(*_, **__):
        raise ValueError("at the very end")

    if late:
        monkeypatch.setattr(_loading, "compare_restored", fail)
    else:
        base.get_input_embeddings().weight.data[0, 0] += 1
    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    with pytest.raises(errors.AdapterLoadError if late else errors.BaseModelMismatchError):
        peftstate.PeftModel.from_pretrained(base, folder)
    after = dict(base.named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert before.keys() == after.keys()


class _Counting(torch.nn.Module):
    """Writes to a buffer that checkpoints hold whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.runs: torch.Tensor
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Count, and multiply."""
        self.runs += 1
        product: torch.Tensor = self.linear(x)
        return product


def _counting() -> torch.nn.Module:
    """The same model each time."""
    torch.manual_seed(0)
    return _Counting().eval()


@pytest.mark.usefixtures("all_large")
def test_a_forward_that_writes_to_the_model(tmp_path, monkeypatch):
    """The base model is compared as it was before predictions were, whichever thread does it."""
    monkeypatch.setattr(_work, "usable_cores", lambda: 1)
    config = peft.LoraConfig(target_modules=["linear"], init_lora_weights=False)
    model = peftstate.get_peft_model(_counting(), config).eval()
    model.save_pretrained(tmp_path, prediction_probe={"x": torch.ones(1, 8)})
    assert peftstate.PeftModel.from_pretrained(_counting(), tmp_path)


@pytest.mark.usefixtures("all_large")
def test_a_tensor_that_shares_memory_with_a_changed_one(tmp_path):
    """Merging into the one changes the other, so that both are compared before."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    base = partial(transformers.GPT2LMHeadModel.from_pretrained, tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False)
    model = peft.get_peft_model(base(), lora)
    model.merge_adapter()
    with pytest.warns(errors.MergedWeightsWarning):
        peftstate.attach(model.eval()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(errors.BaseModelMismatchError, match=r"lm_head\.weight"):
        peftstate.PeftModel.from_pretrained(base(), tmp_path / "adapter")
