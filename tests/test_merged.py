"""Adapters that are merged, mixed, scaled or switched off come back so, or the save says why not.

Merging rounds. A load merges into the weights that the checkpoint gives, in the saved order. Where
the weights in memory came about otherwise, the save warns, and keeps them on request.
"""

from __future__ import annotations

import inspect
import re
import typing
import warnings
from collections.abc import Callable
from typing import Any

import attrs
import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file, save_file

import peftstate
from peftstate.errors import (
    IntegrityError,
    MergedWeightsWarning,
    SaveError,
    StateMismatchError,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        ":peftstate.errors.TrainModeWarning",
        # of PEFT
        "Merge lora module to [48]-bit linear:UserWarning",
        "Unmerge lora module to [48]-bit linear:UserWarning",
        "Already unmerged. Nothing to do:UserWarning",  # of layers without the adapter
        "Already following adapters were merged:UserWarning",
    )
]

Q_PROJ = "model.layers.0.self_attn.q_proj"
KINDS = ("fp32", "bf16", "nf4", "int8")


@pytest.fixture
def make(load_base, with_lora):
    """Builds a model with two adapters, the same each time: `make(kind, **lora_config)`."""

    def make(kind: str = "bf16", **fields: Any) -> Any:
        torch.manual_seed(1)
        model = with_lora(load_base(kind), **fields)
        second = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **fields
        )
        model.add_adapter("second", second)
        return model.eval()

    return make


@pytest.fixture
def reload(load_base, tmp_path):
    """Loads what lies in the test's folder onto a fresh base: `reload(kind)`."""

    def run(kind: str = "bf16", **keywords: Any) -> Any:
        torch.manual_seed(12345)
        return peftstate.PeftModel.from_pretrained(load_base(kind), tmp_path, **keywords)

    return run


