"""The code that a checkpoint brought with it, in the section `base_model`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import transformers
from transformers import dynamic_module_utils

import peftstate
from peftstate._digest import file_digest
from peftstate.errors import BaseModelMismatchError
from peftstate.sections import base_model
from peftstate.sections._remote_code import PACKAGE, remote_code
from peftstate.sections._view import ModelView

CODE = {
    "configuration_remote.py": """
from transformers import LlamaConfig

class RemoteConfig(LlamaConfig):
    model_type = "remote"
""",
    "layers_remote.py": """
from .scale_remote import SCALE

def scaled(logits):
    return logits * SCALE
""",
    "modeling_remote.py": """
from transformers import LlamaForCausalLM
from .configuration_remote import RemoteConfig
from .layers_remote import scaled
from .scale_remote import SCALE  # transformers 4 copies what this file itself imports

class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = scaled(output.logits)
        return output
""",
    "scale_remote.py": "SCALE = 2.0\n",
}
"""A Llama with other logits."""
UNUSED = {"tokenization_remote.py": "raise RuntimeError\n", "train.py": "raise RuntimeError\n"}


@pytest.fixture(autouse=True)
def _isolated_modules(tmp_path, monkeypatch):
    """Have remote code copied below the test's folder, and forgotten afterwards."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def checkpoint(tmp_path, causal_lm):
    """Makes a checkpoint with code in it: `checkpoint(name, **contents of files)`."""

    def make(name: str, **files: str) -> Path:
        folder = Path(tmp_path, name)
        shutil.copytree(causal_lm, folder)
        for file, text in {**CODE, **UNUSED, **files}.items():
            (folder / file).write_text(text)
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = "remote"
        config["architectures"] = ["RemoteForCausalLM"]
        config["auto_map"] = {
            "AutoConfig": "configuration_remote.RemoteConfig",
            "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def load(folder: Path) -> Any:
    """Load a checkpoint with its code, as its user allows."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    )


def digests(**files: str) -> dict[str, str]:
    """What is recorded of the code in a checkpoint."""
    return {name: file_digest(text.encode()) for name, text in {**CODE, **files}.items()}


def differences(record: Any, model: Any) -> list[str]:
    """The differences between a record and a model."""
    found = base_model.capture_like(ModelView.of(model), record)
    return [str(mismatch) for mismatch in base_model.SECTION.compare(record, found)]


def test_files_are_those_that_the_classes_came_from(checkpoint, with_lora):
    """Relative imports included; other files of the repo are not."""
    base = load(checkpoint("one"))
    assert type(base).__module__.startswith(f"{PACKAGE}.one.")
    assert remote_code(ModelView(model=base)) == digests()
    assert remote_code(ModelView.of(with_lora(base))) == digests()


def test_a_model_of_transformers_has_none(load_base):
    """The code of installed packages is told by their versions, in `environment`."""
    assert base_model.capture(ModelView(model=load_base())).remote_code == {}


@pytest.mark.parametrize("name", CODE)
def test_a_changed_file_is_an_error_that_names_it(checkpoint, with_lora, logits, tmp_path, name):
    """Before the base model is touched; the same code in another folder is no difference."""
    model = with_lora(load(checkpoint("one"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peftstate.PeftModel.from_pretrained(load(checkpoint("two")), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))

    changed = {name: CODE[name] + "# changed\n"}
    base = load(checkpoint("three", **changed))
    before = [module for module, _ in base.named_modules()]
    with pytest.raises(BaseModelMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(base, tmp_path / "adapter")
    (mismatch,) = caught.value.mismatches
    saved, found = digests()[name], digests(**changed)[name]
    assert (mismatch.saved, mismatch.found) == (saved, found)
    assert str(mismatch) == (
        f"base_model.remote_code[{name}]: saved {saved[:12]}…, found {found[:12]}…"
    )
    assert [module for module, _ in base.named_modules()] == before


def test_a_file_that_is_imported_no_more_is_a_difference(checkpoint):
    """Each file is named, in both directions."""
    longer = load(checkpoint("one"))
    files = {"layers_remote.py": "def scaled(logits):\n    return logits * 2.0\n"}
    lines = CODE["modeling_remote.py"].splitlines(keepends=True)
    files["modeling_remote.py"] = "".join(line for line in lines if "SCALE" not in line)
    shorter = load(checkpoint("two", **files))
    found = differences(base_model.capture(ModelView(model=longer)), shorter)
    assert [text.partition(":")[0] for text in found] == [
        f"base_model.remote_code[{name}]" for name in (*files, "scale_remote.py")
    ]
    assert found[-1].endswith(", found absent")
    found = differences(base_model.capture(ModelView(model=shorter)), longer)
    assert "saved absent" in found[-1]


def test_the_same_class_without_the_code_is_an_error(checkpoint):
    """A class of the same name that is written down somewhere else may compute something else."""
    base = load(checkpoint("one"))
    record = base_model.capture(ModelView(model=base))
    base.__class__ = type("RemoteForCausalLM", (transformers.LlamaForCausalLM,), {})
    base.config = transformers.LlamaConfig(**base.config.to_dict())
    found = [text for text in differences(record, base) if "remote_code" in text]
    assert len(found) == len(CODE)


def test_files_that_are_gone_are_told(checkpoint, tmp_path):
    """The cache of modules may be emptied while a model runs; then the code is not known."""
    base = load(checkpoint("one"))
    record = base_model.capture(ModelView(model=base))
    shutil.rmtree(tmp_path / "modules")
    found = base_model.capture(ModelView(model=base)).remote_code
    assert found == {"configuration_remote.py": None, "modeling_remote.py": None}
    assert [text.partition(":")[0] for text in differences(record, base)] == [
        f"base_model.remote_code[{name}]" for name in CODE
    ]


def test_files_of_one_name_from_two_repos_are_told_apart(checkpoint):
    """A class may derive from one of another repo; commits are no part of a name."""
    first = load(checkpoint("one"))
    first.extra = load(checkpoint("two", **{"scale_remote.py": "SCALE = 3"}))
    found = remote_code(ModelView(model=first))
    assert found.keys() == {f"{repo}/{name}" for repo in ("one", "two") for name in CODE}
    assert found["two/scale_remote.py"] == file_digest(b"SCALE = 3")


def test_what_an_older_schema_does_not_know_is_not_compared(checkpoint):
    """A manifest of schema 1 says nothing of remote code."""
    base = load(checkpoint("one"))
    record = attrs.evolve(base_model.capture(ModelView(model=base)), remote_code=None)
    assert differences(record, base) == []


@pytest.mark.parametrize("trusts", [True, False])
def test_a_manifest_never_allows_code(checkpoint, with_lora, tmp_path, monkeypatch, trusts):
    """Whether a checkpoint's code may run is the caller's word, and nobody else's."""
    model = with_lora(load(checkpoint("one"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert "trust_remote_code" not in peftstate.base_model_kwargs(tmp_path / "adapter")
    handed = []
    plain = transformers.AutoModelForCausalLM.from_pretrained

    def spy(name: str, **keywords: Any) -> Any:
        handed.append(keywords.get("trust_remote_code"))
        return plain(name, **{**keywords, "trust_remote_code": trusts})

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy)
    auto = peftstate.AutoPeftModelForCausalLM
    if trusts:
        loaded = auto.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
        assert type(loaded.get_base_model()).__name__ == "RemoteForCausalLM"
        assert handed == [True]
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            auto.from_pretrained(tmp_path / "adapter")
        assert handed == [None]
