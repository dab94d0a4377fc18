"""The models that PEFT's tests load from the Hub, made on the spot: tiny, and of the same names.

They have the architectures of the models on the Hub and random weights, in the layout of the Hub's
cache, where `from_pretrained` finds them offline. What a test would need beyond that (trained
weights, a data set, what the Hub's API says) is not there: such tests fail with PEFT's classes,
too, so that they say nothing.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import attrs
import peft
import torch
import transformers

from tests._tokenizers import make_tokenizer

VOCABULARY = 1024
COMMIT = "0" * 40

_LLAMA_LIKE = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_BERT_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_OPT = {
    "hidden_size": 16,
    "ffn_dim": 4,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 512,
}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 5, "n_positions": 512}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "max_position_embeddings": 512,
}
_T5 = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 3, "num_heads": 4}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@attrs.frozen
class TinyModel:
    """A model to make.

    Attributes:
        model: The name of its class in transformers.
        config: The name of its config's class.
        fields: The config's fields, beyond those that all have.
        names: The names that it has on the Hub.
    """

    model: str
    config: str
    fields: dict[str, Any]
    names: tuple[str, ...]


MODELS = (
    TinyModel(
        "OPTForCausalLM",
        "OPTConfig",
        _OPT,
        ("peft-internal-testing/tiny-random-OPTForCausalLM",),
    ),
    TinyModel(
        "OPTForCausalLM",
        "OPTConfig",
        # as deep as the real one, and wide enough for bitsandbytes' kernels
        {
            **_OPT,
            "ffn_dim": 128,
            "hidden_size": 64,
            "num_hidden_layers": 12,
            "word_embed_proj_dim": 64,
        },
        ("facebook/opt-125m", "facebook/opt-350m", "peft-internal-testing/opt-125m"),
    ),
    TinyModel(
        "GPT2LMHeadModel",
        "GPT2Config",
        _GPT2,
        (
            "gpt2",
            "hf-internal-testing/tiny-random-gpt2",
            "openai-community/gpt2",
            "peft-internal-testing/tiny-random-GPT2LMHeadModel",
            "peft-internal-testing/tiny-random-gpt2",
        ),
    ),
    TinyModel(
        "GPTJForCausalLM",
        "GPTJConfig",
        {**_GPT2, "rotary_dim": 4},
        ("peft-internal-testing/tiny-random-GPTJForCausalLM",),
    ),
    TinyModel(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_BERT_LIKE},
        ("peft-internal-testing/tiny-random-GPTNeoXForCausalLM",),
    ),
    TinyModel(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 5, "n_head": 4},
        ("peft-internal-testing/tiny-random-BloomForCausalLM",),
    ),
    TinyModel(
        "LlamaForCausalLM",
        "LlamaConfig",
        _LLAMA_LIKE,
        (
            "hf-internal-testing/tiny-random-LlamaForCausalLM",
            "peft-internal-testing/tiny-random-LlamaForCausalLM",
            "trl-internal-testing/tiny-random-LlamaForCausalLM",
        ),
    ),
    TinyModel(
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**_LLAMA_LIKE, "num_labels": 2},
        ("trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",),
    ),
    TinyModel(
        "MistralForCausalLM",
        "MistralConfig",
        _LLAMA_LIKE,
        ("hf-internal-testing/tiny-random-MistralForCausalLM",),
    ),
    TinyModel(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_LLAMA_LIKE, **_EXPERTS},
        ("hf-internal-testing/Mixtral-tiny",),
    ),
    TinyModel(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _LLAMA_LIKE,
        (
            "Qwen/Qwen2-0.5B",
            "peft-internal-testing/tiny-dummy-qwen2",
            "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",
        ),
    ),
    TinyModel(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**_LLAMA_LIKE, "head_dim": 8},
        ("trl-internal-testing/tiny-Qwen3ForCausalLM",),
    ),
    TinyModel(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        ("hf-internal-testing/tiny-qwen3-moe", "trl-internal-testing/tiny-Qwen3MoeForCausalLM"),
    ),
    TinyModel(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_LLAMA_LIKE, **_EXPERTS, "head_dim": 8},
        ("trl-internal-testing/tiny-GptOssForCausalLM",),
    ),
    TinyModel(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
        },
        ("trl-internal-testing/tiny-Llama4ForCausalLM",),
    ),
    TinyModel(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LLAMA_LIKE, "head_dim": 8},
        ("hf-internal-testing/tiny-random-Gemma3ForCausalLM",),
    ),
    TinyModel(
        "BertModel",
        "BertConfig",
        _BERT_LIKE,
        (
            "hf-internal-testing/tiny-random-BertModel",
            "peft-internal-testing/tiny-random-BertModel",
        ),
    ),
    TinyModel(
        "BertForSequenceClassification",
        "BertConfig",
        _BERT_LIKE,
        ("peft-internal-testing/tiny-random-BertForSequenceClassification",),
    ),
    TinyModel(
        "RobertaModel",
        "RobertaConfig",
        _BERT_LIKE,
        ("peft-internal-testing/tiny-random-RobertaModel",),
    ),
    TinyModel(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT_LIKE,
        ("peft-internal-testing/tiny-random-RobertaForSequenceClassification",),
    ),
    TinyModel(
        "DebertaModel",
        "DebertaConfig",
        _BERT_LIKE,
        ("peft-internal-testing/tiny-random-DebertaModel",),
    ),
    TinyModel(
        "DebertaV2Model",
        "DebertaV2Config",
        _BERT_LIKE,
        ("peft-internal-testing/tiny-random-DebertaV2Model",),
    ),
    TinyModel(
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
        ("peft-internal-testing/tiny-random-BartForConditionalGeneration",),
    ),
    TinyModel(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "decoder_start_token_id": 0},
        (
            "google/flan-t5-small",
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
            "peft-internal-testing/tiny-random-t5",
        ),
    ),
    TinyModel(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_BART, "decoder_start_token_id": 1, "num_mel_bins": 16, "max_source_positions": 32},
        ("tiny/whisper",),
    ),
    TinyModel(
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 10,
            "hidden_sizes": [10, 20, 30, 40],
            "depths": [1, 1, 2, 1],
            "num_labels": 3,
        },
        ("peft-internal-testing/tiny-random-ResNetForImageClassification",),
    ),
)


@attrs.frozen
class Adapter:
    """A LoRA adapter to make, with PEFT alone: it has no manifest.

    Attributes:
        name: The name that it has on the Hub.
        base: The name of its base model, one of `MODELS`.
        auto_class: The auto class of transformers that the base model is loaded with.
        task: The task type; `None` if the config names the base model's class instead.
        fields: Further fields of the config.
        more_tokens: How many tokens the base model's embeddings are resized by.
    """

    name: str
    base: str
    auto_class: str
    task: str | None
    fields: dict[str, Any] = attrs.field(factory=dict)
    more_tokens: int = 0


_OPT_NAME = "peft-internal-testing/tiny-random-OPTForCausalLM"
_GPT2_NAME = "peft-internal-testing/tiny-random-gpt2"
ADAPTERS = (
    Adapter(
        "peft-internal-testing/tiny-OPTForCausalLM-lora",
        _OPT_NAME,
        "AutoModelForCausalLM",
        "CAUSAL_LM",
    ),
    Adapter(
        "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab",
        _OPT_NAME,
        "AutoModelForCausalLM",
        "CAUSAL_LM",
        more_tokens=2,
    ),
    Adapter(
        "peft-internal-testing/opt-125m-dummy-lora",
        "peft-internal-testing/opt-125m",
        "AutoModelForCausalLM",
        "CAUSAL_LM",
        {"init_lora_weights": False},
    ),
    Adapter(
        "peft-internal-testing/gpt2-lora-random", _GPT2_NAME, "AutoModelForCausalLM", "CAUSAL_LM"
    ),
    Adapter(
        "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora",
        "peft-internal-testing/tiny-random-t5",
        "AutoModelForSeq2SeqLM",
        "SEQ_2_SEQ_LM",
    ),
    Adapter(
        "peft-internal-testing/tiny_OPTForSequenceClassification-lora",
        _OPT_NAME,
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
    ),
    Adapter(
        "peft-internal-testing/tiny_OPTForQuestionAnswering-lora",
        _OPT_NAME,
        "AutoModelForQuestionAnswering",
        "QUESTION_ANS",
    ),
    Adapter(
        "peft-internal-testing/tiny_OPTForFeatureExtraction-lora",
        _OPT_NAME,
        "AutoModel",
        "FEATURE_EXTRACTION",
    ),
    Adapter(
        "peft-internal-testing/tiny_GPT2ForTokenClassification-lora",
        _GPT2_NAME,
        "AutoModelForTokenClassification",
        "TOKEN_CLS",
    ),
    Adapter(
        "peft-internal-testing/tiny-random-BertModel-lora",
        "peft-internal-testing/tiny-random-BertModel",
        "AutoModel",
        "FEATURE_EXTRACTION",
    ),
    Adapter(
        "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora",
        "tiny/whisper",
        "AutoModelForSpeechSeq2Seq",
        None,
        {"target_modules": ["q_proj", "v_proj"]},
    ),
)


def make(cache: Path) -> None:
    """Put the models into a cache of the Hub, unless they are there.

    Args:
        cache: The folder that ``HF_HUB_CACHE`` will name.
    """
    done = cache / "complete"
    if done.exists():
        return
    shutil.rmtree(cache, ignore_errors=True)
    for tiny in MODELS:
        for name in tiny.names:
            _save(tiny, _new_snapshot(cache, name))
    for adapter in ADAPTERS:
        _save_adapter(adapter, _new_snapshot(cache, adapter.name), cache)
    done.touch()


def _snapshot(cache: Path, name: str) -> Path:
    """The folder of a repo's files, in the layout of the Hub's cache."""
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


def _new_snapshot(cache: Path, name: str) -> Path:
    """The same, made, with a branch that points to it."""
    folder = _snapshot(cache, name)
    folder.mkdir(parents=True)
    branch = folder.parent.parent / "refs" / "main"
    branch.parent.mkdir()
    branch.write_text(COMMIT)
    return folder


def _save(tiny: TinyModel, folder: Path) -> None:
    """Make a model, and its tokenizer where it has one."""
    torch.manual_seed(0)
    text = "vocab_size" in vars(config := _config(tiny))
    model = getattr(transformers, tiny.model)(config)
    model.save_pretrained(folder)
    if text:
        make_tokenizer(size=VOCABULARY, model_max_length=512).save_pretrained(folder)


def _save_adapter(adapter: Adapter, folder: Path, cache: Path) -> None:
    """Make an adapter."""
    torch.manual_seed(0)
    source = _snapshot(cache, adapter.base)
    base = getattr(transformers, adapter.auto_class).from_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if adapter.more_tokens:
        # PEFT resizes the embeddings to what the tokenizer beside an adapter needs
        missing = VOCABULARY + adapter.more_tokens - len(tokenizer)
        tokenizer.add_tokens([f"<more-{number}>" for number in range(missing)])
        base.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(folder)
    config = peft.LoraConfig(r=4, task_type=adapter.task, **adapter.fields)
    model = peft.get_peft_model(base, config)
    config.base_model_name_or_path = adapter.base  # not the folder of this machine
    model.save_pretrained(str(folder))


def _config(tiny: TinyModel) -> Any:
    """A model's config."""
    cls = getattr(transformers, tiny.config)
    shared = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if tiny.config != "ResNetConfig":
        shared["vocab_size"] = VOCABULARY
    return cls(**{**shared, **tiny.fields})


if __name__ == "__main__":
    make(Path(sys.argv[1]))