def warned(model: Any, folder: Any, **keywords: Any) -> str:
    """Save a model, and return what the save warned of; empty if of nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder, **keywords)
    texts = [str(item.message) for item in caught if item.category is MergedWeightsWarning]
    assert len(texts) <= 1
    return texts[0] if texts else ""


# What a load can merge again


@attrs.frozen
class History:
    """How a model came to be merged.

    Attributes:
        make: What was done.
        kinds: The kinds of base model on which it can be done.
        reason: What the save says; empty if a load can repeat it.
    """

    make: Callable[[Any], object]
    kinds: tuple[str, ...] = ("bf16", "nf4")
    reason: str = ""


def run(model: Any) -> None:
    """Run a model, which packs its 4-bit layers on some CPUs."""
    with torch.no_grad():
        model(input_ids=torch.arange(4, 16).reshape(2, 6))


def merge_after_forward(model: Any) -> None:
    """On a CPU that repacks 4-bit layers, PEFT takes the repacked ones as if they were not."""
    run(model)
    model.merge_adapter()


def merge_and_run(model: Any) -> None:
    """A merged model that was run, by which its 4-bit layers were repacked."""
    model.merge_adapter()
    run(model)


def merge_twice(model: Any) -> None:
    """Taking an adapter out again rounds."""
    model.merge_adapter()
    model.unmerge_adapter()
    model.merge_adapter()


def merge_after_a_change_of_dtype(model: Any) -> None:
    """Weights that were cast before, by which they lost nothing, for their file is in bf16."""
    model.to(torch.bfloat16)
    model.merge_adapter()


def merge_trained_weights(model: Any) -> None:
    """Weights under the adapter that were trained before."""
    layer = model.get_base_model().get_submodule(Q_PROJ)
    layer.base_layer.weight.data += 0.25
    model.merge_adapter()


def merge_partly_safe(model: Any) -> None:
    """One adapter with `safe_merge`, the other without."""
    model.merge_adapter(["default"], safe_merge=True)
    model.merge_adapter(["second"])


def merge_and_scale(model: Any) -> None:
    """A factor that was changed after the merge."""
    model.merge_adapter()
    model.get_base_model().get_submodule(Q_PROJ).set_scale("default", 3)


def merge_behind_our_back(model: Any) -> None:
    """Through the tuner, where nobody looked on."""
    model.base_model.merge_adapter()


def packs_when_run() -> bool:
    """Whether running a 4-bit layer changes what a merge starts from, on this machine."""
    from bitsandbytes import functional

    return bool(getattr(functional, "has_avx512bf16", bool)())


CHANGED = "the weights that it was merged into were not those of the checkpoint any more"
ROUNDED = "it was merged and unmerged before, which rounds"
UNKNOWN = (
    "how that was done is not known (before the model was attached, or not by its own "
    "merge_adapter())"
)
EDITED = "the merged weights or the adapter were changed afterwards"
HISTORIES = {
    "merged": History(lambda model: model.merge_adapter(), KINDS),
    "merged safely": History(lambda model: model.merge_adapter(safe_merge=True)),
    "both merged": History(lambda model: model.merge_adapter(["default", "second"])),
    "both merged in another order": History(
        lambda model: model.merge_adapter(["second", "default"]), KINDS
    ),
    "both merged safely": History(
        lambda model: model.merge_adapter(["second", "default"], safe_merge=True)
    ),
    "one after the other": History(
        lambda model: (model.merge_adapter(["second"]), model.merge_adapter(["default"]))
    ),
    "merged and run": History(merge_and_run),
    "scaled and merged": History(
        lambda model: (
            model.get_base_model().get_submodule(Q_PROJ).set_scale("default", 3),
            model.merge_adapter(),
        )
    ),
    "run and merged": History(merge_after_forward, ("fp32", "bf16", "int8")),
    "run, which packs, and merged": History(
        merge_after_forward, ("nf4",), CHANGED if packs_when_run() else ""
    ),
    "merged after a cast": History(merge_after_a_change_of_dtype, ("fp32",)),
    "merged, unmerged, merged": History(merge_twice, KINDS, ROUNDED),
    "trained weights merged": History(merge_trained_weights, ("fp32", "bf16"), CHANGED),
    "merged partly safely": History(
        merge_partly_safe, reason="it was merged in part with safe_merge, in part without"
    ),
    "merged and scaled": History(merge_and_scale, reason=EDITED),
    "merged by the tuner": History(merge_behind_our_back, reason=UNKNOWN),
}
CASES = [(name, kind) for name, history in HISTORIES.items() for kind in history.kinds]


@pytest.mark.parametrize(
    ("name", "kind"), [case for case in CASES if not HISTORIES[case[0]].reason]
)
def test_merged_again(  # noqa: PLR0917 - fixtures
    make, reload, logits, tmp_path, name, kind
):
    """A merge into the checkpoint's weights is repeated, without a word, in the same order."""
    model = make(kind)
    HISTORIES[name].make(model)
    expected = logits(model)
    assert warned(model, tmp_path) == ""
    assert torch.equal(logits(model), expected)
    loaded = reload(kind)
    assert torch.equal(logits(loaded), expected)
    layers = [found.get_base_model().get_submodule(Q_PROJ) for found in (model, loaded)]
    assert layers[0].merged_adapters == layers[1].merged_adapters
    assert warned(loaded, tmp_path) == ""  # and once more
    assert torch.equal(logits(reload(kind)), expected)


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if HISTORIES[case[0]].reason])
def test_warned_of(  # noqa: PLR0917 - fixtures
    make, reload, logits, tmp_path, name, kind
):
    """What a load may not repeat is warned of at the save; the load is exact, or it raises."""
    model = make(kind)
    HISTORIES[name].make(model)
    expected = logits(model)
    assert warned(model, tmp_path) == (
        f"The adapter is merged into the base model, and {HISTORIES[name].reason}. So it is not "
        "certain that merging it again on load gives these weights; if not, the load raises. Save "
        "with keep_merged_weights=True to keep the merged weights themselves, or call "
        "unmerge_adapter() first."
    )
    assert torch.equal(logits(model), expected)
    sections: set[str] = set()
    try:
        loaded = reload(kind)
    except StateMismatchError as error:
        sections = {mismatch.section for mismatch in error.mismatches}
    if sections:
        assert "base_model" in sections
    else:
        assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_merged_weights_are_kept(  # noqa: PLR0917 - fixtures
    make, reload, logits, tmp_path, name, kind
):
    """With `keep_merged_weights` the reload is exact, however the weights came about."""
    model = make(kind)
    HISTORIES[name].make(model)
    expected = logits(model)
    assert warned(model, tmp_path, keep_merged_weights=True) == ""
    loaded = reload(kind)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(loaded), expected)
    assert peftstate.verify(loaded, tmp_path).ok
    assert warned(loaded, tmp_path / "again", keep_merged_weights=True) == ""


