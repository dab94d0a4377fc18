"""Tests of the section `tokenizer`."""

from __future__ import annotations

import types
from typing import Any

import attrs
import peft
import pytest
import tokenizers
import transformers

import peftstate
from peftstate.errors import RestoreError, StateMismatchWarning, TokenizerMismatchError
from peftstate.sections import tokenizer as section
from peftstate.sections._view import ModelView
from peftstate.sections.tokenizer import SECTION
from tests._tokenizers import SENTENCES, TEMPLATE, make_tokenizer

RESTORED = {"padding_side": "left", "truncation_side": "left", "model_max_length": 77}


def view(tokenizer: Any) -> ModelView:
    """A view with a tokenizer."""
    return ModelView(model=None, tokenizer=tokenizer)


def differences(one: Any, other: Any) -> list[str]:
    """The fields in which a tokenizer differs from another one that was saved."""
    saved = section.capture(view(one))
    found = SECTION.capture_like(view(other), saved)
    return [mismatch.field for mismatch in SECTION.compare(saved, found)]


def with_backend(**fields: Any) -> Any:
    """A tokenizer with a part of its back end replaced."""
    tokenizer = make_tokenizer()
    for name, value in fields.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


@pytest.fixture
def model(load_base, with_lora):
    """A model to save."""
    return with_lora(load_base()).eval()


# The record


def test_equal_tokenizers_have_equal_records():
    """Two of them that were made in the same way do not differ."""
    assert differences(make_tokenizer(), make_tokenizer()) == []


def test_a_saved_and_reloaded_tokenizer_is_the_same(tmp_path):
    """What transformers writes and reads is recorded alike, added tokens and template included."""
    tokenizer = make_tokenizer(chat_template=TEMPLATE, padding_side="left")
    tokenizer.add_tokens(["<tool>", tokenizers.AddedToken("<call>", lstrip=True)])
    tokenizer.save_pretrained(tmp_path)
    assert differences(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)) == []


def test_another_vocabulary_differs():
    """Trained on other text, it has other tokens, and cuts up the canaries in another way."""
    other = make_tokenizer(sentences=SENTENCES[:1])
    fields = differences(make_tokenizer(), other)
    assert "vocabulary" in fields
    assert "canaries.long.ids" in fields


def test_a_token_that_was_added_is_named():
    """A tokenizer without a token that was added for the training lacks it by name."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    assert differences(tokenizer, make_tokenizer()) == ["added_tokens[<tool>]", "size"]


@pytest.mark.parametrize("flag", ["special", "single_word", "lstrip", "rstrip", "normalized"])
@pytest.mark.parametrize("content", ["<tool>", "a"])
def test_how_an_added_token_is_looked_for_differs(content, flag):
    """Each flag of a token counts, behind the vocabulary and in it."""
    one, other = make_tokenizer(), make_tokenizer()
    flags = dict.fromkeys(["special", "single_word", "lstrip", "rstrip", "normalized"], False)
    one.add_tokens([tokenizers.AddedToken(content, **flags)])
    other.add_tokens([tokenizers.AddedToken(content, **{**flags, flag: True})])
    behind = content not in make_tokenizer().get_vocab()
    field = f"added_tokens[{content}].{flag}" if behind else "vocabulary"
    assert behind is (content == "<tool>")
    assert field in differences(one, other)


def test_another_role_of_a_token_differs():
    """The token that pads is another one, as when `pad_token = eos_token` was forgotten."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert differences(tokenizer, make_tokenizer()) == ["special_tokens.pad_token"]


@pytest.mark.parametrize(
    "fields",
    [
        {"normalizer": tokenizers.normalizers.Lowercase()},
        {"normalizer": tokenizers.normalizers.NFKD()},
        {"pre_tokenizer": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {
            "post_processor": tokenizers.processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", 1)]
            )
        },
    ],
    ids=["lower case", "NFKD", "prefix space", "bos"],
)
def test_what_no_setting_tells_is_seen_in_the_canaries(fields):
    """Normalisation, cutting up and special tokens around a text change the ids of fixed texts."""
    found = differences(make_tokenizer(), with_backend(**fields))
    assert found
    assert all(field.startswith("canaries") for field in found)


