"""Write the golden folders of the current schema: saves that every later release must load.

Run once per schema, in the environment of `constraints.txt`, right before the first release that
writes it::

    python tests/golden/make.py

Makes ``schema-<number>/<case>`` for each of `CASES` that is not there yet, and the base model that
they share. What is there is never written again: folders are added, not edited.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from peft import LoraConfig, prepare_model_for_kbit_training

import peftstate
from peftstate.manifest import SCHEMA_VERSION

HERE = Path(__file__).parent
BASE = "base-llama"
IDS = torch.arange(4, 16).reshape(2, 6)
"""The inputs on which the saved models were run."""


def make_base(folder: Path) -> None:
    """Save the base model: as small as can be, of dimensions that bitsandbytes repacks.

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


def load_base(case: str, root: Path) -> Any:
    """Load the base model of a case, as somebody does who loads its adapter.

    Args:
        case: One of `CASES`.
        root: The folder of the base model.
    """
    if case == "classifier":
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            root, num_labels=3, dtype=torch.float32
        )
    options: dict[str, Any] = {"dtype": torch.float32}
    if case == "nf4-kbit":
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options = {"dtype": torch.bfloat16, "quantization_config": quantization}
    return transformers.AutoModelForCausalLM.from_pretrained(root, **options)


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


def _causal_lm(base: Any) -> Any:
    """An adapter in fp32, saved for inference, with edits that PEFT does not save."""
    model = _lora(base)
    model.generation_config.temperature = 0.7
    return model.eval()


def _nf4_kbit(base: Any) -> Any:
    """A quantized base after k-bit preparation, saved in the middle of the training.

    It has not been run, so that its layers are in the form that every machine can have.
    """
    model = _lora(prepare_model_for_kbit_training(base))
    return model.train()


def _two_adapters(base: Any) -> Any:
    """A trained adapter and the reference that a preference trainer keeps beside it."""
    model = _lora(base)
    model.add_adapter("ref", _config(target_modules=["v_proj"]))
    return model.eval()


def _classifier(base: Any) -> Any:
    """A sequence classifier, whose fresh head is saved with the adapter."""
    return _lora(base, task_type="SEQ_CLS", modules_to_save=["score"]).eval()


CASES: dict[str, Callable[[Any], Any]] = {
    "causal-lm": _causal_lm,
    "nf4-kbit": _nf4_kbit,
    "two-adapters": _two_adapters,
    "classifier": _classifier,
}
"""What each golden folder holds, by its name: how the model is made of its base."""


def processor() -> str:
    """What the last bits depend on beside versions: the processor, and what torch uses of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join([*sorted(models), torch.backends.cpu.get_cpu_capability()])


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
    model = CASES[case](load_base(case, Path(BASE)))
    model.save_pretrained(case)
    safetensors.torch.save_file(
        {"logits": logits(model)}, f"{case}.safetensors", {"processor": processor()}
    )


def main() -> None:
    """Make what is missing."""
    root = HERE / f"schema-{SCHEMA_VERSION}"
    root.mkdir(exist_ok=True)
    os.chdir(root)  # PEFT writes the base model's path into its files: a relative one
    if not Path(BASE).exists():
        torch.manual_seed(0)
        make_base(Path(BASE))
    for case in CASES:
        if not Path(case).exists():
            make(case)


if __name__ == "__main__":
    main()
