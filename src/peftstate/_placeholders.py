"""Adapters that PEFT makes without weights, for the file's own to be put in their place.

PEFT's loads make random weights, overwrite them, cast them to the base model's dtype, and go over
the whole model for the names of each. Where all of an adapter's weights are in its file, none of
that is needed: what `peft.PeftModel.from_pretrained` and `load_adapter` do beside it is here.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftConfig
from torch.nn import init
from torch.overrides import TorchFunctionMode

from peftstate._calls import calling_peft

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import nn

    from peftstate._diff import Json
    from peftstate._source import Source
    from peftstate.sections._view import ModelView

META = torch.device("meta")


def suffice(source: Source, base: ModelView, names: Collection[str]) -> bool:
    """Whether all that PEFT would draw or compute for the adapters is in their files.

    That holds for LoRA without any of its variants; what other tuners and the variants make beside
    the weights in the file is not to be had in this way. The names of the weights must not be in
    doubt, which an adapter's name that is in the names of modules makes them, and layers that have
    other names now; nor the device that each belongs to, where a base model is on several.

    Args:
        source: What was read.
        base: The base model by itself; adapters may be injected in it.
        names: The names of the adapters in the model.
    """
    modules = dict(base.base_modules())
    if hasattr(base.model, "hf_device_map") or any(
        f".{name}" in f".{path}{_AFTER_MODULES}" for path in modules for name in names
    ):
        return False
    parameters = (module._parameters.values() for module in modules.values())
    devices = {tensor.device for held in parameters for tensor in held if tensor is not None}
    if len(devices) != 1 or META in devices:
        return False
    records = source.manifest.sections["adapters"].adapters
    extra = source.manifest.sections["extra_tensors"].adapters
    return all(
        _is_plain_lora(files.config)
        and all(_layer_of(key) in modules for key in files.tensors)
        and not records[name].unsaved
        and not extra.get(name)
        for name, files in source.adapters.items()
    )


_AFTER_MODULES = ".base_model.lora_A.lora_B.lora_embedding_A.lora_embedding_B.weight.bias"
"""What else may stand in the name of a tensor of LoRA."""


def _layer_of(key: str) -> str | None:
    """The layer that a weight of LoRA is for; `None` of a bias or an embedding of the base model.

    PEFT may know another name for it (`_checkpoint_conversion_mapping`) where there is no such one.
    """
    layer, found, _ = key.removeprefix("base_model.model.").partition(".lora_")
    return layer if found else None


def _is_plain_lora(config: Mapping[str, Json]) -> bool:
    """Whether an adapter is LoRA without a variant, so that A and B are all it has."""
    if config.get("peft_type") != "LORA" or not isinstance(config.get("init_lora_weights"), bool):
        return False
    defaults = _defaults()
    return all(
        not value or value == defaults.get(key)
        for key, value in config.items()
        if key not in _OF_PLAIN_LORA
    )


@cache
def _defaults() -> Mapping[str, Json]:
    """The config of LoRA as PEFT has it if nothing is said."""
    defaults: Mapping[str, Json] = LoraConfig().to_dict()
    return defaults


_OF_PLAIN_LORA = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Fields of a config that make no variant of LoRA."""


class _OnMeta(TorchFunctionMode):
    """Makes tensors on the meta device, and draws no values for them, in this thread only.

    PEFT's `low_cpu_mem_usage` does the former by way of `nn.Module`, so that models which other
    threads make meanwhile have no weights either (`peft/utils/integrations.py::_init_on_device`).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS:
            return func(*args, **{**kwargs, "device": META})
        if func in _INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_MAKERS = frozenset({torch.empty, torch.ones, torch.rand, torch.randn, torch.zeros})
_INITIALISERS = frozenset({init.kaiming_uniform_, init.normal_, init.uniform_})
"""Of these, torch runs those that draw for the meta device in Python."""


@contextmanager
def _undrawn(config: Any) -> Iterator[None]:
    """Have PEFT not go through the initialisation of weights that are on the meta device."""
    initialisation = config.init_lora_weights
    config.init_lora_weights = False
    try:
        yield
    finally:
        config.init_lora_weights = initialisation


@contextmanager
def _made_on_meta(tuner: Any) -> Iterator[None]:
    """Have a tuner make layers on the meta device, and go over other adapters without the mode."""
    create, own = tuner._create_and_replace, vars(tuner).get("_create_and_replace")

    def creating(*args: Any, **kwargs: Any) -> None:
        with _OnMeta():
            create(*args, **kwargs)

    tuner._create_and_replace = creating
    try:
        yield
    finally:
        del tuner._create_and_replace
        if own is not None:
            tuner._create_and_replace = own


@cache
def _casts_added() -> bool:
    """Whether PEFT casts the weights that it adds, unless it is told not to; older ones do not."""
    return "autocast_adapter_dtype" in inspect.signature(peft.PeftModel.add_adapter).parameters


def wrap(base: nn.Module, config: PeftConfig, name: str, *, is_trainable: bool) -> peft.PeftModel:
    """Wrap a base model as `peft.PeftModel.from_pretrained` does.

    Args:
        base: The bare base model, of which `suffice` must hold.
        config: The adapter's config.
        name: The name that the adapter gets.
        is_trainable: As in PEFT.

    Returns:
        A model whose adapter is on the meta device.
    """
    config.inference_mode = not is_trainable
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", peft.PeftModel)
    with calling_peft(), _undrawn(config), _OnMeta():
        model = cls(base, config, name, autocast_adapter_dtype=False)
    return model if is_trainable else model.eval()


def add(model: peft.PeftModel, config: PeftConfig, name: str) -> Any:
    """Add an adapter for inference to a model as its `load_adapter` does.

    Args:
        model: The model, a LoRA one, of which `suffice` must hold.
        config: The adapter's config.
        name: The name that the adapter gets, a new one.

    Returns:
        What PEFT returns: the keys that are missing, and those that were not expected.
    """
    config.inference_mode = True
    with calling_peft(), _undrawn(config), _made_on_meta(model.base_model):
        model._check_new_adapter_config(config, is_trainable=False)
        options = {"autocast_adapter_dtype": False} if _casts_added() else {}
        peft.PeftModel.add_adapter(model, name, config, **options)
    model.eval()
    return torch.nn.modules.module._IncompatibleKeys([], [])
