"""A: the adapter is not loaded, or not wholly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.fidelity._libraries import Library, Save
from benchmarks.fidelity._models import (
    IDS,
    V4,
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
from benchmarks.fidelity._outcome import EXACT, refused
from benchmarks.fidelity._situation import Situation
from peftstate.errors import BaseModelMismatchError, IntegrityError, SaveError

WEIGHTS = "adapter_model.safetensors"
MISSING = "missing adapter keys"
"""What PEFT warns of if keys of the adapter are not in the file."""
CLASSIFIER = base(auto_class="AutoModelForSequenceClassification", num_labels=5)
TIED = base(checkpoint="tied llama")
LLAVA = base(checkpoint="llava", auto_class="AutoModelForImageTextToText")
LANGUAGE = r".*language_model.*\.(q_proj|down_proj)"
NEW_ROWS = torch.tensor([[3, 66, 69]])


def saved_by(make_state: Callable[[Any], dict[str, torch.Tensor]]) -> Save:
    """A save with a state dict of the caller's, as trainers pass one."""

    def save(library: Library, model: Any, folder: Path) -> None:
        library.save(model, folder, state_dict=make_state(model))

    return save


def compiled(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of the model that `torch.compile` returned."""
    return {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}


def not_gathered(model: Any) -> dict[str, torch.Tensor]:
    """The state dict that DeepSpeed ZeRO-3 leaves on each rank."""
    return {name: torch.empty(0) for name in model.state_dict()}


def flat(model: Any) -> dict[str, torch.Tensor]:
    """A state dict of FSDP's flat shards, here of the one rank there is."""
    return {name: tensor.flatten() for name, tensor in model.state_dict().items()}


def rename_keys(folder: Path) -> None:
    """Have the file's keys be those of a compiled model, as some trainers write it."""
    tensors = load_file(folder / WEIGHTS)
    save_file({f"_orig_mod.{name}": value for name, value in tensors.items()}, folder / WEIGHTS)


def hidden_states(model: Any) -> dict[str, torch.Tensor]:
    """What comes out of the last layer, with or without a head after it."""
    with torch.no_grad():
        states = model.eval()(input_ids=IDS, output_hidden_states=True).hidden_states
    return {"hidden states": states[-1]}


def adapter_called_mlp(place: Place) -> Any:
    """A second adapter that has the name of a module."""
    model = trained(place.load(), lora())
    model.add_adapter("mlp", lora(target_modules=["v_proj"]))
    return model


def unfrozen(*names: str) -> Make:
    """A model of which parameters were trained that are no adapter's."""

    def build(place: Place) -> Any:
        model = adapted(place.load())
        for name in names:
            model.get_base_model().get_parameter(name).requires_grad_(requires_grad=True)
        return train(model)

    return build


def classifier(**fields: Any) -> Make:
    """A classifier whose head no checkpoint has."""
    labels = torch.tensor([1, 2])
    return lambda place: train(
        adapted(CLASSIFIER(place), lora(**fields)), input_ids=IDS, labels=labels
    )


def resized(make: Make = Place.load) -> Make:
    """A base model with embeddings of its own for new tokens."""

    def load(place: Place) -> Any:
        model = make(place)
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    return load


def new_tokens(place: Place) -> Any:
    """A model with new tokens, of a base that this machine cannot ask about."""
    model = resized()(place)
    model.config._name_or_path = model.name_or_path = "nobody/nothing"
    return train(adapted(model), input_ids=NEW_ROWS, labels=NEW_ROWS)


def llava_with_new_tokens(place: Place) -> Any:
    """A model of images and text with new tokens."""
    model = adapted(resized(LLAVA)(place), lora(target_modules=LANGUAGE))
    return train(model, input_ids=NEW_ROWS, labels=NEW_ROWS)


def new_rows(model: Any) -> dict[str, torch.Tensor]:
    """What a model computes of its new tokens."""
    return logits(model, input_ids=NEW_ROWS)


def untied(place: Place) -> Any:
    """A base model whose head is one of its own, near to the embeddings."""
    model = TIED(place)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.1)
    return model


def two_adapters(*active: str) -> Make:
    """A model with two adapters, of which some are active."""

    def build(place: Place) -> Any:
        model = trained(place.load())
        model.add_adapter("b", lora(target_modules=["v_proj"]))
        model.set_adapter("b")
        train(model)
        model.base_model.set_adapter(list(active))
        return model

    return build


def names_of_adapters(model: Any) -> dict[str, str]:
    """The adapters, and those that are active."""
    return {
        "active adapters": ", ".join(model.active_adapters),
        "adapters": ", ".join(model.peft_config),
    }


@contextmanager
def _trained_less(model: Any) -> Iterator[None]:
    """Have the adapter be what it was at an earlier step."""
    parameters = [p for name, p in model.named_parameters() if "lora_B" in name]
    for parameter in parameters:
        parameter.data *= 0.5
    yield
    for parameter in parameters:
        parameter.data *= 2


