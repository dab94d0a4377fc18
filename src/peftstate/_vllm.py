"""What vLLM must be so that it serves an adapter as it was trained, and what it cannot serve.

vLLM takes an adapter's base model, dtype, quantization and tokenizer from its own command line.
What it lacks it refuses in part, and in part passes over: fields of a PEFT config that it does not
know, and embeddings that were saved with the adapter. The tables here are of vLLM 0.32; the paths
in the comments are those of its source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

import attrs

from peftstate.errors import NotServableError

if TYPE_CHECKING:
    from peftstate.manifest import Manifest
    from peftstate.sections.adapters import AdapterRecord
    from peftstate.sections.quantization import QuantizationRecord

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of ``--max-lora-rank`` (`vllm/config/lora.py::MaxLoRARanks`)."""
DTYPES = ("bfloat16", "float16", "float32")
"""Those of ``--dtype`` (`vllm/config/model.py::ModelDType`)."""
LORA_DTYPES = ("bfloat16", "float16")
"""Those of ``--lora-dtype`` but "auto", the base model's (`vllm/config/lora.py::LoRADType`)."""
PLAIN_INITS = ("eva", "gaussian", "lora_ga", "mica", "orthogonal")
"""Initialisations that leave the base model's weights as they are
(`vllm/lora/peft_helper.py::PEFTHelper._init_is_supported`)."""
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "auto-round": ("inc",),
    "awq": ("awq", "awq_marlin", "auto_awq"),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "fbgemm_fp8": ("fbgemm_fp8",),
    "fp8": ("fp8",),
    "fp_quant": ("fp_quant",),
    "gptq": ("gptq", "gptq_marlin", "auto_gptq"),
    "mxfp4": ("mxfp4", "gpt_oss_mxfp4"),
    "quark": ("quark",),
    "torchao": ("torchao",),
}
"""transformers' methods of quantization → what vLLM calls what it runs them with
(`vllm/model_executor/layers/quantization/__init__.py::QUANTIZATION_METHODS`)."""
BITSANDBYTES_PLUGIN = "vllm-bnb-plugin"
"""The package that bitsandbytes moved to, out of vLLM."""

_REFUSED: Mapping[str, str] = {
    # vllm/lora/peft_helper.py::PEFTHelper._validate_features refuses these
    "use_dora": "vLLM has no DoRA",
    "lora_bias": "vLLM has no biases in LoRA",
    "alora_invocation_tokens": "vLLM has no activated LoRA",
    "layer_replication": "vLLM cannot replicate layers",
    "use_bdlora": "vLLM has no block-diagonal LoRA",
    "use_qalora": "vLLM has no QALoRA",
    "modules_to_save": "vLLM takes no whole layers from an adapter of a language model",
    # and does not know these (PEFTHelper.from_dict drops them)
    "arrow_config": "vLLM has no Arrow",
    "kasa_config": "vLLM has no KaSA",
    "trainable_token_indices": "vLLM passes over trained tokens",
}
"""Fields of a LoRA config that must be empty, and why."""
_MERGE = "merge the adapter into the base model and serve that, or serve it with transformers"


@attrs.frozen(kw_only=True)
class Engine:
    """What an engine must be so that it computes what the manifest says.

    Attributes:
        rank: The highest rank of the adapter.
        dtype: Name of the dtype that the base model computes in.
        lora_dtype: Name of the adapter's dtype; `None` if vLLM cannot keep it, and takes the base
            model's.
        quantization: transformers' name of the method that the base model is quantized by.
        notes: What is not quite as recorded, in sentences.
    """

    rank: int
    dtype: str
    lora_dtype: str | None
    quantization: str | None
    notes: tuple[str, ...]


def needed(manifest: Manifest, path: str, *, has_bitsandbytes: bool = False) -> Engine:
    """What an engine must be to serve an adapter.

    Args:
        manifest: Its manifest.
        path: Where it lies, for errors.
        has_bitsandbytes: Whether vLLM has its plugin for bitsandbytes.

    Raises:
        NotServableError: vLLM cannot compute what the manifest says.
    """

    def refuse(field: str, reason: str) -> NoReturn:
        raise NotServableError(path, field, f"{reason}. To use it, {_MERGE}.")

    name, record = _own(manifest)
    for field, reason in _obstacles(manifest, name, record):
        refuse(field, reason)
    method = manifest.sections["quantization"].method
    if method == "bitsandbytes" and not has_bitsandbytes:
        raise NotServableError(
            path,
            "quantization.method",
            f"'bitsandbytes' is not part of vLLM since 0.32. Install {BITSANDBYTES_PLUGIN} where "
            "vLLM runs, and say so with --bitsandbytes-plugin.",
        )
    dtype = _dtype(manifest)
    if dtype not in DTYPES:
        refuse("dtype.base.default", f"vLLM computes in {', '.join(DTYPES)}, not in {dtype}")
    lora_dtype = manifest.sections["dtype"].adapters[name].default
    return Engine(
        rank=_highest_rank(record),
        dtype=dtype,
        lora_dtype=lora_dtype if lora_dtype in LORA_DTYPES else None,
        quantization=method,
        notes=tuple(_notes(manifest, name, dtype)),
    )


def _own(manifest: Manifest) -> tuple[str, AdapterRecord]:
    """The adapter that is in the manifest's own folder, which is the one that vLLM loads."""
    records: Mapping[str, AdapterRecord] = manifest.sections["adapters"].adapters
    return next((name, record) for name, record in records.items() if record.folder == ".")


