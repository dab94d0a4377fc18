"""What README and docs show is what happens: each block of code is run, or held to what there is.

CONTRIBUTING.md says for authors of pages which names a block may use, and what is done with it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import re
import runpy
import shlex
import shutil
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import attrs
import peft
import pytest
import torch
import transformers
import typer
from _tiny import tiny_checkpoint
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

import peftstate
from peftstate import errors
from peftstate.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text("utf-8")
    for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
}
LANGUAGES = {"console", "json", "python", "sh", "text"}
RUN_ELSEWHERE = {
    "docs/hub.md",  # tests/hub/test_docs.py, with a Hub
    "docs/sections.md",  # tests/test_sections_page.py, in a copy of the repository
}
FRESH = {"base", "fresh_base"}
"""Names that stand for another model each time that they are used."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of what other libraries will rename
    pytest.mark.filterwarnings("ignore:Could not find a config file in org/base:UserWarning"),
]


@attrs.frozen
class Block:
    """A block of code.

    Attributes:
        language: What its fence says that it is in.
        code: What is in it.
        follows: Whether nothing but an empty line is between it and the block above.
    """

    language: str
    code: str
    follows: bool


def blocks_of(page):
    """The blocks of a page, in order."""
    found = []
    end = None
    for match in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", PAGES[page], re.MULTILINE):
        follows = end is not None and not PAGES[page][end : match.start()].strip()
        language = match[2].partition(" ")[0]
        found.append(Block(language, textwrap.dedent(match[3]), follows))
        end = match.end()
    return found


def with_blocks(*languages):
    """The pages that have blocks in one of these languages."""
    return [page for page in PAGES if any(b.language in languages for b in blocks_of(page))]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    """So that none is passed over."""
    assert {block.language for block in blocks_of(page)} <= LANGUAGES


@pytest.mark.parametrize("page", with_blocks("json"))
def test_json_can_be_read(page):
    """An example of JSON is JSON."""
    for block in blocks_of(page):
        if block.language == "json":
            json.loads(block.code)


# Python, and commands with their output


class Names(dict[str, Any]):
    """The names of a page's program; those that it need not make are made when they are used."""

    def __init__(self, makers, names):
        super().__init__(names)
        self.makers = makers

    def __missing__(self, name):
        """Make a value, and keep it if it is not to be another one each time."""
        value = self.makers[name]()
        if name not in FRESH:
            self[name] = value
        return value


@pytest.fixture(scope="module")
def adapter(load_base, with_lora, tmp_path_factory):
    """The folder of an adapter on a base model in nf4."""
    folder = tmp_path_factory.mktemp("adapter")
    with_lora(load_base("nf4")).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def names(load_base, adapter, tmp_path, monkeypatch):
    """What all pages may use, in a folder that they may write to."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "adapter")
    _write_keys()

    def load():
        return load_base("nf4")

    makers = {
        "base": load,
        "fresh_base": load,
        "model": lambda: peftstate.PeftModel.from_pretrained(load(), "adapter"),
    }
    given = {
        "input_ids": torch.tensor([[4, 5, 6]]),
        "lora_config": peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
        "path": "adapter",
        "seed": 3,
    }
    return Names(makers, given)


def _write_keys():
    """Make the keys that pages sign with."""
    private = Ed25519PrivateKey.generate()
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    pkcs8, spki = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo
    Path("key.pem").write_bytes(private.private_bytes(pem, pkcs8, plain))
    Path("key.pub").write_bytes(private.public_key().public_bytes(pem, spki))


@pytest.mark.parametrize(
    "page", [p for p in with_blocks("python", "console") if p not in RUN_ELSEWHERE]
)
def test_the_code_runs(page, names):
    """A page's blocks run one after the other, and print what the page says."""
    prepared = PREPARED.get(page, {})
    printed = ""
    try:
        for block in blocks_of(page):
            for text, prepare in prepared.items():
                if text in block.code:
                    prepare(names)
            if block.language == "python":
                printed = _run(block.code, names)
            elif block.language == "text" and block.follows:
                assert printed == block.code
            elif block.language == "console":
                _compare_console(block.code)
    finally:
        peftstate.uninstall()


