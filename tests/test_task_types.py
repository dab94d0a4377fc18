"""Models for every task, heads included, through `PeftModel` and through the auto classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import attrs
import peft
import pytest
import torch
import transformers

import peftstate
from peftstate.errors import BaseModelMismatchError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        ":peftstate.errors.TrainModeWarning",
        "`past_key_values` is deprecated:FutureWarning",  # prefix tuning's way
        "The `past_key_values` argument:FutureWarning",
    )
]

IDS = torch.arange(4, 16).reshape(2, 6)


@attrs.frozen
class Task:
    """A task.

    Attributes:
        kind: The `peft.TaskType`, or `None`.
        auto_class: The auto class of transformers that loads the base model.
        base: The name of a fixture, the checkpoint: of a model without a head, if a task needs one.
        targets: The layers that LoRA adapts.
        outputs: The outputs that are compared.
        fields: What more the base model is loaded with.
        inputs: What more it is run on.
    """

    kind: str | None
    auto_class: str
    base: str
    targets: list[str]
    outputs: tuple[str, ...] = ("logits",)
    fields: dict[str, Any] = attrs.field(factory=dict)
    inputs: dict[str, torch.Tensor] = attrs.field(factory=dict)

    @property
    def peft_class(self) -> str:
        """The name of the class of the wrapped model; with ``Auto`` before it, of what loads it."""
        if self.kind is None:
            return "PeftModel"
        suffix = self.auto_class.removeprefix("AutoModel") or "ForFeatureExtraction"
        return f"PeftModel{suffix}"


DECODED = {"decoder_input_ids": IDS}
LABELS = {"num_labels": 3}
TASKS = {
    "CAUSAL_LM": Task("CAUSAL_LM", "AutoModelForCausalLM", "causal_lm", ["q_proj"]),
    "SEQ_2_SEQ_LM": Task("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", "t5", ["q", "v"], inputs=DECODED),
    "SEQ_CLS": Task(
        "SEQ_CLS", "AutoModelForSequenceClassification", "bert", ["query"], fields=LABELS
    ),
    "SEQ_CLS of a decoder": Task(
        "SEQ_CLS", "AutoModelForSequenceClassification", "causal_lm", ["q_proj"], fields=LABELS
    ),
    "TOKEN_CLS": Task(
        "TOKEN_CLS", "AutoModelForTokenClassification", "bert", ["query"], fields=LABELS
    ),
    "QUESTION_ANS": Task(
        "QUESTION_ANS",
        "AutoModelForQuestionAnswering",
        "bert",
        ["query"],
        outputs=("start_logits", "end_logits"),
    ),
    "FEATURE_EXTRACTION": Task(
        "FEATURE_EXTRACTION", "AutoModel", "bert", ["query"], outputs=("last_hidden_state",)
    ),
    "none": Task(None, "AutoModelForCausalLM", "causal_lm", ["q_proj"]),
}
# Prefix tuning puts keys and values among those of the past, which the others do not take; with
# transformers 4, PEFT cannot for a decoder that has an encoder.
HAS_PREFIXES = {"CAUSAL_LM"}
MARKS_WHAT_IT_LOADED = int(transformers.__version__.partition(".")[0]) >= 5
if MARKS_WHAT_IT_LOADED:
    TASKS["none, with a head"] = Task(
        None, "AutoModelForSequenceClassification", "bert", ["query"], fields=LABELS
    )
    HAS_PREFIXES.add("SEQ_2_SEQ_LM")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a tiny encoder without a head."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """The folder of a tiny model with encoder and decoder, that share their embeddings."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def load(request):
    """Loads the base model of a task, each time with another head if the checkpoint has none."""

    def load_base(task: Task, seed: int) -> Any:
        torch.manual_seed(seed)
        path: Path = request.getfixturevalue(task.base)
        auto_class = getattr(transformers, task.auto_class)
        return auto_class.from_pretrained(path, dtype=torch.float32, **task.fields)

    return load_base


def run(model: Any, task: Task) -> list[torch.Tensor]:
    """The outputs of a model in its mode."""
    with torch.no_grad():
        found = model(input_ids=IDS, **task.inputs)
    return [found[name] for name in task.outputs]