def test_merged_in_part(make, tmp_path):
    """Some layers merged and others not is a state that PEFT has no setter for."""
    model = make()
    model.get_base_model().get_submodule(Q_PROJ).merge()
    message = (
        "The state of the model cannot be saved: an adapter is merged into some of its layers "
        "only; merge it into the others, too, by merge_adapter(), or call unmerge_adapter(). No "
        f"old file was replaced. What could be saved is in {tmp_path / 'a'}.rescued-0."
    )
    with pytest.raises(SaveError) as caught:
        model.save_pretrained(tmp_path / "a")
    assert str(caught.value) == message
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "a")


def test_merged_before_it_was_attached(make, reload, logits, tmp_path):
    """What happened before nobody saw, so the save says that it does not know."""
    model = make()
    model.__class__ = peft.PeftModelForCausalLM
    del model._peftstate_origin
    model.merge_adapter()
    peftstate.attach(model)
    assert UNKNOWN in warned(model, tmp_path)
    assert torch.equal(logits(reload()), logits(model))


def test_kept_weights_can_be_unmerged(make, reload, logits, tmp_path):
    """What comes out of a merge that was kept is what comes out of that in memory."""
    model = make()
    merge_twice(model)
    model.save_pretrained(tmp_path, keep_merged_weights=True)
    loaded = reload()
    for each in (model, loaded):
        each.unmerge_adapter()
    assert torch.equal(logits(loaded), logits(model))


def test_kept_weights_that_were_damaged(make, reload, tmp_path):
    """They are checked like everything in the sidecar."""
    model = make("nf4")
    merge_twice(model)
    model.save_pretrained(tmp_path, keep_merged_weights=True)
    sidecar = tmp_path / "peftstate.tensors"
    tensors = load_file(sidecar)
    name = f"quantized.{Q_PROJ}.data"
    tensors[name] = tensors[name].clone()
    tensors[name][0] ^= 1
    save_file(tensors, sidecar)
    with pytest.raises(IntegrityError, match=r"peftstate\.tensors"):
        reload("nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_unmerged_weights_are_saved(make, reload, logits, tmp_path, kind):
    """Weights that an adapter was merged into and taken out of are others, and come back.

    4-bit ones are quantized again from the adapter's dtype, which the layer notes.
    """
    model = make(kind)
    model.merge_adapter()
    model.unmerge_adapter()
    expected = logits(model)
    assert warned(model, tmp_path) == ""
    assert torch.equal(logits(reload(kind)), expected)


@pytest.mark.parametrize("ends", ["packed", "unpacked"])
def test_unmerged_weights_that_were_repacked_are_saved(make, reload, logits, tmp_path, ends):
    """The scales of a 4-bit layer that has run are of the dtype that it was quantized from."""
    model = make("nf4")
    model.merge_adapter()
    model.unmerge_adapter()
    run(model)
    if ends == "unpacked":
        model.state_dict()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload("nf4")), logits(model))