def test_another_way_to_decode_is_seen_in_the_canaries():
    """The same ids that give another text are a difference."""
    other = with_backend(decoder=tokenizers.decoders.Fuse())
    fields = ["canaries.long.decoded", "canaries.short.decoded"]
    assert differences(make_tokenizer(), other) == fields


def test_another_class_that_does_the_same_is_no_difference():
    """transformers 5 renamed its classes; where more differs the class is told."""

    class Renamed(transformers.PreTrainedTokenizerFast):
        pass

    other = Renamed(tokenizer_object=make_tokenizer().backend_tokenizer, **_special())
    assert differences(make_tokenizer(), other) == []
    other.pad_token = other.eos_token
    assert differences(make_tokenizer(), other) == ["kind", "special_tokens.pad_token"]


def _special() -> dict[str, str]:
    tokenizer = make_tokenizer()
    return {name: getattr(tokenizer, name) for name in ("pad_token", "bos_token", "eos_token")}


def test_capture_leaves_padding_and_truncation_of_the_back_end():
    """What the last call set in the back end is still set, and goes into the tokenizer's file."""
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(length=9, pad_id=0, pad_token=tokenizer.pad_token)
    backend.enable_truncation(5, stride=1, direction="left")
    before, attributes = backend.to_str(), dict(vars(tokenizer))
    section.capture(view(tokenizer))
    assert backend.to_str() == before
    assert vars(tokenizer) == attributes


def test_a_tokenizer_that_takes_no_plain_text_has_no_canaries(monkeypatch):
    """Tables, or words with boxes, are inputs of their own; the rest is recorded."""
    tokenizer = make_tokenizer()

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("words must be lists, with a box for each")

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)
    record = section.capture(view(tokenizer))
    assert record.canaries == {}
    assert record.size == len(tokenizer)


def test_a_template_is_not_run():
    """A chat template is compared by its text, and no word of it is rendered."""
    template = "{{ raise_exception('run') }}{% for i in range(9999999) %}{{ 1 / 0 }}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    record = section.capture(view(tokenizer))
    assert record.chat_templates == {"default": template}
    section.restore(record, view(make_tokenizer()))


def test_marks_in_a_template_must_be_tokens():
    """The same template is another prompt where its marks are cut up."""
    one, other = (make_tokenizer(chat_template="{{ x }}<turn>") for _ in range(2))
    one.add_tokens(["<turn>"])
    assert "template_ids" in differences(one, other)


# Restore


def test_settings_are_restored():
    """Sides, maximum length and template come back on the tokenizer that was given."""
    saved = make_tokenizer(chat_template=TEMPLATE, **RESTORED)
    given = make_tokenizer()
    record = section.capture(view(saved))
    section.restore(record, view(given))
    assert {name: getattr(given, name) for name in RESTORED} == RESTORED
    assert given.chat_template == TEMPLATE
    assert SECTION.compare(record, section.capture_restored(view(given), record)) == ()


def test_settings_that_were_absent_are_taken_away():
    """A tokenizer that was saved without template and limit loses those of another."""
    given = make_tokenizer(chat_template=TEMPLATE, **RESTORED)
    section.restore(section.capture(view(make_tokenizer())), view(given))
    assert given.chat_template is None
    assert given.model_max_length == section.NO_LIMIT
    assert differences(make_tokenizer(), given) == []


def test_several_templates_come_back_by_name():
    """A tokenizer with named templates gets them all."""
    templates = {"default": TEMPLATE, "tool_use": TEMPLATE + "<tools>"}
    given = make_tokenizer()
    section.restore(section.capture(view(make_tokenizer(chat_template=templates))), view(given))
    assert given.chat_template == templates


