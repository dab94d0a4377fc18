"""Values that the format allows and that no load may act upon, or not as they ask."""

from __future__ import annotations

from typing import Any

from benchmarks._hostile.case import Case, Edit, Make, both, section, with_config, with_tensor
from peftstate.errors import (
    AdapterLoadError,
    AdapterMismatchError,
    BaseModelMismatchError,
    DtypeMismatchError,
    GenerationConfigMismatchError,
    ImplementationMismatchError,
    IntegrityError,
    PredictionMismatchError,
    QuantizationMismatchError,
    RestoreError,
    TokenizerMismatchError,
    TrainingStateMismatchError,
)

EVIL = "evil_module"
"""A module that leaves a trace when it is imported."""
HUGE = 10**9


def _case(
    name: str, attacks: str, make: Make, error: type[Exception] | None, tells: str = ""
) -> Case:
    """A case that is loaded onto a base model."""
    return Case(name=name, attacks=attacks, make=make, error=error, tells=tells)


def _auto(
    name: str, attacks: str, make: Make, error: type[Exception] | None, tells: str = ""
) -> Case:
    """A case of which an auto class loads the base model, too."""
    return Case(name=name, attacks=attacks, make=make, error=error, tells=tells, by_auto=True)


def _set(where: str, **fields: Any) -> Make:
    """A section of which fields have other values."""
    return section(where, lambda record: record.update(fields))


def _generation(**fields: Any) -> Make:
    """A generation config with further fields."""
    return section("generation", lambda record: record["config"].update(fields))


def _base_config(**fields: Any) -> Make:
    """A base model's config with further fields."""
    return section("base_model", lambda record: record["config"].update(fields))


def _quantized(**fields: Any) -> Make:
    """A base model that is said to be quantized with a config."""
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, **fields}
    return _set("quantization", method="bitsandbytes", config=config, pre_quantized=False)


def _resized(rows: int) -> Edit:
    """Embeddings that are said to have been resized."""

    def edit(record: dict[str, Any]) -> None:
        record["tensors"]["model.embed_tokens.weight"]["shape"][0] = rows
        record["changed"] = sorted([*record["changed"], "model.embed_tokens.weight"])

    return edit


def _renamed(name: str) -> Make:
    """The adapter's name, wherever it stands."""

    def edit(record: dict[str, Any]) -> None:
        record["adapters"][name] = {**record["adapters"]["default"], "folder": "second"}

    return section("adapters", edit)


_TWICE = ["default"] * 50_000
_NAMES = [f"n{number}" for number in range(50_000)]
_LIKE_A_REGEX = "(a+)+$"

_IMPLEMENTATION = (
    _case(
        "attention from a kernel repo",
        "code from the Hub (CVE-2026-4372)",
        section("implementation", lambda r: r["attention"].update({"": "evil/kernel:attention"})),
        ImplementationMismatchError,
        "implementation.attention[]: saved 'evil/kernel:attention'",
    ),
    _case(
        "attention from kernels-community",
        "code from the Hub",
        section("implementation", lambda r: r["attention"].update({"": "kernels-community/x"})),
        ImplementationMismatchError,
        "implementation.attention[]",
    ),
    _case(
        "attention of a package that is not there",
        "the kernel that transformers downloads in its place",
        section("implementation", lambda r: r["attention"].update({"": "flash_attention_2"})),
        ImplementationMismatchError,
        "implementation.attention[]: saved 'flash_attention_2'",
    ),
    _case(
        "attention of a dunder",
        "getattr(config, …)",
        section("implementation", lambda r: r["attention"].update(__class__="eager")),
        ImplementationMismatchError,
        "implementation.attention.__class__",
    ),
    _case(
        "experts from a kernel repo",
        "code from the Hub",
        section("implementation", lambda r: r["experts"].update({"": "evil/kernel"})),
        ImplementationMismatchError,
        "implementation.experts[]",
    ),
    _case(
        "autocast of a dunder",
        "getattr(torch, …)",
        _set(
            "implementation",
            autocast={"dtype": "__class__", "enabled": True, "cache_enabled": True},
        ),
        ImplementationMismatchError,
        "implementation.autocast",
    ),
    _case(
        "autocast in a dtype of integers",
        "a context that cannot be entered",
        _set("implementation", autocast={"dtype": "int8", "enabled": True, "cache_enabled": True}),
        ImplementationMismatchError,
        "implementation.autocast",
    ),
    _case(
        "a hook of os.system",
        "a function that is looked up by its name",
        _set("implementation", hooks={"model.norm": ["os.system"]}),
        None,
    ),
    _case(
        "kernels of a module",
        "an import",
        _set("implementation", kernels={"LlamaRMSNorm": EVIL}),
        None,
    ),
)

