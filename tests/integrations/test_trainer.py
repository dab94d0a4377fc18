"""`Trainer` and TRL: what they save carries a manifest."""

from __future__ import annotations

import concurrent.futures
import logging
import shutil
import types

import datasets
import peft
import pytest
import torch
import transformers
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from peft import LoraConfig

import peftstate
from peftstate import PeftStateCallback
from peftstate.integrations.trainer import push_manifests
from tests._tokenizers import TEMPLATE, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")

DATA = datasets.Dataset.from_list(
    [{"input_ids": [5, 6, 7, 8 + n % 4], "labels": [5, 6, 7, 8 + n % 4]} for n in range(8)]
)


def arguments(folder, **fields):
    """Arguments of a short training that saves every step."""
    return transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        max_steps=2,
        save_steps=1,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **fields,
    )


def test_checkpoints_and_final_saves_carry_manifests(load_base, logits, tmp_path):
    """With the callback every checkpoint and `save_model` reload as the model in memory."""
    model = peft.get_peft_model(load_base("bf16"), LoraConfig(task_type="CAUSAL_LM"))
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path / "run"),
        train_dataset=DATA,
        callbacks=[PeftStateCallback()],
    )
    assert type(trainer.model) is peftstate.PeftModelForCausalLM
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for folder in ("run/checkpoint-1", "run/checkpoint-2", "final"):
        assert (tmp_path / folder / "peftstate.json").exists()
        assert peftstate.verify_files(tmp_path / folder).ok
    assert peftstate.verify(trainer.model, tmp_path / "final").ok
    loaded = peftstate.PeftModel.from_pretrained(load_base("bf16"), tmp_path / "final")
    assert torch.equal(logits(loaded.eval()), logits(trainer.model.eval()))


def test_checkpoints_are_signed_when_they_are_complete(load_base, tmp_path):
    """With a key, all that the trainer writes into a checkpoint is covered."""
    key = Ed25519PrivateKey.generate()
    model = peft.get_peft_model(load_base("bf16"), LoraConfig(task_type="CAUSAL_LM"))
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=DATA,
        processing_class=make_tokenizer(),
        callbacks=[PeftStateCallback(sign_with=key)],
    )
    trainer.train()
    for folder in ("checkpoint-1", "checkpoint-2"):
        assert peftstate.verify_signature(tmp_path / folder, [key.public_key()])
        assert (tmp_path / folder / "optimizer.pt").exists()
    with pytest.raises(ValueError, match="is not a private key in PEM format"):
        PeftStateCallback(sign_with=b"no key")


def test_the_best_model_is_loaded_through_us(load_base, tmp_path):
    """`load_best_model_at_end` puts a checkpoint's adapter back, verified."""
    model = peft.get_peft_model(load_base("bf16"), LoraConfig(task_type="CAUSAL_LM"))
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1),
        train_dataset=DATA,
        eval_dataset=DATA,
        callbacks=[PeftStateCallback()],
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert peftstate.verify(trainer.model, best).of("adapters", "dtype", "base_model").ok


def test_an_earlier_best_model_is_loaded_in_nf4(load_base, tmp_path):
    """Evaluation packs 4-bit layers on some CPUs, which must not add up from step to step."""
    model = peftstate.get_peft_model(load_base("nf4"), LoraConfig(task_type="CAUSAL_LM"))
    trainer = transformers.Trainer(
        model=model,
        args=arguments(
            tmp_path,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # the first
            eval_strategy="steps",
            eval_steps=1,
        ),
        train_dataset=DATA,
        eval_dataset=DATA,
    )
    trainer.train()
    best = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    assert peftstate.verify(model, best).of("adapters", "base_model", "dtype", "quantization").ok


def test_training_that_is_resumed_is_verified(load_base, tmp_path):
    """A checkpoint that was damaged is refused when training is resumed from it."""
    for resume in (None, tmp_path / "checkpoint-1"):
        model = peft.get_peft_model(load_base("bf16"), LoraConfig(task_type="CAUSAL_LM"))
        trainer = transformers.Trainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=DATA,
            callbacks=[PeftStateCallback()],
        )
        trainer.train(resume_from_checkpoint=resume)
    weights = tmp_path / "checkpoint-1" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(peftstate.errors.IntegrityError):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-1")


