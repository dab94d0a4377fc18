"""The tokenizer that lies beside an adapter and is handed to nobody."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig

import peftstate
from peftstate import PeftStateCallback
from peftstate.errors import StateMismatchWarning, TokenizerMismatchError
from tests._tokenizers import TEMPLATE, make_tokenizer
from tests.golden.make import HERE

GOLDEN = HERE / "schema-1"


@pytest.fixture
def adapter(load_base, with_lora, tmp_path):
    """The folder of an adapter that was saved with a tokenizer, whose files are in it."""
    model = with_lora(load_base()).eval()
    model.save_pretrained(tmp_path / "a", tokenizer=make_tokenizer(chat_template=TEMPLATE))
    return tmp_path / "a"


@pytest.fixture
def load(load_base, adapter):
    """Loads it: `load(**keywords)`."""
    return lambda **keywords: peftstate.PeftModel.from_pretrained(load_base(), adapter, **keywords)


@pytest.fixture
def never_loaded(monkeypatch):
    """Has every load of a tokenizer fail."""

    def fail(*_, **__):
        raise AssertionError("a tokenizer was loaded")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)


def other(**fields):
    """The saved tokenizer, set otherwise."""
    return make_tokenizer(**{"chat_template": TEMPLATE, **fields})


def test_files_that_are_as_saved_are_not_looked_into(adapter, load, never_loaded):
    """Their digests say that it is the tokenizer that was saved."""
    files = peftstate.read_manifest(adapter).sections["tokenizer"].files
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files.keys()
    load()


def test_a_folder_without_a_tokenizer(adapter, load, never_loaded):
    """Nothing lies there, nothing is compared."""
    for name in peftstate.read_manifest(adapter).sections["tokenizer"].files:
        (adapter / name).unlink()
    load()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"size": 310}, "size"),
        ({"unk_token": "<pad>"}, "special_tokens.unk_token"),
        ({"sentences": ("other words",)}, "vocabulary"),
    ],
)
@pytest.mark.filterwarnings("ignore:The tokenizer in .* is set otherwise")  # marks in the template
def test_another_tokenizer_is_refused(adapter, load_base, fields, field):
    """Though nobody handed it over: it is what the prompts will go through."""
    other(**fields).save_pretrained(adapter)
    base = load_base()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(TokenizerMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(base, adapter)
    assert field in [mismatch.field for mismatch in caught.value.mismatches]
    assert [name for name, _ in base.named_modules()] == before
    with pytest.warns(StateMismatchWarning, match=rf"tokenizer\.{field}"):
        peftstate.PeftModel.from_pretrained(base, adapter, on_mismatch={"tokenizer": "warn"})


def test_added_tokens_are_named(adapter, load):
    """As when the base model's tokenizer was saved over that of the training."""
    tokenizer = other()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(TokenizerMismatchError, match=r"added_tokens\[<tool>\]: saved absent"):
        load()


def test_the_same_tokenizer_in_other_files_is_none(adapter, load, monkeypatch):
    """Another layout of the same is loaded and found to be equal."""
    calls = []
    plain = transformers.AutoTokenizer.from_pretrained

    def spy(*args, **keywords):
        calls.append(keywords)
        return plain(*args, **keywords)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", spy)
    file = adapter / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    load()
    assert [call["trust_remote_code"] for call in calls] == [False]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"padding_side": "left"}, "padding_side: saved 'right', found 'left'"),
        ({"chat_template": "{{ messages }}"}, "chat_templates.default"),
        ({"chat_template": None}, "chat_templates.default"),
        ({"model_max_length": 9}, "model_max_length: saved None, found 9"),
    ],
)
def test_what_can_be_set_is_warned_of(adapter, load, fields, field):
    """Handed over, it would be set as saved, so that it is no other tokenizer."""
    (adapter / "chat_template.jinja").unlink()
    other(**fields).save_pretrained(adapter)
    with pytest.warns(StateMismatchWarning) as caught:
        load()
    warnings = [item for item in caught if item.category is StateMismatchWarning]
    (text,) = [str(warning.message) for warning in warnings]
    assert text.startswith(f"The tokenizer in {adapter} is set otherwise than the saved one:\n")
    assert f"  tokenizer.{field}" in text
    assert text.endswith("\nPass tokenizer= to have it set as saved.")
    given = transformers.AutoTokenizer.from_pretrained(adapter)
    load(tokenizer=given)
    assert given.chat_template == TEMPLATE