_STATE = (
    _case(
        "a dtype of a dunder",
        "getattr(torch, …)",
        section("dtype", lambda r: r["base"].update(default="__class__")),
        RestoreError,
        "dtype: the saved state could not be set",
    ),
    _case(
        "a dtype of integers",
        "weights that are rounded to nothing",
        section("dtype", lambda r: r["base"].update(default="int8")),
        DtypeMismatchError,
        "dtype.base",
    ),
    _case(
        "a dtype of 4 bits",
        "a cast that torch does not have",
        section("dtype", lambda r: r["base"].update(default="bits8")),
        DtypeMismatchError,
        "dtype.base",
    ),
    _case(
        "checkpointing of 50,000 modules",
        "time: each module with each name",
        _set("training", gradient_checkpointing=_NAMES),
        TrainingStateMismatchError,
        "training.gradient_checkpointing",
    ),
    _case(
        "50,000 shadowed tensors",
        "time: each tensor with each name",
        _set("base_model", shadowed=sorted(_NAMES)),
        None,
    ),
    _case(
        "an adapter active 50,000 times",
        "time: all layers for each",
        _set("adapters", active=_TWICE),
        AdapterMismatchError,
        "adapters.active",
    ),
    _case(
        "an adapter merged 50,000 times",
        "time, and weights that are added up",
        _set("adapters", merged=_TWICE),
        AdapterMismatchError,
        "adapters.merged",
    ),
    _case(
        "a second adapter that is not there",
        "a reader of folders",
        _renamed("second"),
        IntegrityError,
        "second",
    ),
    _case(
        "a quantized model",
        "a quantizer",
        _set(
            "quantization", method="awq", config={"quant_method": "awq", "trust_remote_code": True}
        ),
        QuantizationMismatchError,
        "quantization.method",
    ),
    _case(
        "environment variables",
        "the loader of the process",
        _set("runtime", variables={"LD_PRELOAD": "/evil.so", "PYTHONPATH": "/evil"}),
        None,
    ),
    _case(
        "flags of torch that are none",
        "setattr(torch.backends, …)",
        section("runtime", lambda r: r["flags"].update({"__class__": "evil", "cuda.matmul": 1})),
        None,
    ),
    _case("another environment", "a comparison", _set("environment", python="evil"), None),
)

_GENERATION = (
    _case(
        "a cache of a module",
        "a class that is looked up by its name",
        _generation(cache_implementation=f"{EVIL}.Cache"),
        GenerationConfigMismatchError,
        "generation.config.cache_implementation",
    ),
    _case(
        "a schedule that is a path",
        "a loader",
        _generation(num_assistant_tokens_schedule="/etc/passwd"),
        GenerationConfigMismatchError,
        "generation.config.num_assistant_tokens_schedule",
    ),
    _case(
        "custom generation",
        "code from the Hub",
        _generation(custom_generate="evil/generate", trust_remote_code=True),
        GenerationConfigMismatchError,
        "generation.config.custom_generate",
    ),
    _case(
        "a config of the compiler",
        "a back end that is imported",
        _generation(compile_config={"backend": EVIL}),
        GenerationConfigMismatchError,
        "generation.config.compile_config",
    ),
    _case(
        "a dunder in the generation config",
        "setattr(config, …)",
        _generation(__class__="os.system"),
        GenerationConfigMismatchError,
        "generation.config.__class__",
    ),
    _case(
        "a method in the generation config",
        "setattr(config, …)",
        _generation(save_pretrained="evil", to_dict=None, validate=1),
        GenerationConfigMismatchError,
        "generation.config.save_pretrained",
    ),
    _case(
        "a watermark of wrong types",
        "a constructor",
        _generation(watermarking_config={"ngram_len": "a", "keys": 1}),
        GenerationConfigMismatchError,
        "generation",
    ),
)

