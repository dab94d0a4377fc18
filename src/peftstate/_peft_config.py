"""What PEFT may not be made to do by the config of an adapter, which somebody else wrote.

PEFT imports modules that an adapter's config names: Megatron's for parallel layers
(`peft/tuners/lora/tp_layer.py::dispatch_megatron`), and the base model's for an auto class
(`peft/auto.py`, in newer versions from a list only).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from peftstate._diff import Json
from peftstate.errors import AdapterLoadError

_MEGATRON = "megatron.core"
LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")
"""The packages that newer versions of PEFT import a base model's class from
(`peft/auto.py::get_default_import_allowlist`)."""


def refuse_imports(config: Mapping[str, Json]) -> None:
    """Refuse an adapter whose config has PEFT import a module of its choice.

    Raises:
        AdapterLoadError: It has.
    """
    module = config.get("megatron_core")
    if config.get("megatron_config") and module != _MEGATRON:
        raise AdapterLoadError(
            "adapters",
            f"its config has PEFT import {str(module)[:80]!r} (megatron_core), and may name "
            f"{_MEGATRON!r} only. Do not load it unless you trust its author.",
        )


def refuse_base_class(config: Mapping[str, Json], allowed: Collection[str] | None) -> None:
    """Refuse an adapter whose config has an auto class import a package of its choice.

    Args:
        config: The adapter's config.
        allowed: The packages that the caller allows; by default `LIBRARIES`.

    Raises:
        AdapterLoadError: It has.
    """
    mapping = config.get("auto_mapping")
    if config.get("task_type") is not None or not isinstance(mapping, Mapping):
        return
    library = str(mapping.get("parent_library"))
    known = LIBRARIES if allowed is None else allowed
    if not any(library == name or library.startswith(f"{name}.") for name in known):
        raise AdapterLoadError(
            "base_model",
            f"the adapter's config has the base model's class imported from {library[:80]!r}. If "
            f"you trust its author, load the base model yourself and hand it to PeftModel, or pass "
            f"import_allowlist=[{library[:80]!r}] where PEFT has it.",
        )
