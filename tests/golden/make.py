"""Write the golden folders of the current schema: saves that every later release must load.

Run once per schema, right before the first release that writes it, with the oldest PEFT and
transformers (``make test-oldest`` makes the environment), since only newer ones read what they
write::

    .venv-oldest/bin/python tests/golden/make.py

Makes ``schema-<number>/<case>`` for each of `CASES` that is not there yet, and the base model that
they share. What is there is never written again: folders are added, not edited.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers

import peftstate
from peftstate.manifest import SCHEMA_VERSION

HERE = Path(__file__).parent
BASE = "base-llama"
IDS = torch.arange(4, 16).reshape(2, 6)
"""The inputs on which the saved models were run."""


def make_base(folder: Path) -> None:
    """Save the base model: as small as can be, of dimensions that bitsandbytes packs.

    It is in bf16, so that it holds the same values in whatever dtype it is loaded.
    """
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,  # logits as large as those of a trained model
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def _in_fp32(base: Path) -> Any:
    """The base model as it is, in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _in_nf4(base: Path) -> Any:
    """The base model as QLoRA has it."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=quantization
    )


def _with_head(base: Path) -> Any:
    """The base model under a new head."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, dtype=torch.float32
    )


def _lora(base: Any, **fields: Any) -> Any:
    """Wrap a base model with a LoRA that does something."""
    return peftstate.get_peft_model(base, _config(**fields))


def _config(**fields: Any) -> LoraConfig:
    """The config of a LoRA whose B is random: a new one is zero, and changes no logits."""
    known = {
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**known, **fields})


def _all_options() -> dict[str, Any]:
    """A tokenizer of one word an id, and a probe."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    words = [*special.values(), *(f"word{number}" for number in range(3, 64))]
    model = models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token=words[0])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.padding_side = "left"
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return {"tokenizer": fast, "prediction_probe": IDS}


def _causal_lm(base: Any) -> Any:
    """An adapter saved for inference, with what PEFT does not save: a trained norm, an edit."""
    model = _lora(base)
    model.get_base_model().model.norm.weight.data *= 1.25
    model.generation_config.temperature = 0.7
    return model.eval()


def _nf4_kbit(base: Any) -> Any:
    """A model after k-bit preparation, saved in the middle of the training.

    It has not been run, so that its layers are in the form that every machine can have.
    """
    return _lora(prepare_model_for_kbit_training(base)).train()


def _two_adapters(base: Any) -> Any:
    """A trained adapter and the reference that a preference trainer keeps beside it."""
    model = _lora(base)
    model.add_adapter("ref", _config(target_modules=["v_proj"]))
    return model.eval()


def _classifier(base: Any) -> Any:
    """A sequence classifier, whose new head is saved with the adapter."""
    return _lora(base, task_type="SEQ_CLS", modules_to_save=["score"]).eval()


@attrs.frozen
class Case:
    """What one golden folder holds.

    Attributes:
        load: Loads the base model from its folder, as somebody does who loads the adapter.
        wrap: Makes the model that is saved of it.
        options: Makes the arguments of ours that it is saved with.
    """

    load: Callable[[Path], Any]
    wrap: Callable[[Any], Any]
    options: Callable[[], dict[str, Any]] = dict


CASES = {
    "causal-lm": Case(_in_fp32, _causal_lm, _all_options),
    "nf4-kbit": Case(_in_nf4, _nf4_kbit),
    "two-adapters": Case(_in_fp32, _two_adapters),
    "classifier": Case(_with_head, _classifier),
}
"""The cases by the names of their folders."""


def logits(model: Any) -> torch.Tensor:
    """What a model says to `IDS` in eval mode, computed in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            output: torch.Tensor = model.eval()(input_ids=IDS).logits
    finally:
        torch.set_num_threads(threads)
    return output.float()


def make(case: str) -> None:
    """Save a case in the working directory, and beside it what the model says to `IDS`."""
    transformers.set_seed(1)
    model = CASES[case].wrap(CASES[case].load(Path(BASE)))
    model.save_pretrained(case, **CASES[case].options())
    safetensors.torch.save_file({"logits": logits(model)}, f"{case}.safetensors")


def main() -> None:
    """Make what is missing."""
    root = HERE / f"schema-{SCHEMA_VERSION}"
    root.mkdir(exist_ok=True)
    os.chdir(root)  # PEFT writes the base model's path into its files: a relative one
    if not Path(BASE).exists():
        transformers.set_seed(0)
        make_base(Path(BASE))
    for case in CASES:
        if not Path(case).exists():
            make(case)


if __name__ == "__main__":
    main()