def test_a_model_that_is_no_peft_model_is_told(load_base, tmp_path, caplog):
    """Without an adapter the callback does nothing and says so."""
    with caplog.at_level(logging.WARNING, logger="peftstate"):
        transformers.Trainer(
            model=load_base("fp32"),
            args=arguments(tmp_path),
            train_dataset=DATA,
            callbacks=[PeftStateCallback()],
        )
    assert "the model is a LlamaForCausalLM, not a PEFT model" in caplog.text


def test_saves_of_a_trainer_record_its_tokenizer(load_base, tmp_path):
    """The trainer writes the tokenizer's files, and the manifest has what it should be."""
    model = peft.get_peft_model(load_base(), LoraConfig(task_type="CAUSAL_LM"))
    tokenizer = make_tokenizer(chat_template=TEMPLATE, padding_side="left")
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path / "run"),
        train_dataset=DATA,
        processing_class=tokenizer,
        callbacks=[PeftStateCallback()],
    )
    tokenizer.padding_side = "right"  # as trainers do after they are built
    trainer.save_model(tmp_path / "final")
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "final")
    given = make_tokenizer(padding_side="left")
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / "final", tokenizer=given)
    assert given.padding_side == "right"
    assert given.chat_template == TEMPLATE
    assert peftstate.verify(loaded, tmp_path / "final", tokenizer=written).ok


@pytest.fixture
def pushed(monkeypatch, tmp_path):
    """Runs a trainer that pushes each checkpoint; gives what the folder held at each upload."""
    uploads = []

    done = concurrent.futures.Future()
    done.set_result(None)

    def upload_folder(**keywords):
        folder = tmp_path / f"upload-{len(uploads)}"
        shutil.copytree(keywords["folder_path"], folder)
        uploads.append(folder)
        return done

    def run(model, callbacks=()):
        args = arguments(tmp_path / "run", hub_strategy="every_save", hub_always_push=True)
        trainer = transformers.Trainer(
            model=model, args=args, train_dataset=DATA, callbacks=list(callbacks)
        )
        args.push_to_hub = True  # without the network that making the repo takes
        trainer.hub_model_id, trainer.push_in_progress = "user/adapter", None
        module = transformers.trainer
        if hasattr(module, "hf_api"):
            api = types.SimpleNamespace(upload_folder=upload_folder)
            monkeypatch.setattr(module, "hf_api", lambda: api)
        else:
            monkeypatch.setattr(module, "upload_folder", upload_folder)
        monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
        trainer.train()
        return trainer, uploads

    yield run
    method = transformers.Trainer._push_from_checkpoint
    transformers.Trainer._push_from_checkpoint = getattr(method, "__wrapped__", method)


def test_the_trainers_own_push_carries_the_state(load_base, pushed):
    """What is uploaded in the middle of a training is complete, extra adapters included."""
    model = peft.get_peft_model(load_base("bf16"), LoraConfig(task_type="CAUSAL_LM"))
    model.add_adapter("ref", LoraConfig(task_type="CAUSAL_LM"))
    trainer, uploads = pushed(model, [PeftStateCallback()])
    assert len(uploads) == 2
    for folder in uploads:
        assert peftstate.verify_files(folder).ok
        assert peftstate.verify_files(folder / "ref").ok
    loaded = peftstate.PeftModel.from_pretrained(load_base("bf16"), uploads[-1])
    assert sorted(loaded.peft_config) == ["default", "ref"]
    assert peftstate.verify(trainer.model, uploads[-1]).of("adapters", "base_model", "dtype").ok


def test_pushes_behind_install_carry_the_state(load_base, pushed):
    """So it is for scripts that nobody edits."""
    with peftstate.installed():
        model = peft.get_peft_model(load_base("bf16"), LoraConfig(task_type="CAUSAL_LM"))
        _, uploads = pushed(model)
    assert all(peftstate.verify_files(folder).ok for folder in uploads)
    assert len(uploads) == 2


def test_pushes_without_a_manifest_are_left_alone(load_base, pushed):
    """A plain model that is pushed in the same process is pushed as ever."""
    push_manifests()
    model = peft.get_peft_model(load_base("bf16"), LoraConfig(task_type="CAUSAL_LM"))
    _, uploads = pushed(model)
    assert [(folder / "adapter_config.json").exists() for folder in uploads] == [True, True]
    assert not any((folder / "peftstate.json").exists() for folder in uploads)