def _obstacles(manifest: Manifest, name: str, record: AdapterRecord) -> Iterator[tuple[str, str]]:
    """The fields with values that vLLM cannot serve, and why."""
    adapters, base = manifest.sections["adapters"], manifest.sections["base_model"]
    where, kind = f"adapters.adapters.{name}", record.config.get("peft_type")
    if kind != "LORA":
        yield f"{where}.config.peft_type", f"vLLM serves LoRA only, and this is {kind}"
        return  # the other fields are LoRA's
    yield from ((f"{where}.{field}", reason) for field, reason in _of_adapter(record))
    if not adapters.enabled:
        yield "adapters.enabled", "the adapter was saved switched off; vLLM applies it"
    if len(adapters.active or ()) > 1:
        yield "adapters.active", "vLLM applies one adapter to a request, and several were active"
    if base.changed:
        reason = (
            f"{base.changed[0]}, one of {len(base.changed)}, is not as the base model's checkpoint "
            "has it, and vLLM loads the checkpoint"
        )
        yield "base_model.changed", reason
    yield from _of_quantization(manifest.sections["quantization"])


def _of_adapter(record: AdapterRecord) -> Iterator[tuple[str, str]]:
    """What of a LoRA adapter vLLM cannot serve, and why."""
    config = record.config
    for field, reason in _REFUSED.items():
        if config.get(field):
            yield f"config.{field}", reason
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        yield "config.init_lora_weights", f"{init!r} rewrites the base model's weights"
    if config.get("bias", "none") != "none":
        yield "config.bias", "vLLM takes no biases from an adapter"
    if record.embeddings_saved:
        # vllm/lora/utils.py::is_base_embedding_weights: they are skipped without a word
        yield "embeddings_saved", "vLLM passes over embeddings saved with an adapter"
    highest = _highest_rank(record)
    if highest > RANKS[-1]:
        yield "config.r", f"vLLM takes ranks up to {RANKS[-1]}, and this is {highest}"
    if not _is_scaled_by_config(record):
        yield "scaling", "it was set by hand, and vLLM computes it from the config"


def _of_quantization(quantization: QuantizationRecord) -> Iterator[tuple[str, str]]:
    """What of the base model's quantization vLLM cannot serve, and why."""
    method = quantization.method
    if method is not None and method not in FAMILIES:
        yield "quantization.method", f"vLLM has no {method!r}"
    elif method not in (None, "bitsandbytes") and not quantization.pre_quantized:
        reason = (
            f"the base model was quantized by {method!r} while it was loaded, and vLLM takes "
            "checkpoints that are quantized already"
        )
        yield "quantization.pre_quantized", reason


def _highest_rank(record: AdapterRecord) -> int:
    """The highest rank of the layers of a LoRA adapter."""
    return int(max([record.config["r"], *_pattern(record, "rank_pattern")]))


def _pattern(record: AdapterRecord, field: str) -> list[float]:
    """The values of a config's field that are for some layers only."""
    return list((record.config.get(field) or {}).values())


def _is_scaled_by_config(record: AdapterRecord) -> bool:
    """Whether each layer applies a factor that follows from the config.

    vLLM finds out which layer has which as PEFT does
    (`vllm/lora/peft_helper.py::PEFTHelper.get_rank_and_scaling`).
    """
    config, table = record.config, record.scaling
    power = 0.5 if config.get("use_rslora") else 1.0
    possible = [
        alpha / rank**power
        for alpha in (config["lora_alpha"], *_pattern(record, "alpha_pattern"))
        for rank in (config["r"], *_pattern(record, "rank_pattern"))
    ]
    found = {*table.exceptions.values(), *([] if table.default is None else [table.default])}
    return all(any(math.isclose(value, other) for other in possible) for value in found)


def _dtype(manifest: Manifest) -> str | None:
    """The dtype that the base model computes in; vLLM has one for all of it."""
    quantization: QuantizationRecord = manifest.sections["quantization"]
    usual: str | None = manifest.sections["dtype"].base.default
    if quantization.method != "bitsandbytes":
        return usual
    state, loaded = quantization.state.default, manifest.sections["base_model"].load_dtype
    return (state and state.compute_dtype) or loaded or usual


def _notes(manifest: Manifest, name: str, dtype: str) -> Iterator[str]:
    """What vLLM computes a little otherwise than the manifest says."""
    dtypes, adapters = manifest.sections["dtype"], manifest.sections["adapters"]
    held = manifest.sections["base_model"].tensors  # not what a config gives, such as frequencies
    exceptions = {value for key, value in dtypes.base.exceptions.items() if key in held}
    others = {dtypes.base.default, *exceptions} - {None, dtype}
    if others:
        yield (
            f"tensors of the base model were in {', '.join(sorted(others))}, too; "
            f"vLLM has all in {dtype}"
        )
    found = dtypes.adapters[name].default
    if found not in (None, dtype, *LORA_DTYPES):
        yield f"the adapter was in {found}; vLLM rounds it to {dtype}"
    if manifest.sections["quantization"].method == "bitsandbytes":
        yield "vLLM's plugin quantizes by its own settings; compare with `peftstate probe`"
    if adapters.merged:
        yield "the adapter was merged when it was saved; vLLM applies it unmerged"
    if manifest.sections["base_model"].remote_code:
        yield "the base model brings code of its own; vLLM runs it only with --trust-remote-code"
    beside = sorted(record.folder for record in adapters.adapters.values())
    if beside != ["."]:
        folders = ", ".join(folder for folder in beside if folder != ".")
        yield f"further adapters are in {folders}; vLLM loads each from its own folder"
