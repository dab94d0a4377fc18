"""B: the base model is loaded differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch

from benchmarks.fidelity._libraries import load_auto
from benchmarks.fidelity._models import (
    INT8,
    NF4,
    QLORA,
    Make,
    Place,
    adapted,
    base,
    logits,
    lora,
    quantization,
    train,
    trained,
    trained_lora,
)
from benchmarks.fidelity._outcome import refused
from benchmarks.fidelity._situation import Situation
from peftstate.errors import BaseModelMismatchError, QuantizationMismatchError

RESNET = base(checkpoint="resnet", auto_class="AutoModelForImageClassification")
IMAGES = torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32)
QUERY = "model.layers.0.self_attn.q_proj.weight"


def quantized(fields: dict[str, Any], **changes: Any) -> Make:
    """A base model that is quantized in a way."""
    return lambda place: place.load("bf16", quantization_config=quantization(fields, **changes))


def pre_quantized(place: Place) -> Any:
    """A base model from a quantized checkpoint, for which another compute dtype is asked."""
    folder = place.root / "quantized"
    if not folder.exists():
        place.load(NF4).save_pretrained(folder)
    config = quantization(QLORA, bnb_4bit_compute_dtype=torch.float16)
    return place.load("bf16", folder, quantization_config=config)


def prepared(place: Place) -> Any:
    """A base model that PEFT prepared for training in 4 bit."""
    return peft.prepare_model_for_kbit_training(place.load(NF4))


def with_other_weight(place: Place) -> Any:
    """A base model of which one value is another one."""
    model = place.load()
    model.model.norm.weight.data[7] += 1
    return model


def merged_into(place: Place) -> Any:
    """A base model that an earlier adapter was merged into."""
    return trained(place.load()).merge_and_unload()


def with_covariance(place: Place) -> Any:
    """An adapter that begins with the covariance of its inputs, which takes data."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model = place.load()
    config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    rows = torch.arange(3, 63).reshape(4, 1, 15)

    def run_model() -> None:
        for row in rows:
            logits(model, input_ids=row)

    preprocess_corda(model, config, run_model=run_model)
    return trained(model, config)


def other_eos(place: Place) -> Any:
    """A model that ends its texts with another token."""
    model = place.load()
    model.config.eos_token_id = 9
    return trained(model)


def config_of(*names: str) -> Callable[[Any], dict[str, Any]]:
    """Reads fields of the base model's config."""
    return lambda model: {name: getattr(model.config, name) for name in names}


def classifier_of_images(place: Place) -> Any:
    """A classifier with BatchNorm, trained."""
    model = adapted(RESNET(place), lora(target_modules=["convolution"], task_type=None))
    return train(model, pixel_values=IMAGES, labels=torch.tensor([0, 1, 1, 0]))


def merged(make_base: Make = Place.load, **fields: Any) -> Make:
    """A model whose adapter is merged."""

    def build(place: Place) -> Any:
        model = trained_lora(make_base, **fields)(place)
        model.merge_adapter()
        return model

    return build


def merged_and_unmerged(place: Place) -> Any:
    """A model whose adapter was merged for a while."""
    model = merged(base("bf16"))(place)
    model.unmerge_adapter()
    return model


def merged_adapters(model: Any) -> dict[str, str]:
    """The adapters that are merged."""
    layers = (getattr(module, "merged_adapters", ()) for module in model.modules())
    return {"merged": ", ".join(dict.fromkeys(name for names in layers for name in names))}


def _otherwise_quantized(title: str, reload_base: Make) -> Situation:
    """A model trained in nf4, loaded on a base model that is quantized in another way."""
    return Situation(
        cause="B1",
        title=f"trained in nf4, loaded {title}",
        build=trained_lora(base(NF4)),
        base=reload_base,
        ours=refused(QuantizationMismatchError, r"quantization\."),
    )


def _rewritten(init: str) -> Situation:
    """An initialisation that rewrites the base model, under another seed."""
    return Situation(
        cause="B6",
        title=f"`init_lora_weights='{init}'`, under another seed",
        build=trained_lora(init_lora_weights=init),
    )


def _merged(title: str, kind: str, **fields: Any) -> Situation:
    """A model that is saved while its adapter is merged."""
    return Situation(
        cause="B10",
        title=f"merged at save, {title}",
        build=merged(base(kind), **fields),
        base=base(kind),
        state=merged_adapters,
    )


