"""The tensors of an adapter: those that PEFT saves, under the names of its file, and the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftstate.sections._view import ModelView
    from peftstate.sections._walk import TensorSite


@attrs.frozen(kw_only=True)
class AdapterTensors:
    """The tensors of one adapter in a model.

    Attributes:
        saved: Those in PEFT's file that are live tensors themselves, by their names in the file.
        computed: Those in PEFT's file that PEFT computes when it saves, such as a prompt's
            embedding, by their names in the file. What they are computed from is `unsaved`.
        unsaved: The adapter's live tensors that are not in PEFT's file, by their own names.
    """

    saved: dict[str, torch.Tensor]
    computed: dict[str, torch.Tensor]
    unsaved: dict[str, TensorSite]


def adapter_tensors(
    view: ModelView, saved: str, *, embeddings: bool, names: Collection[str] | None = None
) -> AdapterTensors:
    """Tell the tensors of an adapter apart.

    Args:
        view: The model.
        saved: The adapter's name in the manifest.
        embeddings: Whether PEFT's file has the embedding layers of the base model too.
        names: The names in the file; by default those that PEFT would write now.
    """
    if view.walked is None or embeddings or names is not None:
        return _tell_apart(view, saved, embeddings=embeddings, names=names)
    if saved not in view.walked.adapter_tensors:
        view.walked.adapter_tensors[saved] = _tell_apart(view, saved, embeddings=False, names=None)
    found: AdapterTensors = view.walked.adapter_tensors[saved]
    return found


def _tell_apart(
    view: ModelView, saved: str, *, embeddings: bool, names: Collection[str] | None
) -> AdapterTensors:
    """What `adapter_tensors` gives."""
    adapter = view.adapters[saved]
    found = None if names is None else tensors_of_lora(view, saved, names)
    if found is not None:
        return found
    sites = [site for site in view.tensors() if site.adapter == adapter]
    with at_rest(view.model, adapter):
        live = live_tensors(view.model)
        written = file_tensors(view.model, adapter, embeddings=embeddings, live=live)
    in_file = {name: tensor for name, tensor in written.items() if names is None or name in names}
    identities = {id(tensor) for tensor in (*live.values(), *(site.tensor for site in sites))}
    held = {id(tensor) for tensor in in_file.values()}
    return AdapterTensors(
        saved={name: tensor for name, tensor in in_file.items() if id(tensor) in identities},
        computed={name: tensor for name, tensor in in_file.items() if id(tensor) not in identities},
        unsaved={site.name: site for site in sites if id(site.tensor) not in held},
    )


def tensors_of_lora(view: ModelView, saved: str, names: Collection[str]) -> AdapterTensors | None:
    """What `adapter_tensors` gives of an adapter that needs nothing of PEFT's to tell them apart.

    Returns:
        The tensors; `None` if not all that is in the file are factors of LoRA in the model.
    """
    adapter = view.adapters[saved]
    by_name = {site.name: site for site in view.tensors() if site.adapter == adapter}
    if not by_name.keys() >= set(names) or not all(map(_is_of_lora, names)):
        return None
    return AdapterTensors(
        saved={name: by_name[name].tensor for name in sorted(names)},
        computed={},
        unsaved={name: site for name, site in by_name.items() if name not in names},
    )


def _is_of_lora(name: str) -> bool:
    """Whether a name is one that the walk gives as PEFT writes it: that of a factor of LoRA."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


@contextmanager
def at_rest(model: nn.Module, adapter: str) -> Iterator[None]:
    """Let PEFT look for the tensors of an adapter, or save it, without a trace in the model.

    To save a prompt it runs the layers that compute it
    (`peft/peft_model.py::PeftModel.get_prompt_embedding_to_save`): in train mode with the dropout
    of P-tuning's LSTM, and those of CPT scale their own weights each time.

    Args:
        model: A PEFT model.
        adapter: Name of the adapter in the model. Adaption prompts are put into the model.
    """
    encoders = getattr(model, "prompt_encoder", None)
    modules = [] if encoders is None else list(encoders.modules())
    flags = [(module, module.training) for module in modules]
    values = [(tensor, tensor.data) for module in modules[:1] for tensor in module.parameters()]
    try:
        for module in modules:
            module.training = False
        with _swapped_in(model, adapter):
            yield
    finally:
        for module, training in flags:
            module.training = training
        for tensor, data in values:
            tensor.data = data


def _swapped_in(model: Any, adapter: str) -> AbstractContextManager[None]:
    """Have an adaption prompt in the model: there is room for one, and none if it is disabled."""
    from peft.tuners.adaption_prompt import AdaptionPromptModel

    tuner = model.base_model
    if isinstance(tuner, AdaptionPromptModel) and hasattr(tuner, "_temporarily_active"):
        swapped: AbstractContextManager[None] = tuner._temporarily_active(adapter)
        return swapped
    return nullcontext()


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What ``model.state_dict()`` would hold, without calling it.

    `bitsandbytes.nn.Linear4bit._save_to_state_dict` unpacks a layer that has run on the CPU, which
    moves its values; nothing here touches a tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                tensors[prefix + leaf] = tensor
    return tensors


def file_tensors(
    model: nn.Module, adapter: str, *, embeddings: bool, live: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under the names of PEFT's file, the live ones where that is so.

    Args:
        model: A PEFT model.
        adapter: Name of the adapter in the model.
        embeddings: Whether the embedding layers of the base model are wanted.
        live: What `live_tensors` gives.
    """
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(
        model, state_dict=live, adapter_name=adapter, save_embedding_layers=embeddings
    )
    return dict(sorted(tensors.items()))
