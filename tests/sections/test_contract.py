"""What holds for every section, on models of several kinds."""

from __future__ import annotations

import hashlib
import json
import random
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args, get_origin, get_type_hints

import attrs
import numpy as np
import peft
import pytest
import torch
from torch import nn

from peftstate._codec import DecodeError
from peftstate._diff import steps
from peftstate.sections import SECTIONS
from peftstate.sections._tensors import sidecar_tensors, with_tensors
from peftstate.sections._view import ModelView
from tests._tokenizers import TEMPLATE, make_tokenizer

IDS = torch.arange(4, 16).reshape(2, 6)
TOKENIZER = make_tokenizer(chat_template=TEMPLATE, padding_side="left")


def _view(model: Any) -> ModelView:
    """The view of a model with all that a save can be given, so that no section is left out."""
    return attrs.evolve(ModelView.of(model), tokenizer=TOKENIZER, probe={"input_ids": IDS})


# The models


@attrs.frozen
class Case:
    """A model that was used, and how the same one is built anew.

    Attributes:
        load: Loads the base model.
        wrap: Adds adapters to it; the same ones each time.
        before: What is done to the base model before that.
        after: What is done to the whole model.
    """

    load: Callable[[], Any]
    wrap: Callable[[Any], Any]
    before: Callable[[Any], Any] = lambda base: base
    after: Callable[[Any], Any] = lambda model: model

    def saved(self) -> Any:
        """The model in its state."""
        with torch.random.fork_rng(devices=[]):
            model = self.wrap(self.before(self.load()))
            self.after(model)
        return model


def _run(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=IDS)