_BASE = (
    _case(
        "embeddings of a billion rows",
        "memory: 64 GB",
        section("base_model", _resized(HUGE)),
        RestoreError,
        "base_model: the saved state could not be set (ValueError: embeddings of 1000000000 rows",
    ),
    _case(
        "embeddings of -1 rows",
        "memory",
        section("base_model", _resized(-1)),
        RestoreError,
        "embeddings of -1 rows",
    ),
    _case(
        "a shape without numbers",
        "an index",
        both(
            section("base_model", _resized(1)),
            section(
                "base_model",
                lambda r: r["tensors"]["model.embed_tokens.weight"].update(shape=[]),
            ),
        ),
        RestoreError,
        "base_model",
    ),
    _case(
        "code for the base model",
        "a class that is imported",
        _base_config(auto_map={"AutoModelForCausalLM": f"{EVIL}.Model"}),
        None,
    ),
    _case(
        "remote code that is not there",
        "a file that is imported",
        _set("base_model", remote_code={f"{EVIL}.py": "0" * 64}),
        BaseModelMismatchError,
        "base_model.remote_code",
    ),
    _case(
        "a token id that is text",
        "what compares ids",
        _base_config(sep_token_id=0, eos_token_id=["__import__('os')"]),
        RestoreError,
        "the config's eos_token_id cannot be",
    ),
    _case(
        "a token id of 10**30",
        "an overflow",
        _base_config(pad_token_id=10**30),
        RestoreError,
        "the config's pad_token_id cannot be",
    ),
    _case(
        "a problem type of a module",
        "an import",
        _base_config(problem_type=EVIL),
        RestoreError,
        "the config's problem_type cannot be",
    ),
    _case(
        "a billion slices",
        "time",
        _base_config(pretraining_tp=HUGE),
        RestoreError,
        "the config's pretraining_tp cannot be",
    ),
    _case(
        "40,000 labels",
        "memory: a row of the head for each",
        _base_config(id2label={str(number): "x" for number in range(40_000)}),
        RestoreError,
        "the config's id2label cannot be",
    ),
    _case(
        "labels without numbers",
        "a conversion",
        _base_config(id2label={"__class__": "x"}),
        RestoreError,
        "base_model: the saved state could not be set",
    ),
)

_TOKENIZER = (
    _case(
        "a chat template called as a path",
        "the file that a later save writes it to",
        section("tokenizer", lambda r: r["chat_templates"].update({"../../evil": "payload"})),
        RestoreError,
        "'../../evil' cannot be the name of a chat template",
    ),
    _case(
        "a chat template called as an absolute path",
        "the file that a later save writes it to",
        section("tokenizer", lambda r: r["chat_templates"].update({"/evil": "payload"})),
        RestoreError,
        "'/evil' cannot be the name of a chat template",
    ),
    _case(
        "a chat template that runs code",
        "a template engine without a sandbox",
        section(
            "tokenizer",
            lambda r: r["chat_templates"].update(
                default="{{ ''.__class__.__mro__[1].__subclasses__() }}{% import 'evil' as e %}"
            ),
        ),
        TokenizerMismatchError,  # of the digest over its ids
        "tokenizer.template_ids",
    ),
    _case(
        "a side that is none",
        "setattr(tokenizer, …)",
        _set("tokenizer", padding_side="__class__"),
        TokenizerMismatchError,
        "tokenizer.padding_side",
    ),
    _case(
        "another class of tokenizer",
        "a class that is looked up by its name",
        _set("tokenizer", kind=f"{EVIL}.Tokenizer", size=1),
        TokenizerMismatchError,
        "tokenizer.",
    ),
)

_PROBE = (
    _case(
        "an input called self",
        "the arguments of forward",
        section("predictions", lambda r: r.update(inputs={"self": r["inputs"]["input_ids"]})),
        RestoreError,
        "predictions: the model could not be compared",
    ),
    _case(
        "an input that is a dunder",
        "the arguments of forward",
        section("predictions", lambda r: r.update(inputs={"__class__": r["inputs"]["input_ids"]})),
        RestoreError,
        "predictions: the model could not be compared",
    ),
    _case(
        "ids beyond the embeddings",
        "a read beyond the end",
        with_tensor("predictions.inputs.input_ids", lambda t: t + HUGE),
        RestoreError,
        "predictions: the model could not be compared",
    ),
    _case(
        "logits of another shape",
        "a comparison",
        with_tensor("predictions.logits", lambda t: t[:, :1]),
        PredictionMismatchError,
        "predictions.logits",
    ),
    _case(
        "logits that are no numbers",
        "a comparison that is never true",
        with_tensor("predictions.logits", lambda t: t * float("nan")),
        PredictionMismatchError,
        "predictions.",
    ),
)