def save_again_as_bin(library: Library, model: Any, folder: Path) -> None:
    """Save in the new format, train on, and save in the old one over it."""
    with _trained_less(model):
        library.save(model, folder)
    library.save(model, folder, safe_serialization=False)


def save_beside_bin(library: Library, model: Any, folder: Path) -> None:
    """Save where an older `.bin` lies, and lose the new file in a copy."""
    library.save(model, folder)
    with _trained_less(model):
        library.save(model, folder / "older", safe_serialization=False)
    (folder / WEIGHTS).unlink()
    (folder / "older" / "adapter_model.bin").rename(folder / "adapter_model.bin")


SITUATIONS = (
    Situation(
        cause="A1",
        title="the file's keys begin with `_orig_mod.`, of `torch.compile`",
        build=trained_lora(),
        after_save=rename_keys,
        names=MISSING,
        ours=refused(IntegrityError, r"adapter_model\.safetensors"),
    ),
    Situation(
        cause="A1",
        title="saved with the `state_dict` of the compiled model",
        build=trained_lora(),
        save=saved_by(compiled),
        names=MISSING,
        ours=refused(SaveError, "state_dict= that was passed"),
    ),
    Situation(
        cause="A1",
        title="`get_peft_model` was called twice",
        build=lambda place: trained(adapted(place.load())),
        names=MISSING,
        ours=refused(SaveError, "wrapped by get_peft_model twice"),
    ),
    Situation(
        cause="A1",
        title="loaded onto `AutoModel`, trained on `AutoModelForCausalLM`",
        build=trained_lora(task_type=None),
        base=base(auto_class="AutoModel"),
        answers=hidden_states,
        names=MISSING,
        ours=refused(BaseModelMismatchError, "model_class: saved 'LlamaForCausalLM'"),
    ),
    Situation(
        cause="A2",
        title="another adapter is called `mlp`, as a module is",
        build=adapter_called_mlp,
        names=MISSING,
    ),
    Situation(
        cause="A3",
        title="a norm was unfrozen and trained",
        build=unfrozen("model.norm.weight"),
    ),
    Situation(
        cause="A3",
        title="the embeddings were unfrozen and trained",
        build=unfrozen("model.embed_tokens.weight"),
    ),
    Situation(
        cause="A4",
        title="a head that no checkpoint has, without `modules_to_save`",
        build=classifier(task_type=None),
        base=CLASSIFIER,
        names=r"score\.weight",
        # transformers 4 does not mark what it initialised
        ours=refused(BaseModelMismatchError, r"tensors\[score\.weight\]") if V4 else EXACT,
    ),
    Situation(
        cause="A4",
        title="a head that PEFT saves, since it knows the task",
        build=classifier(task_type="SEQ_CLS"),
        base=CLASSIFIER,
    ),
    Situation(
        cause="A5",
        title="new tokens; the base model's config cannot be reached at save",
        build=new_tokens,
        base=resized(),
        answers=new_rows,
        names="vocabulary was not modified",
    ),
    Situation(
        cause="A5",
        title="new tokens, and the base model is not resized on load",
        build=new_tokens,
        answers=new_rows,
        names="vocabulary was not modified",
    ),
    Situation(
        cause="A5",
        title="new tokens of a model of images and text: its config nests the vocabulary's size",
        build=llava_with_new_tokens,
        base=resized(LLAVA),
        answers=new_rows,
    ),
    Situation(
        cause="A6",
        title="loaded onto a base model whose head is no longer tied",
        build=trained_lora(TIED),
        base=untied,
        ours=refused(BaseModelMismatchError, "tied_embeddings: saved True"),
    ),
    Situation(
        cause="A6",
        title="`modules_to_save` of both tied weights, which come apart",
        build=trained_lora(TIED, modules_to_save=["embed_tokens", "lm_head"]),
        base=TIED,
    ),
    Situation(
        cause="A7",
        title="empty tensors, as ZeRO-3 leaves them",
        build=trained_lora(),
        save=saved_by(not_gathered),
        # what the oldest safetensors says of an empty tensor comes before our words
        ours=refused(SaveError, r"ZeRO-3|buffer length \(0\)"),
    ),
    Situation(
        cause="A7",
        title="flat shards, as FSDP hands them out",
        build=trained_lora(),
        save=saved_by(flat),
        ours=refused(SaveError, "shard of FSDP"),
    ),
    Situation(
        cause="A8",
        title="two adapters, the second active",
        build=two_adapters("b"),
        state=names_of_adapters,
    ),
    Situation(
        cause="A8",
        title="two adapters, both active",
        build=two_adapters("default", "b"),
        state=names_of_adapters,
    ),
    Situation(
        cause="A9",
        title="a stale `.bin` is there, and the saved `.safetensors` is lost",
        build=trained_lora(),
        save=save_beside_bin,
        ours=refused(IntegrityError, "found no file"),
    ),
    Situation(
        cause="A9",
        title="saved as `.bin` where an older `.safetensors` lies",
        build=trained_lora(),
        save=save_again_as_bin,
    ),
)
