"""D: the numerics of the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch

from benchmarks.fidelity._elsewhere import versions, with_version
from benchmarks.fidelity._libraries import load_to_train
from benchmarks.fidelity._models import (
    IDS,
    NF4,
    Make,
    Place,
    adapted,
    base,
    logits,
    lora,
    train,
    trained,
    trained_lora,
)
from benchmarks.fidelity._outcome import refused, told
from benchmarks.fidelity._situation import Situation
from benchmarks.fidelity.causes_c import trainable
from peftstate.errors import AdapterMismatchError

MIXTRAL = base(checkpoint="mixtral")


def cast_to_bf16(place: Place) -> Any:
    """A model trained in nf4, its adapter in bf16, as TRL casts it."""
    model = adapted(place.load(NF4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return train(model)


def half_adapter(place: Place) -> Any:
    """An adapter that was made and trained in the half precision of its base model."""
    model = adapted(place.load("bf16"))
    return train(model.to(torch.bfloat16))


def adapter_dtypes(model: Any) -> dict[str, str]:
    """The dtypes of the adapter's tensors."""
    dtypes = {str(p.dtype) for name, p in model.named_parameters() if "lora_" in name}
    return {"adapter in": ", ".join(sorted(dtypes))}


def fp32_head(place: Place) -> Any:
    """A head trained in fp32 over a base model in bf16."""
    model = adapted(place.load("bf16"), lora(modules_to_save=["lm_head"]))
    model.get_base_model().lm_head.modules_to_save["default"].float()
    model.get_base_model().model.norm.float()
    return train(model)


def drop_rslora(folder: Path) -> None:
    """Drop a field of the config, as a version of PEFT that does not know it drops it."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["use_rslora"]
    path.write_text(json.dumps(config))


def vera(*, other_draw: bool = False) -> Make:
    """VeRA with projections that come from a seed, perhaps as another torch would draw them."""

    def build(place: Place) -> Any:
        config = peft.VeraConfig(
            r=4, target_modules=["q_proj"], save_projection=False, task_type="CAUSAL_LM"
        )
        model = adapted(place.load(), config)
        if other_draw:
            model.base_model.vera_A["default"].data *= 0.9
        return train(model)

    return build


def prompt(config: type[Any], **fields: Any) -> Make:
    """A prompt that layers compute."""
    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, **fields}
    return lambda place: trained(place.load(), config(**fields))


def has_run(kind: str) -> Make:
    """A quantized model that was evaluated before it is saved."""

    def build(place: Place) -> Any:
        model = trained(place.load(kind))
        logits(model)
        return model

    return build


def logits_in_train_mode(model: Any) -> dict[str, torch.Tensor]:
    """What a model computes in train mode, where bitsandbytes repacks nothing."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        return {"logits": model.train()(input_ids=IDS).logits}


experts = trained_lora(
    MIXTRAL,
    target_modules=["q_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    lora_dropout=0.0,
)
"""An adapter on the experts of a mixture, whose weights are parameters and not layers."""


SITUATIONS = (
    Situation(
        cause="D1",
        title="a bf16 adapter on an nf4 base model, as TRL trains it",
        build=cast_to_bf16,
        base=base(NF4),
        state=adapter_dtypes,
    ),
    Situation(
        cause="D1",
        title="a bf16 adapter on a bf16 base model",
        build=half_adapter,
        base=base("bf16"),
        state=adapter_dtypes,
    ),
    Situation(
        cause="D2",
        title="a head in `modules_to_save`, trained in fp32 over a bf16 base model",
        build=fp32_head,
        base=base("bf16"),
    ),
    Situation(
        cause="D3",
        title="`use_rslora` was dropped from the config",
        build=trained_lora(use_rslora=True),
        after_save=drop_rslora,
        ours=refused(AdapterMismatchError, r"config\.use_rslora: saved True"),
    ),
    Situation(
        cause="D4",
        title="VeRA without `save_projection`, drawn from its seed again",
        build=vera(),
    ),
    Situation(
        cause="D4",
        title="VeRA without `save_projection`, where the seed gives other numbers",
        build=vera(other_draw=True),
        names="relying on PRNG initialisation",
        ours=refused(AdapterMismatchError, "vera_A"),
    ),
    Situation(
        cause="D5",
        title="p-tuning, for inference",
        build=prompt(peft.PromptEncoderConfig, encoder_hidden_size=8),
    ),
    Situation(
        cause="D5",
        title="p-tuning, to go on with training",
        build=prompt(peft.PromptEncoderConfig, encoder_hidden_size=8),
        load=load_to_train,
        state=trainable,
    ),
    Situation(
        cause="D5",
        title="prefix tuning with a projection, to go on with training",
        build=prompt(peft.PrefixTuningConfig, encoder_hidden_size=8, prefix_projection=True),
        load=load_to_train,
        state=trainable,
    ),
    Situation(
        cause="D6",
        title="an nf4 model that was evaluated before the save",
        build=has_run(NF4),
        base=base(NF4),
    ),
    Situation(
        cause="D6",
        title="an nf4 model that was evaluated before the save, compared in train mode",
        build=has_run(NF4),
        base=base(NF4),
        answers=logits_in_train_mode,
    ),
    Situation(
        cause="D6",
        title="an int8 model that was evaluated before the save",
        build=has_run("int8"),
        base=base("int8"),
    ),
    Situation(
        cause="D7",
        title="an adapter on the experts of a mixture",
        build=experts,
        base=MIXTRAL,
    ),
    Situation(
        cause="D7",
        title="an adapter on experts, saved by a PEFT with another layout for them",
        build=experts,
        base=MIXTRAL,
        state=versions("peft"),
        saving=with_version("peft", "0.18.0"),
        ours=told(r"packages\.peft: saved '0\.18\.0'"),
    ),
)