_CONFIG = (
    _case(
        "Megatron from a module",
        "an import (megatron_core)",
        with_config(lambda c: c.update(megatron_config={"a": 1}, megatron_core=EVIL)),
        AdapterLoadError,
        f"its config has PEFT import '{EVIL}'",
    ),
    _case(
        "a run-time config",
        "how it is loaded",
        with_config(lambda c: c.update(runtime_config={"ephemeral_gpu_offload": True, "x": EVIL})),
        None,
    ),
    _case(
        "a base model elsewhere",
        "a path for a loader",
        with_config(lambda c: c.update(base_model_name_or_path="/etc", revision="../../evil")),
        None,
    ),
    _case(
        "a kind of adapter that is none",
        "a class that is looked up by its name",
        with_config(lambda c: c.update(peft_type=f"{EVIL}.Config")),
        AdapterLoadError,
        "PEFT does not take its config",
    ),
    _case(
        "a kind of adapter that is a list",
        "a table",
        with_config(lambda c: c.update(peft_type=[])),
        AdapterLoadError,
        "PEFT does not take its config",
    ),
    _case(
        "an argument called cls",
        "the call of a constructor",
        with_config(lambda c: c.update(cls=EVIL, self=EVIL)),
        AdapterLoadError,
        "PEFT does not take its config",
    ),
    _case(
        "a task that is none",
        "a class that is looked up by its name",
        with_config(lambda c: c.update(task_type=f"{EVIL}.Task")),
        AdapterLoadError,
        "task",
    ),
    _case(
        "a negative rank",
        "sizes",
        with_config(lambda c: c.update(r=-1)),
        AdapterLoadError,
        "adapters: the adapter could not be loaded",
    ),
    _case(
        "a rank that is text",
        "sizes",
        with_config(lambda c: c.update(r="8; import os")),
        AdapterLoadError,
        "adapters: the adapter could not be loaded",
    ),
    _case(
        "a pattern that is no pattern",
        "re.compile",
        with_config(lambda c: c.update(target_modules="(((")),
        AdapterLoadError,
        "adapters: the adapter could not be loaded",
    ),
)

_BY_AUTO = (
    _auto(
        "a base class from a module",
        "an import (auto_mapping)",
        with_config(
            lambda c: c.update(
                task_type=None,
                auto_mapping={"base_model_class": "Model", "parent_library": EVIL},
            )
        ),
        AdapterLoadError,
        f"has the base model's class imported from '{EVIL}'",
    ),
    _auto(
        "a dtype of a dunder, to load in",
        "getattr(torch, …)",
        _set("base_model", load_dtype="__class__"),
        RestoreError,
        "base_model: no base model can be loaded in the dtype '__class__'",
    ),
    _auto(
        "a revision that is a path",
        "a path in the Hub's cache",
        _set("base_model", revision="../../../evil"),
        RestoreError,
        "base_model: '../../../evil' is no revision",
    ),
    _auto(
        "a commit that is a path",
        "a path in the Hub's cache",
        _set("base_model", commit="/etc/passwd"),
        RestoreError,
        "base_model: '/etc/passwd' is no revision",
    ),
    _auto(
        "a quantization config with code",
        "arguments of a loader",
        _quantized(trust_remote_code=True),
        RestoreError,
        "quantization: the manifest's quantization config has trust_remote_code=True",
    ),
    _auto(
        "a quantization config with a class",
        "getattr(torch, …)",
        _quantized(bnb_4bit_compute_dtype="__class__"),
        RestoreError,
        "bnb_4bit_compute_dtype='__class__'",
    ),
    _auto(
        "modules that are a pattern",
        "time: a pattern that takes hours",
        _quantized(llm_int8_skip_modules=[_LIKE_A_REGEX]),
        RestoreError,
        "llm_int8_skip_modules=",
    ),
    _auto(
        "another method",
        "a quantizer",
        _set("quantization", method=EVIL, config={}, pre_quantized=False),
        RestoreError,
        f"quantized by '{EVIL}'",
    ),
    _auto(
        "attention from a kernel repo, to load with",
        "code from the Hub (CVE-2026-4372)",
        section("implementation", lambda r: r["attention"].update({"": "evil/kernel"})),
        ImplementationMismatchError,
        "implementation.attention[]",
    ),
    _auto(
        "arguments for the base model",
        "arguments of a loader",
        _base_config(
            trust_remote_code=True, code_revision="evil", auto_map={"AutoConfig": EVIL}, proxies={}
        ),
        None,
        "",
    ),
)

CASES = (
    *_IMPLEMENTATION,
    *_STATE,
    *_GENERATION,
    *_BASE,
    *_TOKENIZER,
    *_PROBE,
    *_CONFIG,
    *_BY_AUTO,
)