def test_no_other_side_can_be_set():
    """A manifest can say left and right."""
    record = attrs.evolve(section.capture(view(make_tokenizer())), padding_side="__class__")
    given = make_tokenizer()
    section.restore(record, view(given))
    assert given.padding_side == "right"
    mismatches = SECTION.compare(record, section.capture_restored(view(given), record))
    assert [str(mismatch) for mismatch in mismatches] == [
        "tokenizer.padding_side: saved '__class__', found 'right'"
    ]


def test_a_processor_is_looked_into():
    """Of a multimodal processor the tokenizer is recorded, and the template is its own."""
    inner = make_tokenizer(padding_side="left")
    processor = types.SimpleNamespace(
        tokenizer=inner, chat_template=TEMPLATE, save_pretrained=inner.save_pretrained
    )
    record = section.capture(view(processor))
    assert record.padding_side == "left"
    assert record.chat_templates == {"default": TEMPLATE}
    given = types.SimpleNamespace(tokenizer=make_tokenizer(), chat_template=None)
    section.restore(record, view(given))
    assert given.chat_template == TEMPLATE
    assert given.tokenizer.padding_side == "left"
    assert given.tokenizer.chat_template is None


def test_an_image_processor_is_no_tokenizer():
    """What has no vocabulary is not recorded."""
    assert not SECTION.applies_to(view(types.SimpleNamespace(size=3)))
    assert not SECTION.applies_to(view(None))


# Saves and loads


def test_the_folder_is_complete(model, tmp_path):
    """The tokenizer's own files are in the folder, and the manifest has its record."""
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert differences(tokenizer, loaded) == []
    record = peftstate.read_manifest(tmp_path).sections["tokenizer"]
    assert record == section.capture(view(tokenizer))


def test_an_old_template_does_not_stay_in_the_folder(model, tmp_path):
    """Saved again with a tokenizer that has no template, the folder has none."""
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer(chat_template=TEMPLATE))
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template is None


def test_without_a_tokenizer_nothing_is_recorded(model, load_base, tmp_path):
    """The section is absent; a tokenizer that is given to the load is left as it is."""
    model.save_pretrained(tmp_path)
    assert "tokenizer" not in peftstate.read_manifest(tmp_path).sections
    assert not list(tmp_path.glob("tokenizer*"))
    given = make_tokenizer(**RESTORED)
    peftstate.PeftModel.from_pretrained(load_base(), tmp_path, tokenizer=given)
    assert {name: getattr(given, name) for name in RESTORED} == RESTORED


def test_a_load_restores_the_tokenizer_that_is_given(model, load_base, tmp_path):
    """Its settings are as saved; without one the load compares nothing."""
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer(chat_template=TEMPLATE, **RESTORED))
    given = make_tokenizer()
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path, tokenizer=given)
    assert {name: getattr(given, name) for name in RESTORED} == RESTORED
    assert given.chat_template == TEMPLATE
    assert peftstate.verify(loaded, tmp_path).ok
    assert "tokenizer" in peftstate.verify(loaded, tmp_path).sections
    alone = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert "tokenizer" not in peftstate.verify(alone, tmp_path).sections
    report = peftstate.verify(alone, tmp_path, tokenizer=make_tokenizer())
    assert report.mismatches[0].field == "chat_templates.default"


def test_another_tokenizer_is_refused_before_the_base_is_touched(model, load_base, tmp_path):
    """The error names what differs; base model and tokenizer are as they were."""
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer(padding_side="left"))
    base, given = load_base(), make_tokenizer()
    given.add_tokens(["<tool>"])
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(TokenizerMismatchError, match=r"added_tokens\[<tool>\]: saved absent"):
        peftstate.PeftModel.from_pretrained(base, tmp_path, tokenizer=given)
    assert [name for name, _ in base.named_modules()] == names
    assert given.padding_side == "right"