SITUATIONS = (
    _otherwise_quantized("in bf16, not quantized", base("bf16")),
    _otherwise_quantized("in fp4", quantized(QLORA, bnb_4bit_quant_type="fp4")),
    _otherwise_quantized(
        "without double quantization", quantized(QLORA, bnb_4bit_use_double_quant=False)
    ),
    _otherwise_quantized("in int8", base("int8")),
    Situation(
        cause="B1",
        title="trained in int8, loaded with another outlier threshold",
        build=trained_lora(base("int8")),
        base=quantized(INT8, llm_int8_threshold=0.5),
        ours=refused(QuantizationMismatchError, "threshold"),
    ),
    Situation(
        cause="B1",
        title="trained in nf4, loaded with `AutoPeftModelForCausalLM`",
        build=trained_lora(base(NF4)),
        load=load_auto,
    ),
    Situation(
        cause="B1",
        title="trained in nf4, loaded with the same `BitsAndBytesConfig`",
        build=trained_lora(base(NF4)),
        base=base(NF4),
    ),
    Situation(
        cause="B2",
        title="a pre-quantized checkpoint overrides the config that is passed",
        build=trained_lora(pre_quantized),
        base=pre_quantized,
    ),
    Situation(
        cause="B3",
        title="`prepare_model_for_kbit_training` is not repeated",
        build=trained_lora(prepared),
        base=base(NF4),
    ),
    Situation(
        cause="B4",
        title="trained in fp32, loaded in bf16",
        build=trained_lora(base("fp32")),
        base=base("bf16"),
    ),
    Situation(
        cause="B4",
        title="trained in bf16, loaded in fp32",
        build=trained_lora(base("bf16")),
        base=base("fp32"),
    ),
    Situation(
        cause="B4",
        title="trained in fp32, loaded with `AutoPeftModelForCausalLM`",
        build=trained_lora(base("fp32")),
        load=load_auto,
    ),
    Situation(
        cause="B5",
        title="another revision of the base model: one value differs",
        build=trained_lora(),
        base=with_other_weight,
        ours=refused(BaseModelMismatchError, r"tensors\[model.norm.weight\]"),
    ),
    Situation(
        cause="B5",
        title="another model of the same architecture",
        build=trained_lora(),
        base=base(checkpoint="newer llama"),
        ours=refused(BaseModelMismatchError, r"tensors\["),
    ),
    Situation(
        cause="B5",
        title="trained on a base model that an earlier adapter was merged into",
        build=trained_lora(merged_into),
        ours=refused(BaseModelMismatchError, rf"tensors\[{QUERY}\]"),
    ),
    _rewritten("pissa"),
    _rewritten("pissa_niter_2"),
    _rewritten("olora"),
    Situation(
        cause="B6",
        title="`init_lora_weights='corda'`, which takes data",
        build=with_covariance,
    ),
    Situation(
        cause="B7",
        title="`config.eos_token_id` was edited",
        build=other_eos,
        state=config_of("eos_token_id"),
    ),
    Situation(
        cause="B7",
        title="another activation in the base model's config",
        build=trained_lora(),
        base=base(hidden_act="gelu"),
        ours=refused(BaseModelMismatchError, r"config\.hidden_act: saved 'silu'"),
    ),
    Situation(
        cause="B8",
        title="trained with eager attention, loaded with SDPA",
        build=trained_lora(base(attn_implementation="eager")),
        base=base(attn_implementation="sdpa"),
        state=config_of("_attn_implementation"),
    ),
    Situation(
        cause="B9",
        title="statistics of BatchNorm, which training changes",
        build=classifier_of_images,
        base=RESNET,
        answers=lambda model: logits(model, pixel_values=IMAGES),
    ),
    _merged("in fp32", "fp32"),
    _merged("in bf16", "bf16"),
    _merged("in nf4", NF4),
    _merged("embeddings among the targets", "fp32", target_modules=["q_proj", "embed_tokens"]),
    Situation(
        cause="B10",
        title="merged and unmerged in bf16, which rounds the base model's weights",
        build=merged_and_unmerged,
        base=base("bf16"),
        state=merged_adapters,
    ),
)
