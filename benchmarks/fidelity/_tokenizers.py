"""A tokenizer for the tiny models."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "The harbour was quiet when the last boat came in with the tide."
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


@functools.cache
def _byte_pairs(size: int) -> str:
    """A byte-level tokenizer, as the JSON of its file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    text: str = tokenizer.to_str()
    return text


def make_tokenizer(size: int = 290, **fields: Any) -> Any:
    """A tokenizer, as the base model's repository has it."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_pairs(size)), **SPECIAL, **fields
    )
