"""Checkpoints of tiny base models with random weights, made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

_LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits as large as those of a trained model
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 16,
}


def _llama(**fields: Any) -> Any:
    """A Llama of dimensions that bitsandbytes quantizes and repacks."""
    # bitsandbytes casts biases while a model runs
    config = transformers.LlamaConfig(**{**_LLAMA, "attention_bias": True, **fields})
    return transformers.LlamaForCausalLM(config)


def _llama_with_another_head() -> Any:
    """The same Llama but for its head."""
    model = _llama()
    model.lm_head.weight.data *= 1.1
    return model


def _mixtral() -> Any:
    """A mixture of experts, whose weights are one tensor for all experts."""
    config = transformers.MixtralConfig(**_LLAMA, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def _llava() -> Any:
    """A model of images and text, whose config has the vocabulary's size in a part of it."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**_LLAMA),
        image_token_index=63,
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _t5() -> Any:
    """An encoder and a decoder that share their embeddings."""
    config_class: Any = transformers.T5Config  # typed without the fields of every config
    config = config_class(
        vocab_size=64,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _resnet() -> Any:
    """A classifier of images with batch norm."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], num_channels=3
    )
    return transformers.ResNetForImageClassification(config)


CHECKPOINTS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "tied llama": lambda: _llama(tie_word_embeddings=True),
    "newer llama": lambda: _llama(initializer_range=0.25),
    "llama with another head": _llama_with_another_head,
    "mixtral": _mixtral,
    "llava": _llava,
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**_BERT)),
    "t5": _t5,
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**_VISION)),
    "resnet": _resnet,
}
"""How each is made."""
