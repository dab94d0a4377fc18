"""`implementation`: which code runs the model.

transformers chooses the implementation of attention and experts when it loads a model, and writes
it into no file; eager and sdpa attention differ in the last bits. Trainers leave more behind:
accelerate's autocast wrapper stays on `forward`, hooks stay on modules, kernels stay patched in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import attrs

from peftstate.errors import ImplementationMismatchError
from peftstate.sections._base import Section
from peftstate.sections._tensors import dtype_name, dtype_named

if TYPE_CHECKING:
    from torch import nn

    from peftstate.sections._view import ModelView

ATTENTION = frozenset(
    {
        "eager",
        "sdpa",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flex_attention",
    }
)
"""What a manifest may set. Names of kernel repositories are not among them: loading one runs code
from the Hub (CVE-2026-4372)."""
_AVAILABLE = {
    "flash_attention_2": "is_flash_attn_2_available",
    "flash_attention_3": "is_flash_attn_3_available",
    "flash_attention_4": "is_flash_attn_4_available",
}
"""transformers' functions that tell whether the package of an implementation can be used."""
KERNEL_LIBRARIES = frozenset({"kernels", "liger_kernel", "unsloth", "unsloth_zoo"})
"""Top-level packages that put their own `forward` into classes of transformers."""
AUTOCAST_DTYPES = frozenset({"bfloat16", "float16"})
"""What a manifest may have autocast compute in."""
_INPUT_HOOK = "enable_input_require_grads.<locals>.make_inputs_require_grads"
"""The hook of transformers that gradient checkpointing over a frozen embedding needs."""
_LISTENING = "transformers.utils.output_capturing."
"""Where the hooks are from that transformers leaves on layers whose outputs were once asked for
(``output_hidden_states=True``). They change nothing."""
EXPERTS = frozenset({"eager", "batched_mm", "grouped_mm"})
"""What a manifest may set for the experts of a mixture."""
_EAGER = "eager"


@attrs.frozen(kw_only=True)
class AutocastRecord:
    """accelerate's autocast wrapper (`accelerate/accelerator.py::prepare_model`).

    Attributes:
        dtype: Name of the dtype that it computes in.
        enabled: Whether it does so at all.
        cache_enabled: Whether casts of weights are kept while it is entered.
    """

    dtype: str
    enabled: bool
    cache_enabled: bool


@attrs.frozen(kw_only=True)
class ImplementationRecord:
    """Which code runs.

    Attributes:
        attention: Of the model's config and of each sub-config: ``""``, ``"text_config"`` →
            ``"sdpa"``.
        experts: The same for mixtures of experts. Eager ones, all that transformers had before
            version 5, are left out.
        autocast: The wrapper that accelerate left on the model's `forward`, or `None`. It changes
            what calling the model gives; `generate` goes round it.
        hooks: Forward hooks on modules of the base model, on PEFT's layers around them, and on
            what PEFT puts around the model: ``"model.embed_tokens"`` → names of functions.
        kernels: Classes whose `forward` a kernel library replaced: class → module of the function.
    """

    attention: Mapping[str, str]
    experts: Mapping[str, str]
    autocast: AutocastRecord | None
    hooks: Mapping[str, tuple[str, ...]]
    kernels: Mapping[str, str]


def _configs(config: Any) -> Iterator[tuple[str, Any]]:
    """A model's config, and its sub-configs by the name of their attribute."""
    yield "", config
    for name in sorted(getattr(config, "sub_configs", {})):
        inner = getattr(config, name, None)
        if inner is not None:
            yield name, inner


def is_installed(implementation: str) -> bool:
    """Whether an implementation of the closed tables runs without code from the Hub.

    transformers downloads a kernel in place of a package that is missing
    (`transformers/modeling_flash_attention_utils.py::FLASH_ATTN_KERNEL_FALLBACK`).
    """
    from transformers.utils import import_utils

    if implementation not in _AVAILABLE:
        return True
    is_available = getattr(import_utils, _AVAILABLE[implementation], None)
    return is_available is not None and bool(is_available())


def capture(view: ModelView) -> ImplementationRecord:
    """Read the implementations that are set."""
    config = getattr(view.base, "config", None)
    configs = list(_configs(config)) if config is not None else []

    def values(attribute: str) -> dict[str, str]:
        found = {name: getattr(inner, attribute, None) for name, inner in configs}
        return {name: value for name, value in found.items() if isinstance(value, str)}

    return ImplementationRecord(
        attention=values("_attn_implementation"),
        experts={
            name: value
            for name, value in values("_experts_implementation").items()
            if value != _EAGER
        },
        autocast=_autocast(view.model),
        hooks=_hooks(view),
        kernels=_kernels(view),
    )


def _autocast(model: nn.Module) -> AutocastRecord | None:
    """The autocast wrapper on a model's `forward`, found in the closures it is made of."""
    import torch

    forward = model.__dict__.get("forward")
    if forward is None or "_original_forward" not in model.__dict__:
        return None
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        for cell in getattr(function, "__closure__", None) or ():
            context = cell.cell_contents
            if isinstance(context, torch.autocast):
                return AutocastRecord(
                    dtype=dtype_name(context.fast_dtype),
                    enabled=bool(context._enabled),
                    cache_enabled=bool(context._cache_enabled),
                )
        forward = getattr(function, "model_forward", None) or getattr(function, "__wrapped__", None)
    return None