def test_an_adapter_that_changes_nothing_is_merged_and_unmerged(load_base, with_lora, tmp_path):
    """4-bit weights are then the same, but quantized from the adapter's dtype."""
    model = with_lora(load_base("nf4"), init_lora_weights=True)
    model.merge_adapter()
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base("nf4"), tmp_path)
    layers = [each.get_base_model().get_submodule(Q_PROJ).base_layer for each in (model, loaded)]
    assert [layer.weight.quant_state.dtype for layer in layers] == [torch.float32] * 2
    loaded.save_pretrained(tmp_path / "again")
    assert peftstate.PeftModel.from_pretrained(load_base("nf4"), tmp_path / "again")


def test_trainers_that_merge_at_each_step_pay_once(make, monkeypatch):
    """The base model is digested before the first merge, not before each one."""
    from peftstate.sections import _origin

    model, seen = make(), []
    changed = _origin.changed
    monkeypatch.setattr(_origin, "changed", lambda *args: seen.append(1) or changed(*args))
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert len(seen) == 1


def test_a_merge_that_fails(make, monkeypatch):
    """It raises what PEFT raises; prompts have nothing to merge."""
    model = make()
    with pytest.raises((TypeError, ValueError), match="should be a list"):
        model.merge_adapter("default")
    prompts = peftstate.get_peft_model(
        make().unload(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(AttributeError, match="merge_adapter"):
        prompts.merge_adapter()


# Mixed, scaled, switched off


def weighted(combination_type: str, **fields: Any) -> dict[str, Any]:
    """What `add_weighted_adapter` takes beside the adapters."""
    return {"combination_type": combination_type, **fields}


COMBINATIONS = {
    "cat": weighted("cat"),
    "dare_linear": weighted("dare_linear", density=0.5),
    "dare_linear_svd": weighted("dare_linear_svd", density=0.5),
    "dare_ties": weighted("dare_ties", density=0.5),
    "dare_ties_svd": weighted("dare_ties_svd", density=0.5, majority_sign_method="frequency"),
    "linear": weighted("linear"),
    "magnitude_prune": weighted("magnitude_prune", density=0.5),
    "magnitude_prune_svd": weighted("magnitude_prune_svd", density=0.5),
    "svd": weighted("svd", svd_rank=3),
    "svd, clamped": weighted("svd", svd_rank=2, svd_clamp=0.9),
    "ties": weighted("ties", density=0.5),
    "ties_svd": weighted("ties_svd", density=0.5),
}


IS_OLD = peft.__version__.startswith("0.17.")
"""Whether this is the oldest PEFT, which mixes with negative weights only by an SVD, of which it
leaves tensors that it cannot save."""
NEGATIVE = [] if IS_OLD else [("linear", [1.5, -0.5])]


def test_every_combination_of_peft_is_here():
    """A way to mix adapters that PEFT gets anew must be looked at."""
    mix = inspect.signature(LoraModel.add_weighted_adapter).parameters["combination_type"]
    known = set(typing.get_args(mix.annotation)) or set(
        re.findall(r"`?([a-z_]+)`?", inspect.getdoc(LoraModel.add_weighted_adapter) or "")
    ) & {options["combination_type"] for options in COMBINATIONS.values()}
    assert known - {options["combination_type"] for options in COMBINATIONS.values()} == set()


@pytest.mark.parametrize("merges", [False, True], ids=["as it is", "merged"])
@pytest.mark.parametrize(
    ("name", "weights"),
    [*((name, [0.7, 0.3]) for name in COMBINATIONS), *NEGATIVE],
    ids=str,
)
def test_weighted_adapters(  # noqa: PLR0917 - fixtures
    make, reload, load_base, logits, tmp_path, name, weights, merges
):
    """An adapter that was mixed of others, by random draws too, comes back with these."""
    model = make()
    model.add_weighted_adapter(["default", "second"], weights, "mixed", **COMBINATIONS[name])
    model.set_adapter("mixed")
    model.eval()  # PEFT makes it with dropout on
    alone = logits(model)
    if merges:
        model.merge_adapter()
    expected = logits(model)
    if IS_OLD and "svd" in name:
        with pytest.raises(SaveError, match=r"call `\.contiguous\(\)`"):
            model.save_pretrained(tmp_path)
        return
    assert warned(model, tmp_path) == ""
    loaded = reload()
    assert torch.equal(logits(loaded), expected)
    if not merges:
        folder = tmp_path / "mixed"
        one = peftstate.PeftModel.from_pretrained(
            load_base("bf16"), folder, adapters=[], is_trainable=False
        )
        assert torch.equal(logits(one), alone)


CHANGES: dict[str, Callable[[Any], object]] = {
    "one active": lambda model: model.set_adapter("second"),
    "both active": lambda model: model.base_model.set_adapter(["second", "default"]),
    "both active in another order": lambda model: model.base_model.set_adapter(
        ["default", "second"]
    ),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "scale set": lambda model: [layer.set_scale("default", 0.3) for layer in layers_of(model)],
    "scaled": lambda model: [layer.scale_layer(0.3) for layer in layers_of(model)],
    "scaled and back": lambda model: [
        (layer.scale_layer(0.3), layer.unscale_layer()) for layer in layers_of(model)
    ],
    "frozen": lambda model: model.requires_grad_(requires_grad=False),
    "one trainable": lambda model: model.base_model.set_requires_grad("second", requires_grad=True),
    "for inference": lambda model: model.set_adapter("second", inference_mode=True),
    "inference mode": lambda model: setattr(model.peft_config["default"], "inference_mode", True),
}
if "inference_mode" not in inspect.signature(peft.PeftModel.set_adapter).parameters:
    del CHANGES["for inference"]
if not hasattr(LoraModel, "set_requires_grad"):
    del CHANGES["one trainable"]


def layers_of(model: Any) -> list[Any]:
    """The layers of LoRA that have the adapter ``default``."""
    return [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer) and "default" in module.scaling
    ]


def state_of(model: Any) -> dict[str, Any]:
    """What there is of an adapter beside its weights."""
    return {
        "active": model.active_adapters,
        "trainable": [name for name, value in model.named_parameters() if value.requires_grad],
        "inference": {name: config.inference_mode for name, config in model.peft_config.items()},
        "scaling": [layer.scaling for layer in layers_of(model)],
        "disabled": [layer.disable_adapters for layer in layers_of(model)],
    }


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
@pytest.mark.parametrize("name", CHANGES)
def test_adapters_that_were_changed_at_run_time(  # noqa: PLR0917 - fixtures
    make, reload, logits, tmp_path, name, kind
):
    """What was set on the live adapters comes back, none of which is in PEFT's files."""
    model = make(kind)
    CHANGES[name](model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = reload(kind)
    assert torch.equal(logits(loaded), expected)
    assert state_of(loaded) == state_of(model)


def test_disabled_in_part(make, reload, tmp_path):
    """Some layers disabled and others not, too, as after an adapter was added to a disabled one."""
    model = make()
    model.base_model.disable_adapter_layers()
    model.add_adapter("third", LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(SaveError) as caught:
        model.save_pretrained(tmp_path)
    assert str(caught.value) == (
        "The state of the model cannot be saved: adapters are disabled in some of their layers "
        "only; call disable_adapter_layers() or enable_adapter_layers() of the model's base_model, "
        "which do it in all. No old file was replaced. What could be saved is in "
        f"{tmp_path.with_name(f'{tmp_path.name}.rescued-0')}."
    )
    model.base_model.disable_adapter_layers()
    model.save_pretrained(tmp_path)
    assert all(layer.disable_adapters for layer in layers_of(reload()))


def test_a_save_within_disable_adapter(make, reload, load_base, logits, tmp_path):
    """The model comes back as the block has it: switched off."""
    model = make()
    with model.disable_adapter():
        model.save_pretrained(tmp_path)
    loaded = reload()
    assert torch.equal(logits(loaded), logits(load_base("bf16")))
    loaded.base_model.enable_adapter_layers()
    assert torch.equal(logits(loaded), logits(model))
