"""A tokenizer for the tiny models, trained on a few sentences."""

from __future__ import annotations

import functools
from typing import Any

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