def _run(code, names):
    """Run a block, and give what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "<block>", "exec"), names, names)  # noqa: S102 - the page's own code
    return output.getvalue()


def _compare_console(code):
    """Run our commands of a block, and compare what they print; `…` stands for anything."""
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", code, re.MULTILINE):
        program, *arguments = shlex.split(command)
        if program == "peftstate" and arguments[0] != "probe":  # which needs a server
            result = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(app, arguments)
            pattern = ".*".join(map(re.escape, expected.split("…")))
            assert re.fullmatch(pattern, result.output, re.DOTALL), result.output


def test_the_readme_shows_an_error_as_it_is(load_base, adapter):
    """It is what a base model in fp4 raises, where the adapter was trained in nf4."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    )
    base = load_base("bf16", quantization_config=config)
    with pytest.raises(errors.QuantizationMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(base, adapter)
    assert f"peftstate.errors.QuantizationMismatchError: {caught.value}\n" in PAGES["README.md"]


# What some pages need besides


def _anew(names):
    """The adapter's folder, and the model, as they were in the beginning."""
    names.pop("model", None)
    shutil.rmtree("adapter")
    names["model"] = peftstate.get_peft_model(names["base"], names["lora_config"])
    names["model"].save_pretrained("adapter")


def _another_adapter(names):
    """A second adapter for the same base model."""
    _anew(names)
    names["model"].save_pretrained("another-adapter")


def _for_trl(names):
    """A model with its tokenizer, for `SFTTrainer`, and texts."""
    trl = pytest.importorskip("trl")
    import datasets

    names["model"] = tiny_checkpoint(Path("tiny"))
    # By default it wants a GPU.
    args = trl.SFTConfig(output_dir="run", max_steps=1, use_cpu=True, bf16=False, report_to=[])
    names["SFTTrainer"] = functools.partial(trl.SFTTrainer, args=args)
    names["config"] = peft.LoraConfig(task_type="CAUSAL_LM")
    names["data"] = datasets.Dataset.from_dict({"text": ["The baker opened the window."] * 8})


def _for_accelerate(names):
    """What a training script prepares."""
    import accelerate

    names["accelerator"] = accelerate.Accelerator(cpu=True)
    names["optimizer"] = torch.optim.SGD(names["model"].parameters())
    names["loader"] = torch.utils.data.DataLoader([1, 2])


def _first_rank(names):
    """The number of a process among several."""
    names["rank"] = 0


def _two_saves(names):
    """An adapter before and after."""
    shutil.copytree("adapter", "before")
    shutil.copytree("adapter", "after")


def _poet(names):
    """An adapter on a base model of the Hub's, which vLLM can serve."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        names["base"].config._name_or_path, dtype=torch.bfloat16
    )
    base.config._name_or_path = base.name_or_path = "org/base"
    names["model"] = peftstate.get_peft_model(base, names["lora_config"])
    names["model"].save_pretrained("adapters/poet")


PREPARED = {
    "README.md": {
        "SFTTrainer(": _for_trl,
        "peftstate.install()": _anew,
        "another-adapter": _another_adapter,
        "peftstate.verify(": _anew,
    },
    "docs/distributed.md": {"get_model_state_dict": _first_rank, "register": _for_accelerate},
    "docs/manifest.md": {'read_manifest("before")': _two_saves},
    "docs/vllm.md": {"vllm-args": _poet},
}
"""By page, what is done before a block that contains a text."""


# Commands

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
OTHERS = {
    *("accelerate", "cd", "git", "hf", "lm_eval", "mkdocs", "model_signing", "openssl"),
    *("pytest", "ruff", "sha256sum", "torchrun", "vllm"),
}
"""Programs that are not ours, and whose options are theirs."""


def commands_of(page):
    """The commands of a page, as lists of words."""
    for block in blocks_of(page):
        lines = block.code.replace("\\\n", " ").splitlines()
        if block.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif block.language != "sh":
            continue
        for line in lines:
            words = shlex.split(line, comments=True)
            words = [
                word for place, word in enumerate(words) if "=" not in word or any(words[:place])
            ]
            if words:
                yield words


@pytest.mark.parametrize("page", with_blocks("sh", "console"))
def test_the_commands_exist(page):
    """Each command, and each of its options, is one that there is."""
    for program, *arguments in commands_of(page):
        if program == "peftstate":
            _check_ours(arguments)
        elif program == "make":
            targets = [word for word in arguments if "=" not in word]
            assert set(targets) <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
        elif program == "python":
            _check_python(arguments)
        elif program == "pip":
            wanted = re.findall(r"peftstate\[(.*?)\]", " ".join(arguments))
            assert set(wanted) <= EXTRAS.keys()
        else:
            assert program in OTHERS, f"{page}: how is {program} to be checked?"
            if "peftstate" in arguments:
                _check_ours(arguments[arguments.index("peftstate") + 1 :])


def _check_ours(arguments):
    """Have our own parser take the arguments of the program."""
    name, *rest = arguments
    typer.main.get_command(app).commands[name].make_context(name, rest)


def _check_python(arguments):
    """A script or a module of this repository, or of the package's, is there."""
    if arguments[0] == "-m":
        place = arguments[1].replace(".", "/")
        found = [root / name for root in (ROOT, ROOT / "src") for name in (place, f"{place}.py")]
        assert any(path.exists() for path in found), arguments[1]
        if arguments[1] == "peftstate":
            _check_ours(arguments[2:])
    else:
        assert (ROOT / arguments[0]).exists(), arguments[0]


# Links

LINK = re.compile(r"\]\(([^)\s]+)\)")


def _anchors(page):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """A link to a file of the repository, or to a heading in one, finds it."""
    text = re.sub(r"^( *)```.*?^\1```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / page if not path else (ROOT / page).parent / path
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


# Completeness


def test_every_public_name_is_in_the_reference():
    """The pages of the API name each of `peftstate.__all__`."""
    reference = "".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    named = set(re.findall(r"(?:^::: |`)peftstate\.(\w+)\b", reference, re.MULTILINE))
    assert set(peftstate.__all__) <= named


def test_every_command_is_on_its_page():
    """Commands and options are on the page as the program's own help has them.

    If not, run ``python docs/commands.py``.
    """
    page = PAGES["docs/cli.md"]
    assert runpy.run_path(str(ROOT / "docs" / "commands.py"))["with_commands"](page) == page


def test_every_error_is_explained():
    """The page of errors has a heading for each class of `peftstate.errors`."""
    classes = {
        name
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, (errors.PeftStateError, errors.PeftStateWarning))
    }
    headings = set(re.findall(r"^#+ `(\w+)`$", PAGES["docs/errors.md"], re.MULTILINE))
    assert headings == classes
