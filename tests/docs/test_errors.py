"""docs/errors.md: what it shows of each error is what somebody sees who meets it."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import peft
import pytest
import transformers
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import peftstate
from peftstate import Mismatch, Report, errors
from peftstate._diff import steps
from peftstate._vllm_args import engine_arguments
from peftstate.sections import SECTIONS
from tests.docs._pages import PAGES, ROOT

PAGE = PAGES["docs/errors.md"]
GOLDEN = ROOT / "tests" / "golden"

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


def shown(name):
    """The text that the page shows under the heading of a class."""
    section = re.search(rf"^#+ `{name}`\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    return re.search(r"```text\n(.*?)\n```", section, re.DOTALL)[1]


def matches(text, error):
    """Whether a text is an error's; `…` stands for anything."""
    pattern = ".*".join(map(re.escape, text.split("…")))
    return re.fullmatch(pattern, str(error), re.DOTALL) is not None


# Each provokes its error in a folder with an adapter.


def _not_found(load_base):
    peftstate.read_manifest("adaptor")


def _no_manifest(load_base):
    Path("adapter", "peftstate.json").unlink()
    peftstate.read_manifest("adapter")


def _manifest(load_base):
    peftstate.adopt("adapter")


def _no_json(load_base):
    manifest = Path("adapter", "peftstate.json")
    manifest.write_text(manifest.read_text().replace('"schema_version": 3,', ""))
    peftstate.read_manifest("adapter")


def _newer(load_base):
    manifest = Path("adapter", "peftstate.json")
    manifest.write_text(json.dumps({"schema_version": 4}))
    peftstate.read_manifest("adapter")


def _damaged(load_base):
    weights = Path("adapter", "adapter_model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    peftstate.PeftModel.from_pretrained(load_base(), "adapter")


def _public_key():
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    key = Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(serialization.Encoding.PEM, spki)


def _not_signed(load_base):
    peftstate.PeftModel.from_pretrained(load_base(), "adapter", trusted_keys=[_public_key()])


def _dora(load_base):
    config = peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True)
    peftstate.get_peft_model(load_base(), config).save_pretrained("dora")
    engine_arguments("dora", base="org/base")


def _no_server(load_base):
    peftstate.probe("http://127.0.0.1:9", "adapter")


def _no_key(load_base):
    model = peftstate.get_peft_model(load_base(), peft.LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained("adapter", sign_with="missing.pem")


def _not_alone(load_base):
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa_niter_4")
    peftstate.get_peft_model(load_base(), config).save_pretrained("pissa")
    model = peftstate.PeftModel.from_pretrained(load_base(), "adapter")
    model.load_adapter("pissa", "pissa")


def _other_architecture(load_base):
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    base = transformers.AutoModelForCausalLM.from_config(config)
    peftstate.PeftModel.from_pretrained(base, "adapter", on_mismatch={"base_model": "ignore"})


PROVOKED = {
    "AdapterNotFoundError": _not_found,
    "ManifestNotFoundError": _no_manifest,
    "ManifestExistsError": _manifest,
    "ManifestDecodeError": _no_json,
    "SchemaVersionError": _newer,
    "IntegrityError": _damaged,
    "SignatureError": _not_signed,
    "NotServableError": _dora,
    "ServerError": _no_server,
    "SaveError": _no_key,
    "RestoreError": _not_alone,
    "AdapterLoadError": _other_architecture,
}
"""By the class of the error, what raises it."""


@pytest.fixture
def adapter(load_base, with_lora, tmp_path, monkeypatch):
    """A folder `adapter` in the current one."""
    monkeypatch.chdir(tmp_path)
    with_lora(load_base()).eval().save_pretrained("adapter", prediction_probe=True)


@pytest.mark.parametrize("name", PROVOKED)
@pytest.mark.usefixtures("adapter")
def test_what_an_error_looks_like(name, load_base):
    """The text on the page is what the error says when it is met."""
    with pytest.raises(getattr(errors, name)) as caught:
        PROVOKED[name](load_base)
    assert type(caught.value).__name__ == name
    assert matches(shown(name), caught.value), str(caught.value)


MISMATCHES = {
    section.error.__name__: section for section in SECTIONS if section.error.section == section.name
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_a_mismatch_looks_like(name):
    """The text on the page is what a report with that difference raises, of a field there is."""
    section = MISMATCHES[name]
    line = rf"^  {section.name}\.(.*): saved (.*), found (.*)$"
    field, *values = re.search(line, shown(name), re.MULTILINE).groups()
    saved, found = map(_value, values)
    assert type(saved) in {type(value) for value in _recorded(section.name, steps(field))}
    with pytest.raises(section.error) as caught:
        Report((Mismatch(section.name, field, saved, found),), (section.name,)).raise_for_mismatch()
    assert shown(name) == str(caught.value)


def _value(text):
    """What was printed; of a digest only its beginning was."""
    if re.fullmatch("[0-9a-f]{12}…", text):
        return text.removesuffix("…").ljust(64, "0")
    return ast.literal_eval(text)


def _recorded(section, path):
    """What the golden manifests have at a place."""
    for manifest in GOLDEN.rglob("peftstate.json"):
        value = json.loads(manifest.read_bytes())["sections"].get(section)
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        yield value


def test_what_an_engine_says():
    """A server's engine that is set up otherwise names the adapter, and what it should be."""
    report = Report((Mismatch("dtype", "base.default", "bfloat16", "float32"),), ("dtype",))
    error = errors.EngineMismatchError("adapters/poet", report)
    assert shown("EngineMismatchError") == str(error)


def test_every_error_is_explained():
    """The page of errors has a heading for each class of `peftstate.errors`."""
    classes = {
        name
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, (errors.PeftStateError, errors.PeftStateWarning))
    }
    headings = set(re.findall(r"^#+ `(\w+)`$", PAGE, re.MULTILINE))
    assert headings == classes
