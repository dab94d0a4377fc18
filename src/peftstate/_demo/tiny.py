"""A causal language model that is made, trained and reloaded in seconds, without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

if TYPE_CHECKING:
    from pathlib import Path

SENTENCES = (
    "The harbour was quiet when the last boat came in with the tide.",
    "An old clock in the hall struck nine, and nobody looked up from the table.",
    "She kept the letters in a tin box, sorted by the colour of their stamps.",
    "When the rain stopped, the children ran out to look for snails on the wall.",
    "The baker opened the window so that the whole street could smell the bread.",
    "He wrote the number on his hand and forgot which door it belonged to.",
    "Two geese crossed the bridge as slowly as they could, and the bus waited.",
    "Nobody remembered who had planted the pear tree, but everyone ate from it.",
)


def tiny_checkpoint(directory: Path) -> str:
    """Make a small Llama with random weights and a tokenizer of its own, without any download.

    Returns:
        The folder, for `from_pretrained`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=alphabet,
        special_tokens=list(special.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    names = ["input_ids", "attention_mask"]  # transformers 4 would add token types
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=names, **special
    ).save_pretrained(directory)

    set_seed(0)
    # bitsandbytes quantizes in blocks of 64 and repacks rows in groups of 32.
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        # Ten times that of a model to be trained: logits as large as those of a trained one.
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return str(directory)