def wrap(base: Any, config: peft.PeftConfig) -> Any:
    """A model in eval mode whose adapter, and whose head, matter."""
    model = peftstate.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether outputs are the same to the last bit."""
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


PROMPTS = [
    (name, config)
    for name, task in TASKS.items()
    for config in ("PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig")
    if task.kind and (config != "PrefixTuningConfig" or task.kind in HAS_PREFIXES)
]


@pytest.mark.parametrize("name", TASKS)
def test_lora_comes_back_with_its_head(load, tmp_path, name):
    """On a fresh base model, whose head has other random numbers, the outputs are the same."""
    task = TASKS[name]
    config = peft.LoraConfig(task_type=task.kind, r=4, target_modules=task.targets)
    base = load(task, seed=1)
    unadapted = run(base, task)
    model = wrap(base, config)
    expected = run(model, task)
    assert not equal(expected, unadapted)
    assert type(model) is getattr(peftstate, task.peft_class)
    model.save_pretrained(tmp_path)
    assert equal(run(model, task), expected)

    loaded = peftstate.PeftModel.from_pretrained(load(task, seed=2), tmp_path)
    assert type(loaded) is type(model)
    assert peftstate.verify(loaded, tmp_path).ok
    assert equal(run(loaded, task), expected)

    torch.manual_seed(3)
    auto = getattr(peftstate, f"Auto{task.peft_class}").from_pretrained(tmp_path, **task.fields)
    assert type(auto) is type(model)
    assert equal(run(auto, task), expected)


@pytest.mark.parametrize(("name", "config"), PROMPTS)
def test_prompts_come_back_with_their_heads(load, tmp_path, name, config):
    """The same for adapters that put tokens, or keys and values, before the inputs."""
    task = TASKS[name]
    prompt = getattr(peft, config)(task_type=task.kind, num_virtual_tokens=3)
    model = wrap(load(task, seed=1), prompt)
    expected = run(model, task)
    model.save_pretrained(tmp_path)
    for is_trainable in (None, False):
        loaded = peftstate.PeftModel.from_pretrained(
            load(task, seed=2), tmp_path, is_trainable=is_trainable
        )
        assert equal(run(loaded, task), expected)


def disabled(model: Any, config: peft.LoraConfig) -> None:
    """Have a model whose adapter is not applied."""
    model.base_model.disable_adapter_layers()


def beside_another(model: Any, config: peft.LoraConfig) -> None:
    """Have a model with an adapter that has no copy of the head, and is applied."""
    other = copy.copy(config)
    other.modules_to_save = None
    model.add_adapter("other", other)
    model.set_adapter("other")


@pytest.mark.parametrize("change", [disabled, beside_another])
def test_a_new_head_that_the_adapter_s_copy_does_not_stand_in_for(load, tmp_path, change):
    """The base model's own head is what computes then; no checkpoint has it.

    transformers 4 does not tell that; there, the load on a base model with another head is refused.
    """
    task = TASKS["SEQ_CLS"]
    config = peft.LoraConfig(r=4, target_modules=task.targets, modules_to_save=["classifier"])
    # of no task, or PEFT would have each adapter copy the head
    model = wrap(load(task, seed=1), config)
    change(model, config)
    expected = run(model.eval(), task)
    model.save_pretrained(tmp_path)
    base = load(task, seed=2)
    assert not equal(run(base, task), run(load(task, seed=1), task))
    if not MARKS_WHAT_IT_LOADED:
        with pytest.raises(BaseModelMismatchError, match="classifier"):
            peftstate.PeftModel.from_pretrained(base, tmp_path)
        return
    loaded = peftstate.PeftModel.from_pretrained(base, tmp_path)
    assert peftstate.verify(loaded, tmp_path).ok
    assert equal(run(loaded, task), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = peftstate.PeftModel.from_pretrained(load(task, seed=3), tmp_path / "again")
    assert equal(run(again, task), expected)


@pytest.mark.parametrize("is_trainable", [None, True, False])
def test_prompts_stand_before_the_embeddings_that_they_were_trained_with(
    load, tmp_path, is_trainable
):
    """PEFT embeds the inputs by the layer that it found before it put trained copies around it."""
    task = TASKS["FEATURE_EXTRACTION"]
    config = peft.PromptEncoderConfig(
        task_type=task.kind, num_virtual_tokens=3, modules_to_save=["word_embeddings"]
    )
    model = wrap(load(task, seed=1), config)
    expected = run(model, task)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(
        load(task, seed=1), tmp_path, is_trainable=is_trainable
    )
    assert type(loaded.word_embeddings) is type(model.word_embeddings)
    assert equal(run(loaded, task), expected)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_what_a_classifier_learned_of_its_problem(load, tmp_path, problem):
    """PEFT's forward notes the kind of problem in the base's config; it is put back."""
    task = attrs.evolve(
        TASKS["SEQ_CLS"], fields={"num_labels": 1 if problem == "regression" else 3}
    )
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=task.targets)
    model = wrap(load(task, seed=1), config)
    labels = torch.rand(2, task.fields["num_labels"])
    model.config.problem_type = problem
    expected = model(input_ids=IDS, labels=labels).loss
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load(task, seed=2), tmp_path)
    assert loaded.config.problem_type == problem
    assert torch.equal(loaded(input_ids=IDS, labels=labels).loss, expected)


def test_two_heads_of_one_base(load, tmp_path):
    """Two adapters with a head each: both come back, whatever head the base was loaded with."""
    task = TASKS["TOKEN_CLS"]
    config = peft.LoraConfig(task_type=task.kind, r=4, target_modules=task.targets)
    model = wrap(load(task, seed=1), config)
    first = run(model, task)
    model.add_adapter("second", config)
    model.set_adapter("second")
    model.base_model.model.classifier.modules_to_save["second"].weight.data += 1
    second = run(model.eval(), task)
    assert not equal(first, second)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load(task, seed=2), tmp_path)
    assert equal(run(loaded, task), second)
    loaded.set_adapter("default")
    assert equal(run(loaded, task), first)
