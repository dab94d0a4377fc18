"""Training that is resumed from a checkpoint is bit for bit the one that was not interrupted."""

from __future__ import annotations

import importlib.metadata
import warnings

import datasets
import peft
import pytest
import safetensors.torch
import torch
import transformers
import trl
from peft import LoraConfig

import peftstate
from peftstate import PeftStateCallback
from peftstate._demo.tiny import SENTENCES, tiny_checkpoint
from tests.integrations.test_trainer import DATA

IS_OLD_TRL = importlib.metadata.version("trl").startswith("0.")
PAIRS = [
    {"prompt": text[:10], "chosen": text[10:20], "rejected": other[10:20]}
    for text, other in zip(SENTENCES, reversed(SENTENCES), strict=True)
]

pytestmark = pytest.mark.filterwarnings("default")  # of what the trainers themselves do


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny model with a tokenizer."""
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


def load(checkpoint, *, quantized=False):
    """The base model."""
    options = {"dtype": torch.float32}
    if quantized:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, **options)


def fields(folder, seed):
    """The arguments that all trainers share."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 0.05,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": 1,
    }


def lora(**fields):
    """The config of an adapter with dropout, so that the random numbers count."""
    return LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3, **fields)


def plain(checkpoint, folder, seed):
    """`Trainer` itself."""
    return transformers.Trainer(
        model=peft.get_peft_model(load(checkpoint), lora()),
        args=transformers.TrainingArguments(**fields(folder, seed)),
        train_dataset=DATA,
        callbacks=[PeftStateCallback()],
    )


def norms(checkpoint, folder, seed):
    """`Trainer` with norms of the base model trained too, which PEFT does not save."""
    model = peft.get_peft_model(load(checkpoint), lora())
    model.get_base_model().model.norm.weight.requires_grad_()
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**fields(folder, seed)),
        train_dataset=DATA,
        callbacks=[PeftStateCallback()],
    )


def evaluated(checkpoint, folder, seed):
    """`Trainer` on a base model in nf4, which evaluation packs on some CPUs."""
    return transformers.Trainer(
        model=peft.get_peft_model(load(checkpoint, quantized=True), lora()),
        args=transformers.TrainingArguments(
            **fields(folder, seed), eval_strategy="steps", eval_steps=1
        ),
        train_dataset=DATA,
        eval_dataset=DATA,
        callbacks=[PeftStateCallback()],
    )


def sft(checkpoint, folder, seed, *, quantized=False):
    """TRL's `SFTTrainer`, which wraps the model itself."""
    return trl.SFTTrainer(
        model=load(checkpoint, quantized=quantized),
        args=trl.SFTConfig(**fields(folder, seed), bf16=False),
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in SENTENCES]),
        processing_class=transformers.AutoTokenizer.from_pretrained(checkpoint),
        peft_config=lora(target_modules="all-linear"),
        callbacks=[PeftStateCallback()],
    )


def qlora(checkpoint, folder, seed):
    """The same on a base model in nf4."""
    return sft(checkpoint, folder, seed, quantized=True)


def dpo(checkpoint, folder, seed):
    """TRL's `DPOTrainer` on a trained adapter, with a second one, `ref`, as the reference."""
    torch.manual_seed(0)
    model = peft.get_peft_model(load(checkpoint), lora(init_lora_weights=False))
    options = {}
    if IS_OLD_TRL:  # newer ones add it themselves
        model.add_adapter("ref", lora())
        options = {"model_adapter_name": "default", "ref_adapter_name": "ref"}
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**fields(folder, seed), **options, bf16=False),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=transformers.AutoTokenizer.from_pretrained(checkpoint),
        callbacks=[PeftStateCallback()],
    )


@pytest.mark.parametrize("make", [plain, norms, evaluated, sft, qlora, dpo])
def test_resumed_training_is_the_uninterrupted_one(checkpoint, tmp_path, make):
    """Weights, state and random generators after four steps are the same bits either way."""
    whole = make(checkpoint, tmp_path / "whole", 1)
    whole.train()
    first = tmp_path / "whole" / "checkpoint-2"
    resumed = make(checkpoint, tmp_path / "resumed", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftstate.errors.PeftStateWarning)
        resumed.train(resume_from_checkpoint=str(first))
    last = [tmp_path / run / "checkpoint-4" for run in ("whole", "resumed")]
    folders = ["", "ref"] if make is dpo else [""]
    for folder in folders:
        for name in ("adapter_model.safetensors", "peftstate.tensors"):
            before, expected, found = (
                safetensors.torch.load_file(run / folder / name) for run in (first, *last)
            )
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected), (folder, name)
            if name == "adapter_model.safetensors":
                moves = any(not torch.equal(before[key], found[key]) for key in found)
                assert moves == (folder == "")  # what is trained does, the reference does not
    if make is norms:
        weights = [run.model.get_base_model().model.norm.weight for run in (whole, resumed)]
        assert torch.equal(*weights)
        assert not torch.equal(weights[0], load(checkpoint).model.norm.weight)
    report = peftstate.diff(*map(peftstate.read_manifest, last))
    assert report.of("adapters", "base_model", "rng", "training", "extra_tensors").ok
    assert peftstate.verify_files(last[1]).ok


def test_a_damaged_reference_is_refused_on_resume(checkpoint, tmp_path):
    """The second adapter is verified like the first."""
    dpo(checkpoint, tmp_path, 1).train()
    weights = tmp_path / "checkpoint-2" / "ref" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(peftstate.errors.IntegrityError, match="ref"):
        dpo(checkpoint, tmp_path, 1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
