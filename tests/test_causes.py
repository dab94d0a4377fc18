"""Each known cause of a changed reload, by its number: restored exactly, or met by a typed error.

The situations are those of `benchmarks/fidelity`, which runs them with plain PEFT as well. The
causes: A the adapter is not (wholly) loaded, B the base model is loaded differently, C mode,
randomness and wrappers, D the adapter's numerics, E tokenizer and inputs, F the environment.
"""

from __future__ import annotations

import json

import attrs
import pytest
import torch

import peftstate
from benchmarks.fidelity._libraries import PEFTSTATE
from benchmarks.fidelity._models import Place
from benchmarks.fidelity._outcome import Kind
from benchmarks.fidelity._run import run
from benchmarks.fidelity.situations import CAUSES, FURTHER, OF_CAUSES
from peftstate import errors

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the base models are."""
    return Place(tmp_path_factory.mktemp("fidelity"))


@pytest.mark.parametrize("situation", OF_CAUSES, ids=lambda situation: situation.id)
def test_cause(situation, place):
    """The saved model comes back to the last bit, or an error or a warning says what differs."""
    (outcome,) = run(situation, place, [PEFTSTATE])
    assert situation.ours.problem(outcome) is None


@pytest.mark.parametrize("situation", FURTHER, ids=lambda situation: situation.id)
def test_further_situation(situation, place):
    """The same where no cause is known by which a reload would be another model."""
    (outcome,) = run(situation, place, [PEFTSTATE])
    assert situation.ours.problem(outcome) is None


def test_every_cause_has_a_situation():
    """No number is left out, and no two tests have one name."""
    assert list(CAUSES) == list(dict.fromkeys(situation.cause for situation in OF_CAUSES))
    assert len(CAUSES) == 42
    names = [situation.id for situation in (*OF_CAUSES, *FURTHER)]
    assert len(set(names)) == len(names)


def test_no_situation_may_differ_silently():
    """No definition expects of ours what is promised never to happen."""
    kinds = {situation.ours.kind for situation in (*OF_CAUSES, *FURTHER)}
    assert kinds <= {Kind.EXACT, Kind.TOLD, Kind.REFUSED}


# What a table of reloads cannot show


def test_a6_copies_of_tied_weights_are_refused(load_base, tied_lm, with_lora, tmp_path):
    """A base whose embeddings are no longer tied is refused, also if the values are the same."""
    with_lora(load_base(path=tied_lm)).save_pretrained(tmp_path)
    base = load_base(path=tied_lm)
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    with pytest.raises(errors.BaseModelMismatchError, match="tied_embeddings: saved True"):
        peftstate.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_b2_live_layers_are_recorded(place):
    """Of a pre-quantized base, the compute dtype that it has, not the one that was asked for."""
    (situation,) = [situation for situation in OF_CAUSES if situation.cause == "B2"]
    record = peftstate.capture(situation.build(place)).sections["quantization"]
    assert record.state.default.compute_dtype == "bfloat16"
    assert record.pre_quantized


def test_c9_another_step_is_told_by_verify(load_base, with_lora, tmp_path):
    """A model that was trained on is told from the one that was saved."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data += 1
    report = peftstate.verify(model, tmp_path)
    assert [mismatch.section for mismatch in report.mismatches] == ["adapters"]


def test_d3_dropped_field_is_named_even_if_it_has_its_default(load_base, with_lora, tmp_path):
    """A field of the config that was lost raises by its name, whatever its value was."""
    with_lora(load_base()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["use_rslora"]
    path.write_text(json.dumps(config))
    with pytest.raises(errors.AdapterMismatchError, match=r"config\.use_rslora: saved False"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)


def test_e2_probe_keeps_its_inputs(load_base, with_lora, tmp_path):
    """What is compared has the same shape and padding, and tells of another adapter."""
    model = with_lora(load_base("bf16"))
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]])}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    model.save_pretrained(tmp_path, prediction_probe=inputs)
    assert peftstate.verify(model, tmp_path).ok
    record = peftstate.read_manifest(tmp_path).sections["predictions"]
    assert record.inputs["attention_mask"].shape == (2, 3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    report = peftstate.verify(model, tmp_path).of("predictions")
    assert "max_difference" in [mismatch.field for mismatch in report.mismatches]


def test_f1_other_versions_are_an_error_for_who_asks_for_it(load_base, with_lora, tmp_path):
    """By default they are a warning, which names the version."""
    with_lora(load_base()).save_pretrained(tmp_path)
    manifest = peftstate.read_manifest(tmp_path)
    record = attrs.evolve(manifest.sections["environment"], python="3.9.0")
    data = attrs.evolve(manifest, sections={**manifest.sections, "environment": record}).to_json()
    (tmp_path / "peftstate.json").write_bytes(data)
    with pytest.warns(errors.StateMismatchWarning, match=r"environment\.python: saved '3\.9\.0'"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    with pytest.raises(errors.EnvironmentMismatchError):
        peftstate.PeftModel.from_pretrained(
            load_base(), tmp_path, on_mismatch={"environment": "error"}
        )


def test_f4_tensors_that_are_not_here_are_named(load_base, with_lora, tmp_path):
    """Weights of the base that cannot be read are not compared, and a warning says which."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)
    head = model.get_base_model().lm_head
    head.weight = torch.nn.Parameter(head.weight.to("meta"), requires_grad=False)
    with pytest.warns(
        errors.StateMismatchWarning, match=r"1 of 29 tensors .* cannot be read .*: lm_head\.weight"
    ):
        report = peftstate.verify(model, tmp_path)
    assert report.of("base_model").ok
    head.weight = torch.nn.Parameter(torch.empty(3, 64, device="meta"), requires_grad=False)
    with pytest.warns(errors.StateMismatchWarning):
        report = peftstate.verify(model, tmp_path)
    assert [mismatch.field for mismatch in report.of("base_model").mismatches] == [
        "tensors[lm_head.weight].shape"
    ]
