"""C: modes, random numbers, and what is put around a model at run time."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.fidelity._libraries import PEFT, Library, load_to_train
from benchmarks.fidelity._models import IDS, SEED, Place, adapted, lora, train, trained_lora
from benchmarks.fidelity._outcome import refused, told
from benchmarks.fidelity._situation import Situation
from peftstate.errors import IntegrityError

WEIGHTS = "adapter_model.safetensors"
lora_model = trained_lora()


def not_in_train_mode(place: Place) -> Any:
    """An adapter put into a base model that is in eval mode: it alone is in train mode."""
    model = adapted(place.load())
    parameters = [p for name, p in model.named_parameters() if "lora_B" in name]
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    return model


def train_flags(model: Any) -> dict[str, tuple[str, ...]]:
    """The modules that are in train mode."""
    names = (name for name, module in model.named_modules() if module.training)
    return {"modules in train mode": tuple(names)}


def next_numbers(_: Any) -> dict[str, float]:
    """What the generators would draw next; nothing is drawn in fact."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = {
        "torch draws": round(float(torch.rand(1)), 4),
        "numpy draws": round(float(np.random.random()), 4),
        "python draws": round(random.random(), 4),
    }
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return drawn


def load_and_seed(library: Library, base: Callable[[], Any], folder: Path) -> Any:
    """Load, and seed as tutorials say, with the seed of the training."""
    model = library.load(base(), folder)
    if library is PEFT:
        transformers.set_seed(SEED)
    return model


def sampled(model: Any) -> dict[str, torch.Tensor]:
    """A text that a model samples."""
    with torch.no_grad():
        tokens = model.eval().generate(input_ids=IDS, max_new_tokens=8, do_sample=True)
    return {"tokens": tokens}


def set_generation(place: Place) -> Any:
    """A model whose way to generate was changed after training."""
    model = lora_model(place)
    model.generation_config.update(eos_token_id=[7, 9], max_new_tokens=5, repetition_penalty=1.3)
    return model


def generated(model: Any) -> dict[str, torch.Tensor]:
    """A text that a model generates as its generation config says."""
    with torch.no_grad():
        return {"tokens": model.eval().generate(input_ids=IDS, pad_token_id=0)}


def generation_config(model: Any) -> dict[str, Any]:
    """The generation config."""
    config = model.generation_config.to_dict()
    return {name: config[name] for name in config if name != "transformers_version"}


def with_autocast(place: Place) -> Any:
    """A model that a trainer ran in mixed precision, whose wrapper stays on `forward`."""
    model = lora_model(place)
    return accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def after_checkpointing(place: Place) -> Any:
    """A model that was trained with gradient checkpointing."""
    base = place.load()
    base.config.use_cache = False
    model = adapted(base)
    model.enable_input_require_grads()
    base.gradient_checkpointing_enable()
    train(model)
    base.disable_input_require_grads()
    return model


def checkpointing(model: Any) -> dict[str, Any]:
    """Whether layers compute their activations twice, and whether the cache is off."""
    layers = model.get_base_model().model.layers
    return {
        "gradient checkpointing": [layer.gradient_checkpointing for layer in layers],
        "use_cache": model.config.use_cache,
    }


def with_hook(place: Place) -> Any:
    """A model with a hook on its embeddings, as an interrupted training or a steering leaves it."""
    model = lora_model(place)
    embeddings = model.get_base_model().get_input_embeddings()
    embeddings.register_forward_hook(lambda _, __, output: output * 1.1)
    return model


def scaled(place: Place) -> Any:
    """A model whose adapter was scaled at run time."""
    model = lora_model(place)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3)
    return model


def disabled(place: Place) -> Any:
    """A model whose adapter is switched off."""
    model = lora_model(place)
    model.base_model.disable_adapter_layers()
    return model


def with_weighted(place: Place) -> Any:
    """A model whose active adapter was combined from two others."""
    model = lora_model(place)
    model.add_adapter("b", lora())
    model.set_adapter("b")
    train(model)
    model.add_weighted_adapter(["default", "b"], [0.7, 0.3], "mix", combination_type="linear")
    model.set_adapter("mix")
    return model


def partly_frozen(place: Place) -> Any:
    """A model of which a part of the adapter was frozen."""
    model = lora_model(place)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and "layers.0" in name:
            parameter.requires_grad_(requires_grad=False)
    return model


def trainable(model: Any) -> dict[str, tuple[str, ...]]:
    """The parameters that are trainable."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {"trainable tensors": tuple(names)}


def take_weights_of_another_step(folder: Path) -> None:
    """Copy the weights of a checkpoint of another step into a folder."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value * 0.5 for name, value in tensors.items()}, folder / WEIGHTS)


SITUATIONS = (
    Situation(
        cause="C1",
        title="all of the model is in train mode, loaded to go on with training",
        build=lora_model,
        load=load_to_train,
        state=train_flags,
    ),
    Situation(
        cause="C1",
        title="only the adapter is in train mode, loaded to go on with training",
        build=not_in_train_mode,
        load=load_to_train,
        state=train_flags,
    ),
    Situation(
        cause="C2",
        title="sampling goes on after the reload, seeded as for the training",
        build=lora_model,
        load=load_and_seed,
        state=next_numbers,
        answers=sampled,
    ),
    Situation(
        cause="C3",
        title="the generation config was changed",
        build=set_generation,
        state=generation_config,
        answers=generated,
    ),
    Situation(
        cause="C4",
        title="accelerate's autocast wrapper, which stays on `forward`",
        build=with_autocast,
    ),
    Situation(
        cause="C5",
        title="gradient checkpointing is on and `use_cache` off, loaded to go on with training",
        build=after_checkpointing,
        load=load_to_train,
        state=checkpointing,
    ),
    Situation(
        cause="C6",
        title="a hook on the embeddings",
        build=with_hook,
        ours=told(r"hooks\[model.embed_tokens\]"),
    ),
    Situation(
        cause="C7",
        title="the adapter was scaled with `set_scale`",
        build=scaled,
    ),
    Situation(
        cause="C7",
        title="the adapter is disabled",
        build=disabled,
    ),
    Situation(
        cause="C7",
        title="a weighted combination of two adapters is active",
        build=with_weighted,
        state=lambda model: {"active adapters": ", ".join(model.active_adapters)},
    ),
    Situation(
        cause="C8",
        title="a part of the adapter is frozen, loaded to go on with training",
        build=partly_frozen,
        load=load_to_train,
        state=trainable,
    ),
    Situation(
        cause="C9",
        title="the weights of a checkpoint of another step were copied into the folder",
        build=lora_model,
        after_save=take_weights_of_another_step,
        ours=refused(IntegrityError, r"adapter_model\.safetensors"),
    ),
)
