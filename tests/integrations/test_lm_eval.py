"""lm-evaluation-harness, by its own command line: the right base model, or an error."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch

import peftstate
from tests._tokenizers import SENTENCES, llama_for_text, make_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is tested with the newest versions only")

import lm_eval
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM

from peftstate.integrations.lm_eval import PeftStateLM

TASK = """
task: sentences
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""
TOKENIZER = {"model_input_names": ["input_ids", "attention_mask"]}
FIGURE = "byte_perplexity,none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a task, and a base model that has more embeddings than its tokenizer."""
    folder = tmp_path_factory.mktemp("lm-eval")
    tokenizer = make_tokenizer(**TOKENIZER)
    tokenizer.save_pretrained(folder / "base")
    model = llama_for_text()
    assert len(tokenizer) < model.config.vocab_size
    model.save_pretrained(folder / "base")
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in SENTENCES))
    (tasks / "sentences.yaml").write_text(TASK.format(data=tasks / "data.jsonl"))
    return folder


@pytest.fixture(scope="module")
def saved(folder, load_base):
    """Saves an adapter on a base model of a kind: `saved(kind)` gives the live model."""

    def save(kind, **fields):
        base = load_base(kind, folder / "base")
        if "vocabulary" in fields:
            base.resize_token_embeddings(fields["vocabulary"])
            base.save_pretrained(folder / "fitting")
            make_tokenizer(**TOKENIZER).save_pretrained(folder / "fitting")
            base = load_base(kind, folder / "fitting")
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        model = peftstate.get_peft_model(base, config).eval()
        model.save_pretrained(folder / kind)
        return model

    return save


@pytest.fixture(scope="module")
def quantized(saved):
    """The live model of the adapter in the folder ``nf4``."""
    return saved("nf4")


def run_cli(folder, model, arguments):
    """The command line of lm-eval behind `peftstate run`, and the results file it wrote."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "peftstate", "run", "-m", "lm_eval", "run"),
            *("--model", model, "--model_args", arguments, "--device", "cpu"),
            *("--tasks", "sentences", "--include_path", "tasks", "--output_path", "out.json"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"},
    )
    found = sorted(folder.glob("out_*.json"))
    results = json.loads(found[-1].read_text()) if found else None
    for file in found:
        file.unlink()
    return done, results


def score(folder, model):
    """What lm-eval makes of a live model."""
    tasks = lm_eval.tasks.TaskManager(include_path=str(folder / "tasks"))
    live = HFLM(pretrained=model, tokenizer=make_tokenizer())
    found = lm_eval.simple_evaluate(live, tasks=["sentences"], task_manager=tasks)
    return found["results"]["sentences"][FIGURE]


def test_an_adapter_is_scored_on_its_quantized_base(folder, quantized):
    """The command line gives the live model's own figure, and the digest of what it scored."""
    arguments = json.dumps({"peft": "nf4", "on_mismatch": {"tokenizer": "warn"}})
    done, results = run_cli(folder, "peftstate", arguments)
    assert done.returncode == 0, done.stderr
    assert results["results"]["sentences"][FIGURE] == score(folder, quantized)
    manifest = json.loads((folder / "nf4" / "peftstate.json").read_text())
    assert results["config"]["peftstate"] == {
        "manifest_digest": manifest["digest"],
        "base_model": "base",
        "base_model_commit": None,
        "quantization_config": manifest["sections"]["quantization"]["config"],
    }


@pytest.mark.usefixtures("quantized")
def test_lm_evals_own_model_is_stopped_on_a_base_that_is_not_quantized(folder):
    """``hf`` loads the base model as its checkpoint says; it is stopped before it scores."""
    done, results = run_cli(folder, "hf", "pretrained=base,peft=nf4")
    assert (done.returncode, results) == (1, None)
    assert "peftstate.errors.QuantizationMismatchError: " in done.stderr


def test_embeddings_that_were_cut_are_refused(folder, saved):
    """``hf`` cuts them to the size of the tokenizer where an adapter is loaded."""
    saved("bf16")
    done, results = run_cli(folder, "hf", "pretrained=base,peft=bf16")
    assert (done.returncode, results) == (1, None)
    assert "peftstate.errors.BaseModelMismatchError: " in done.stderr
    assert "tensors[lm_head.weight].shape: saved [320, 64], found [300, 64]" in done.stderr


def test_lm_evals_own_model_scores_what_fits(folder, saved):
    """``hf`` behind `peftstate run` evaluates the adapter of a base model that it loads right."""
    model = saved("bf16", vocabulary=len(make_tokenizer()))
    done, results = run_cli(folder, "hf", "pretrained=fitting,peft=bf16")
    assert done.returncode == 0, done.stderr
    assert results["results"]["sentences"][FIGURE] == score(folder, model)


@pytest.mark.usefixtures("quantized")
def test_the_seeds_of_lm_eval_stand(folder):
    """It seeds the generators before it makes the model, and states the seeds in its results."""
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    model = PeftStateLM(peft=str(folder / "nf4"), device="cpu")
    assert not any(module.training for module in model.model.modules())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_a_tokenizer_beside_the_adapter_goes_first(folder, load_base, tmp_path):
    """It is the one that was saved; another one is refused."""
    base = load_base("bf16", folder / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    own = make_tokenizer(size=290)
    peftstate.get_peft_model(base, config).save_pretrained(tmp_path / "a", tokenizer=own)
    model = PeftStateLM(peft=str(tmp_path / "a"), device="cpu")
    assert len(model.tokenizer) == len(own)
    with pytest.raises(peftstate.errors.TokenizerMismatchError):
        PeftStateLM(peft=str(tmp_path / "a"), tokenizer=str(folder / "base"), device="cpu")


def test_an_adapter_without_a_manifest_is_refused(folder, load_base, tmp_path):
    """Nothing says how its base model is to be loaded."""
    config = peft.LoraConfig(task_type="CAUSAL_LM")
    peft.get_peft_model(load_base("bf16", folder / "base"), config).save_pretrained(tmp_path)
    with pytest.raises(peftstate.errors.ManifestNotFoundError):
        PeftStateLM(peft=str(tmp_path), device="cpu")
