"""The commands that README and pages show are ones that there are."""

from __future__ import annotations

import re
import runpy
import shlex
import tomllib

import pytest
import typer

from peftstate.cli.app import app
from tests.docs._pages import PAGES, ROOT, blocks_of, with_blocks

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


def test_every_command_is_on_its_page():
    """Commands and options are on the page as the program's own help has them.

    If not, run ``python docs/commands.py``.
    """
    page = PAGES["docs/cli.md"]
    assert runpy.run_path(str(ROOT / "docs" / "commands.py"))["with_commands"](page) == page