def _seeded(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def seeded(base: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return wrap(base)

    return seeded


def _train_step(model: Any) -> None:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(0.1 * parameter.grad)


def _as_trl_does(model: Any) -> None:
    """TRL casts the adapter of a quantized model to bf16, and generating repacks 4-bit weights."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.eval()
    model.generate(input_ids=IDS, max_new_tokens=2)


def _two_adapters(with_lora: Any) -> Callable[[Any], Any]:
    def wrap(base: Any) -> Any:
        model = with_lora(base)
        model.add_adapter(
            "other",
            peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False, r=2),
        )
        return model

    return wrap


def _second_active(model: Any) -> None:
    model.set_adapter("other")
    model.base_model.model.model.layers[0].self_attn.v_proj.scaling["other"] = 3.0


def _prompts(base: Any) -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(base, config)


@pytest.fixture(scope="module")
def cases(load_base, with_lora, classifier):
    """Every kind of model by name."""

    def score(base: Any) -> Any:
        return with_lora(base, task_type="SEQ_CLS", modules_to_save=["score"])

    def load_classifier() -> Any:
        return load_base("fp32", classifier, "AutoModelForSequenceClassification")

    cases = {
        "fp32": Case(lambda: load_base("fp32"), with_lora),
        "bf16 in training": Case(lambda: load_base("bf16"), with_lora, after=_train_step),
        "nf4 after QLoRA": Case(
            lambda: load_base("nf4"),
            with_lora,
            before=peft.prepare_model_for_kbit_training,
            after=_as_trl_does,
        ),
        "int8": Case(lambda: load_base("int8"), with_lora, after=_run),
        "two adapters": Case(
            lambda: load_base("bf16"), _two_adapters(with_lora), after=_second_active
        ),
        "classifier": Case(load_classifier, score, after=lambda model: model.eval()),
        "prompts": Case(lambda: load_base("fp32"), _prompts),
    }
    return {name: attrs.evolve(case, wrap=_seeded(case.wrap)) for name, case in cases.items()}


NAMES = (
    "fp32",
    "bf16 in training",
    "nf4 after QLoRA",
    "int8",
    "two adapters",
    "classifier",
    "prompts",
)


@attrs.frozen
class Saved:
    """A model, and the record of each section."""

    case: Case
    model: Any
    records: Mapping[str, Any]


@pytest.fixture(scope="module", params=NAMES)
def saved(request, cases):
    """A model of each kind, and its records. Tests leave it as it is."""
    case = cases[request.param]
    model = case.saved()
    records = {section.name: section.capture(_view(model)) for section in SECTIONS}
    return Saved(case, model, records)


@pytest.fixture(params=SECTIONS, ids=[section.name for section in SECTIONS])
def section(request):
    """Each section."""
    return request.param


# Records as JSON


def test_record_survives_json(saved, section):
    """The record that is read is the record that was written, the sidecar's tensors included."""
    record = saved.records[section.name]
    text = json.dumps(section.encode(record), allow_nan=False)
    read = section.decode(json.loads(text))
    assert read == record
    tensors = {tensor.tensor: tensor.load() for tensor in sidecar_tensors(record)}
    filled = with_tensors(read, tensors)
    assert filled == record
    for tensor in sidecar_tensors(filled):
        assert tensor.load() is tensors[tensor.tensor]


def test_equal_models_have_equal_records(saved, section):
    """A second capture gives the same bytes of JSON."""
    again = section.capture(_view(saved.model))
    if section.name != "rng":  # each test starts from its own random numbers
        assert json.dumps(section.encode(again)) == json.dumps(
            section.encode(saved.records[section.name])
        )


def test_every_leaf_counts(saved, section):
    """Whatever single value is altered, the comparison reports it, and nothing but it."""
    record = saved.records[section.name]
    encoded = section.encode(record)
    checked = 0
    for leaf in _leaves(encoded, section.record):
        altered = section.decode(_with(encoded, leaf.path, leaf.altered()))
        (mismatch,) = section.compare(record, altered)
        assert steps(mismatch.field)[: len(leaf.path)] == [str(key) for key in leaf.path]
        (mismatch,) = section.compare(altered, record)
        assert mismatch.section == section.name
        checked += 1
    assert checked or not encoded


def test_wrong_types_are_refused(saved, section):
    """A value of another type is no such record; the error says where it stands."""
    encoded = section.encode(saved.records[section.name])
    for leaf in _leaves(encoded, section.record):
        for wrong in leaf.wrong():
            with pytest.raises(DecodeError) as error:
                section.decode(_with(encoded, leaf.path, wrong))
            assert steps(error.value.field) == [str(key) for key in leaf.path], wrong


def test_unknown_and_missing_keys_are_refused(saved, section):
    """An object has the fields of its class, of which one with a default may be missing."""
    encoded = section.encode(saved.records[section.name])
    for path, found, required in _records(encoded, section.record):
        where = [str(key) for key in path]
        with pytest.raises(DecodeError, match="unknown key 'unheard_of'") as error:
            section.decode(_with(encoded, path, {**found, "unheard_of": 1}))
        assert steps(error.value.field) == where
        for key in required:
            less = {name: value for name, value in found.items() if name != key}
            with pytest.raises(DecodeError, match="is missing") as error:
                section.decode(_with(encoded, path, less))
            assert steps(error.value.field) == [*where, key]


@attrs.frozen
class _Leaf:
    """A value inside a record: a scalar, or a list as a whole, or an empty mapping."""

    path: tuple[Any, ...]
    value: Any
    kind: Any

    def altered(self) -> Any:
        """Another value of the same type."""
        value = self.value
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return value + 1
        if isinstance(value, str):
            return value + "x"
        if isinstance(value, list) and value:
            return value[1:]
        return _example(self.kind)

    def wrong(self) -> list[Any]:
        """Values of other types."""
        kind, optional = _without_none(self.kind)
        if kind is Any:
            return []
        strangers = ["1", 1, 1.0, True, [], {}] + ([] if optional else [None])
        return [value for value in strangers if not _is_of(value, kind)]


def _without_none(kind: Any) -> tuple[Any, bool]:
    """What a type is beside `None`, and whether it is `None` too."""
    inner = [part for part in get_args(kind) if part is not type(None)]
    if len(inner) < len(get_args(kind)):
        assert len(inner) == 1, f"{kind}: this test knows no such type"
        return inner[0], True
    return kind, False


def _json_type(kind: Any) -> type:
    """The type in JSON of what an annotation says."""
    plain = get_origin(kind) or kind
    if plain is tuple:
        return list
    return dict if attrs.has(plain) or issubclass(plain, Mapping) else plain


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of JSON has the type that an annotation says."""
    return type(value) is _json_type(kind)


def _example(kind: Any) -> Any:
    """A value of a type, in JSON."""
    kind, _ = _without_none(kind)
    plain = get_origin(kind) or kind
    if kind is Any:
        return "something"
    if attrs.has(plain):
        return {name: _example(inner) for name, inner in _fields(kind).items()}
    if plain is tuple:
        return [_example(get_args(kind)[0])]
    if issubclass(plain, Mapping):
        return {"something": _example(get_args(kind)[1])}
    return {str: "something", int: 7, float: 0.5, bool: True}[plain]


def _fields(kind: Any) -> dict[str, Any]:
    """The fields of a record's class with their types, those that are no JSON left out."""
    plain = get_origin(kind) or kind
    hints = get_type_hints(plain)
    shown = {field.name for field in attrs.fields(plain) if not field.metadata}
    return {
        name: hint[get_args(kind)] if getattr(hint, "__parameters__", ()) else hint
        for name, hint in hints.items()
        if name in shown
    }


def _children(value: dict[str, Any], kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """The values in an object with their types; of a long mapping the first ones and the last."""
    if kind is not Any and attrs.has(get_origin(kind) or kind):
        for name, inner in _fields(kind).items():
            yield name, value[name], inner
        return
    names = sorted(value)
    for name in names if len(names) < 5 else [*names[:3], names[-1]]:
        yield name, value[name], Any if kind is Any else get_args(kind)[1]


def _leaves(value: Any, kind: Any, path: tuple[Any, ...] = ()) -> Iterator[_Leaf]:
    """The leaves of a record's JSON."""
    inner, _ = _without_none(kind)
    is_record = inner is not Any and attrs.has(get_origin(inner) or inner)
    if isinstance(value, dict) and (value or is_record):
        for name, child, child_kind in _children(value, inner):
            yield from _leaves(child, child_kind, (*path, name))
    else:
        yield _Leaf(path, value, kind)


def _records(
    value: Any, kind: Any, path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], list[str]]]:
    """The objects of a record's JSON that stand for records, and the keys they must have."""
    inner, _ = _without_none(kind)
    if not isinstance(value, dict) or inner is Any:
        return
    plain = get_origin(inner) or inner
    if attrs.has(plain):
        fields = [field for field in attrs.fields(plain) if not field.metadata]
        yield path, value, [field.name for field in fields if field.default is attrs.NOTHING]
    for name, child, child_kind in _children(value, inner):
        yield from _records(child, child_kind, (*path, name))


def _with(value: Any, path: tuple[Any, ...], leaf: Any) -> Any:
    """The same JSON with another value at one place."""
    if not path:
        return leaf
    return {**value, path[0]: _with(value[path[0]], path[1:], leaf)}


# Capture and restore


@pytest.fixture(scope="module")
def restored(saved):
    """The differences that are left when the state is restored on a model that is built anew."""
    base = saved.case.load()
    bare = ModelView(model=base)
    for section in SECTIONS:
        if section.prepare is not None:
            section.prepare(saved.records[section.name], bare)
    model = saved.case.wrap(base)
    _set_adapters(model, saved.model)
    before = _generators()
    steps = [(section, section.restore) for section in SECTIONS]
    steps += [(section, section.finish) for section in SECTIONS]
    for section, step in steps:
        if step is not None:
            step(saved.records[section.name], _view(model))
    found = {
        section.name: section.compare(
            saved.records[section.name],
            section.capture_like(_view(model), saved.records[section.name]),
        )
        for section in SECTIONS
    }
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    return found


def _set_adapters(model: Any, source: Any) -> None:
    """Set the adapters' tensors to those of another model, as a load does."""
    tensors = {(site.adapter, site.name): site for site in _view(source).tensors()}
    for site in _view(model).tensors():
        if site.part == "adapter":
            site.replace(tensors[site.adapter, site.name].tensor.detach().clone())


def test_restore_brings_everything_back(restored, section):
    """A model that is built anew and restored is in the saved state, field by field."""
    assert [str(mismatch) for mismatch in restored[section.name]] == []


def test_capture_draws_no_random_number(saved, section):
    """Random numbers go on after a capture, and a comparison, as they would have without it."""
    before = _generators()
    section.capture(_view(saved.model))
    section.capture_like(_view(saved.model), saved.records[section.name])
    assert _same_generators(before, _generators())


def test_capture_changes_nothing(saved, section):
    """Every attribute of every module, and every byte of every tensor, stays as it is."""
    before = _fingerprint(saved.model)
    section.capture(_view(saved.model))
    section.capture_like(_view(saved.model), saved.records[section.name])
    assert _fingerprint(saved.model) == before


def test_capture_never_asks_for_the_state_dict_of_the_base(saved, section, monkeypatch):
    """`state_dict()` of a 4-bit layer that ran on the CPU repacks its weight."""
    view = _view(saved.model)
    of_base = {id(module) for _, module in view.base_modules()}
    state_dict = nn.Module.state_dict

    def guarded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert of_base.isdisjoint(map(id, self.modules())), "state_dict() was called"
        return state_dict(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "state_dict", guarded)
    section.capture(view)
    section.capture_like(_view(saved.model), saved.records[section.name])
    with pytest.raises(AssertionError, match="was called"):
        saved.model.state_dict()


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_running_a_model_leaves_the_digests_of_its_base(kind, mode, load_base, with_lora):
    """Whether and how a model ran is not seen in what `base_model` records."""
    (section,) = (section for section in SECTIONS if section.name == "base_model")
    model = with_lora(load_base(kind)).train(mode == "train")
    record = section.capture(_view(model))
    for _ in range(2):
        _run(model)
        found = section.capture_like(_view(model), record)
        assert section.compare(record, found) == ()
        model.train(mode != "train")


def _generators() -> tuple[Any, Any, Any]:
    """The states of the random generators."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _same_generators(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> bool:
    """Whether two states are the same."""
    same_numpy = all(map(np.array_equal, one[1], other[1]))
    return one[0] == other[0] and same_numpy and torch.equal(one[2], other[2])


def _fingerprint(value: Any) -> str:
    """A digest over all that can be reached from an object: attributes, hooks, bytes of tensors."""
    hasher, seen, todo = hashlib.sha256(), set[int](), [value]
    while todo:
        value = todo.pop()
        hasher.update(f"{type(value).__module__}.{type(value).__qualname__}:".encode())
        if value is None or type(value) in (str, int, float, bool, bytes):
            hasher.update(repr(value).encode())
            continue
        if id(value) in seen or isinstance(value, (type, types.ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            described = (value.data_ptr(), value.shape, value.dtype, value.requires_grad)
            hasher.update(repr(described).encode())
            hasher.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            todo.append(value.grad)
        elif isinstance(value, Mapping):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, (set, frozenset)):
            todo += sorted(map(repr, value))
        todo += [item for pair in getattr(value, "__dict__", {}).items() for item in pair]
    return hasher.hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.eval(),
        lambda model: next(model.parameters()).data.view(-1)[:1].add_(1),
        lambda model: setattr(model.generation_config, "top_k", 7),
        lambda model: model.base_model.register_forward_hook(print),
        lambda model: model.requires_grad_(requires_grad=True),
        lambda model: model.peft_config["default"].target_modules.add("v_proj"),
    ],
)
def test_fingerprint_tells_a_change(change, load_base, with_lora):
    """What `test_capture_changes_nothing` looks at would show a change."""
    model = with_lora(load_base("bf16")).train()
    before = _fingerprint(model)
    assert _fingerprint(model) == before
    change(model)
    assert _fingerprint(model) != before