def _hooks(view: ModelView) -> dict[str, tuple[str, ...]]:
    """The forward hooks by the names of modules.

    That which makes inputs require gradients counts once: PEFT sets it when it prepares a model
    and again when it wraps it, which changes nothing.
    """
    found: dict[str, list[str]] = {}
    for name, module in _hooked(view):
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        functions = [_function_name(hook) for hook in hooks]
        names = [function for function in functions if not function.startswith(_LISTENING)]
        if names:
            found.setdefault(name, []).extend(names)
    return {name: _with_input_hook_once(names) for name, names in found.items()}


def _hooked(view: ModelView) -> Iterator[tuple[str, nn.Module]]:
    """The modules with forward hooks, but for those of adapters alone.

    A layer of PEFT goes by the name of the module that it is around, which has that hook before it
    is wrapped.
    """
    seen: set[int] = set()  # adapters share layers
    for site in view.sites():
        module, name = site.module, site.name if site.part != "adapter" else site.around
        has_hooks = module._forward_pre_hooks or module._forward_hooks
        if has_hooks and name is not None and id(module) not in seen:
            seen.add(id(module))
            yield name, module


def _with_input_hook_once(names: Sequence[str]) -> tuple[str, ...]:
    """The names of functions, that which makes inputs require gradients once and last."""
    others = [name for name in names if not name.endswith(_INPUT_HOOK)]
    return tuple(others + sorted(set(names) - set(others)))


def _function_name(function: Any) -> str:
    """The full name of a function, or of the class of a callable object."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _kernels(view: ModelView) -> dict[str, str]:
    """The classes in the base model whose `forward` comes from a kernel library."""
    found = {}
    for _, module in view.base_modules():
        forward = module.__dict__.get("forward", type(module).forward)
        home = getattr(getattr(forward, "__func__", forward), "__module__", "") or ""
        if home.partition(".")[0] in KERNEL_LIBRARIES:
            found[type(module).__name__] = home
    return found


def prepare(record: ImplementationRecord, view: ModelView) -> None:
    """Set the hook on the embedding itself, before a layer of PEFT may be around it."""
    _restore_input_hook(record, view)


def restore(record: ImplementationRecord, view: ModelView) -> None:
    """Set what can be set; implementations as far as they are of the closed tables."""
    _restore_functions(record, view)
    _restore_autocast(record, view.model)
    _restore_input_hook(record, view)


def _restore_input_hook(record: ImplementationRecord, view: ModelView) -> None:
    """Set or remove the hook that makes inputs require gradients."""
    saved, found = _has_input_hook(record.hooks), _has_input_hook(_hooks(view))
    if saved and not found and hasattr(view.base, "enable_input_require_grads"):
        view.base.enable_input_require_grads()
    if found and not saved:
        for _, module in _hooked(view):
            for key, hook in list(module._forward_hooks.items()):
                if _function_name(hook).endswith(_INPUT_HOOK):
                    del module._forward_hooks[key]


def _has_input_hook(hooks: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether the hook is there that makes inputs require gradients."""
    return any(name.endswith(_INPUT_HOOK) for names in hooks.values() for name in names)


def _restore_autocast(record: ImplementationRecord, model: Any) -> None:
    """Wrap `forward` as accelerate does, so that accelerate can unwrap it, or unwrap it."""
    import torch
    from accelerate.utils import convert_outputs_to_fp32
    from accelerate.utils.other import extract_model_from_parallel

    saved = record.autocast
    if saved == _autocast(model):
        return
    if _autocast(model) is not None:
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
    if saved is None or saved.dtype not in AUTOCAST_DTYPES:
        return
    context = torch.autocast(
        device_type=next(model.parameters()).device.type,
        dtype=dtype_named(saved.dtype),
        enabled=saved.enabled,
        cache_enabled=saved.cache_enabled,
    )
    forward = model.forward
    model._original_forward = forward
    if hasattr(forward, "__func__"):
        wrapped = convert_outputs_to_fp32(context(forward.__func__))
        model.forward = MethodType(wrapped, model)
    else:  # accelerate's hooks leave a partial function there
        model.forward = convert_outputs_to_fp32(context(forward))


def _restore_functions(record: ImplementationRecord, view: ModelView) -> None:
    """Set the implementations of attention and experts."""
    found = capture(view)
    configs = {**found.experts, **record.experts}
    saved_experts = {name: record.experts.get(name, _EAGER) for name in configs}
    live_experts = {name: found.experts.get(name, _EAGER) for name in configs}
    for saved, live, allowed, setter in (
        (record.attention, found.attention, ATTENTION, "set_attn_implementation"),
        (saved_experts, live_experts, EXPERTS, "set_experts_implementation"),
    ):
        wanted = {
            name: value
            for name, value in saved.items()
            if value in allowed and live.get(name, value) != value and is_installed(value)
        }
        if wanted and hasattr(view.base, setter):
            getattr(view.base, setter)(wanted)


SECTION = Section(
    name="implementation",
    record=ImplementationRecord,
    capture=capture,
    prepare=prepare,
    restore=restore,
    error=ImplementationMismatchError,
)