def test_a_template_that_was_added_is_seen(load_base, with_lora, tmp_path):
    """A file that the saved tokenizer does not write is looked into."""
    with_lora(load_base()).eval().save_pretrained(tmp_path, tokenizer=make_tokenizer())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.warns(StateMismatchWarning, match=r"chat_templates\.default: saved absent"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)


def test_a_broken_file_is_an_error_that_names_it(adapter, load):
    """What cannot be loaded cannot be the same."""
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerMismatchError, match=r"tokenizer\.files\[tokenizer\.json\]"):
        load()
    load(on_mismatch={"tokenizer": "ignore"})


# of the libraries that wrote the folder
@pytest.mark.filterwarnings("ignore:The loaded model differs")
def test_a_broken_file_of_schema_1_is_warned_of(tmp_path):
    """It says nothing of files, so that nothing can be held against them."""
    shutil.copytree(GOLDEN / "causal-lm", tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / "base-llama", dtype=torch.float32
    )
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    with pytest.warns(StateMismatchWarning, match="cannot be loaded, so it was not compared"):
        peftstate.PeftModel.from_pretrained(base, tmp_path / "adapter")


@pytest.mark.parametrize("ignored", [{"tokenizer": "ignore"}, "ignore"])
def test_ignored_it_is_not_looked_at(adapter, load, never_loaded, ignored):
    """A server that has its own tokenizer pays nothing."""
    make_tokenizer(size=310).save_pretrained(adapter)
    load(on_mismatch=ignored)


def test_one_that_is_given_is_compared_instead(adapter, load, never_loaded):
    """What lies there does not matter then."""
    make_tokenizer(size=310).save_pretrained(adapter)
    load(tokenizer=other())


def test_without_a_record_nothing_is_compared(load_base, with_lora, tmp_path, never_loaded):
    """A save that knew of no tokenizer says nothing of one that is put there."""
    with_lora(load_base()).eval().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    peftstate.PeftModel.from_pretrained(load_base(), tmp_path)


@pytest.mark.filterwarnings("ignore:The tokenizer in .* is set otherwise")  # marks in the template
def test_the_auto_classes_look_at_it_too(adapter):
    """They hand the folder on."""
    peftstate.AutoPeftModelForCausalLM.from_pretrained(adapter)
    other(size=310).save_pretrained(adapter)
    with pytest.raises(TokenizerMismatchError, match="size"):
        peftstate.AutoPeftModelForCausalLM.from_pretrained(adapter)


def test_what_a_trainer_leaves_is_as_recorded(load_base, tmp_path, never_loaded):
    """It writes the tokenizer after the model; each checkpoint has the files that were foretold."""
    model = peftstate.get_peft_model(load_base("bf16"), LoraConfig(task_type="CAUSAL_LM"))
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            tmp_path / "run", max_steps=2, save_steps=1, report_to=[], use_cpu=True
        ),
        train_dataset=datasets.Dataset.from_list([row] * 4),
        processing_class=make_tokenizer(chat_template=TEMPLATE, padding_side="left"),
        callbacks=[PeftStateCallback()],
    )
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for folder in ("run/checkpoint-1", "run/checkpoint-2", "final"):
        assert (tmp_path / folder / "tokenizer.json").exists()
        peftstate.PeftModel.from_pretrained(
            load_base("bf16"), tmp_path / folder, is_trainable=False
        )


def test_a_part_of_the_files_in_the_cache_of_the_hub_is_not_looked_into(
    adapter, load_base, tmp_path, never_loaded
):
    """There, files are as they were asked for; that of a tokenizer's config says nothing."""
    snapshot = tmp_path / "models--owner--adapter" / "snapshots" / ("0" * 40)
    (snapshot.parent.parent / "blobs").mkdir(parents=True)
    shutil.copytree(adapter, snapshot)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer_config.json").write_text("{}")
    peftstate.PeftModel.from_pretrained(load_base(), snapshot)


def test_files_of_a_save_that_was_killed_are_those_that_it_wrote(adapter, load, never_loaded):
    """A save that was committed and not moved is read in place, the tokenizer's files with it."""
    complete = adapter / ".peftstate-complete"
    complete.mkdir()
    for name in peftstate.read_manifest(adapter).sections["tokenizer"].files:
        (adapter / name).rename(complete / name)
        (adapter / name).write_text("old")
    shutil.copy(adapter / "peftstate.json", complete)
    load()