def test_a_difference_can_be_a_warning(model, load_base, tmp_path):
    """It is told once, and what can be restored is restored; ignored, nothing is."""
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer(padding_side="left"))
    given = make_tokenizer()
    given.add_tokens(["<tool>"])
    with pytest.warns(StateMismatchWarning) as caught:
        peftstate.PeftModel.from_pretrained(
            load_base(), tmp_path, tokenizer=given, on_mismatch={"tokenizer": "warn"}
        )
    assert sum("added_tokens" in str(warning.message) for warning in caught) == 1
    assert given.padding_side == "left"
    ignored = make_tokenizer()
    peftstate.PeftModel.from_pretrained(
        load_base(), tmp_path, tokenizer=ignored, on_mismatch={"tokenizer": "ignore"}
    )
    assert ignored.padding_side == "right"


def test_a_load_that_fails_leaves_the_tokenizer_as_it_was(model, load_base, tmp_path, monkeypatch):
    """Whatever fails after the tokenizer was set, it is put back."""
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer(chat_template=TEMPLATE, **RESTORED))
    monkeypatch.setattr("peftstate.sections.rng.set_states", _fail_once())
    given = make_tokenizer()
    with pytest.raises(RestoreError):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path, tokenizer=given)
    assert differences(make_tokenizer(), given) == []


def _fail_once() -> Any:
    """What takes the place of a restore: it fails, and works when the load is undone."""
    calls = []

    def fail(record: Any) -> None:
        calls.append(record)
        if len(calls) == 1:
            raise ValueError("no such generator")

    return fail


def test_the_auto_classes_take_it_too(model, tmp_path):
    """`AutoPeftModelFor…` hands it on."""
    peftstate.attach(model, tokenizer=make_tokenizer(padding_side="left"))
    model.save_pretrained(tmp_path)
    given = make_tokenizer()
    peftstate.AutoPeftModelForCausalLM.from_pretrained(tmp_path, tokenizer=given)
    assert given.padding_side == "left"


def test_a_loaded_model_keeps_its_tokenizer(model, load_base, tmp_path):
    """Saved again, the record is there without being passed; the files are not written."""
    model.save_pretrained(tmp_path / "one", tokenizer=make_tokenizer())
    loaded = peftstate.PeftModel.from_pretrained(
        load_base(), tmp_path / "one", tokenizer=make_tokenizer()
    )
    loaded.save_pretrained(tmp_path / "two")
    one, two = (peftstate.read_manifest(tmp_path / name) for name in ("one", "two"))
    assert two.sections["tokenizer"] == one.sections["tokenizer"]
    assert not list((tmp_path / "two").glob("tokenizer*"))
    assert peftstate.capture(loaded).sections["tokenizer"] == one.sections["tokenizer"]


def test_attach_takes_it(load_base):
    """A model that somebody else wrapped, attached already or not, can be told its tokenizer."""
    model = peft.get_peft_model(load_base(), peft.LoraConfig(task_type="CAUSAL_LM")).eval()
    peftstate.attach(model)
    assert "tokenizer" not in peftstate.capture(model).sections
    peftstate.attach(model, tokenizer=make_tokenizer())
    peftstate.attach(model)
    assert peftstate.capture(model).sections["tokenizer"].size == 300


def test_a_path_is_refused(model, load_base, tmp_path):
    """The object is wanted, which can be restored; nothing is written or loaded."""
    with pytest.raises(TypeError, match="not a str"):
        model.save_pretrained(tmp_path / "adapter", tokenizer="some/tokenizer")
    assert not (tmp_path / "adapter").exists()
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="takes a tokenizer or a processor"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path, tokenizer="some/tokenizer")


def test_other_processes_write_no_tokenizer(model, tmp_path):
    """With `is_main_process=False` the folder stays empty."""
    model.save_pretrained(tmp_path, is_main_process=False, tokenizer=make_tokenizer())
    assert not list(tmp_path.iterdir())
