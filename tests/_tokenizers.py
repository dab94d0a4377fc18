"""A tokenizer for the tiny models, trained on a few sentences, and a model for it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = (
    "The harbour was quiet when the last boat came in with the tide.",
    "An old clock in the hall struck nine, and nobody looked up from the table.",
    "When the rain stopped, the children ran out to look for snails on the wall.",
)
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}<eos>"
    "{% endfor %}"
)


@functools.cache
def _trained(size: int, sentences: tuple[str, ...]) -> str:
    """A byte-level BPE tokenizer, as the JSON of its file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    text: str = tokenizer.to_str()
    return text


def make_tokenizer(
    *, size: int = 300, sentences: tuple[str, ...] = SENTENCES, **fields: Any
) -> Any:
    """A new tokenizer of transformers: with the same arguments, an equal one."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(size, sentences)),
        **SPECIAL,
        **fields,
    )


def llama_for_text() -> Any:
    """A tiny model in bf16 with an embedding for each token, and a few more."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).bfloat16()
