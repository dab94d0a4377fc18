"""docs/sections.md: its steps, taken in a copy of the repository, give a section that works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.docs._pages import PAGES, ROOT

PAGE = PAGES["docs/sections.md"]
FILES = dict(re.findall(r'^```python title="(.*?)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL))


def _edit(path, before, after):
    """Put one text in the place of another, which stands once in a file."""
    text = path.read_text("utf-8")
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after), "utf-8")


@pytest.fixture
def repository(tmp_path):
    """A copy of the repository in which the page's steps were taken."""
    without = shutil.ignore_patterns("__pycache__")
    for folder in ("src", "tests", "docs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "src" / "peftstate"
    for name, code in FILES.items():
        path = tmp_path / name
        if name.endswith("_upgrades.py"):
            _edit(path, "UPGRADES: dict", f"{code}\n\nUPGRADES: dict")
            _edit(path, "2: _to_3}", "2: _to_3, 3: _to_4}")
        elif path.exists():
            path.write_text(path.read_text("utf-8") + "\n\n" + code, "utf-8")
        else:
            path.write_text(code, "utf-8")
    tuple_of_sections = package / "sections" / "__init__.py"
    _edit(tuple_of_sections, "    extra_tensors,\n", "    epsilon,\n    extra_tensors,\n")
    _edit(
        tuple_of_sections,
        "    training.SECTION,\n",
        "    training.SECTION,\n    epsilon.SECTION,\n",
    )
    _edit(package / "manifest.py", "SCHEMA_VERSION = 3", "SCHEMA_VERSION = 4")
    return tmp_path


def _python(repository, *arguments):
    """Run Python on the copy."""
    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "PYTEST_ADDOPTS": ""}
    subprocess.run([sys.executable, *arguments], cwd=repository, env=environment, check=True)


def test_the_steps_give_a_section(repository):
    """Its own test passes in the copy, and so do those of the tuple; older manifests are read."""
    tests = ["tests/sections/test_epsilon.py", "tests/sections/test_registry.py"]
    _python(repository, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    _python(repository, "-m", "peftstate._schema")
    _python(repository, "docs/fields.py")
    assert "### `epsilon`" in (repository / "docs" / "manifest.md").read_text("utf-8")
    assert "EpsilonRecord" in (repository / "src/peftstate/manifest.schema.json").read_text("utf-8")
    older = "tests/golden/schema-3/causal-lm"
    assert (repository / older).exists()
    _python(repository, "-m", "peftstate", "verify", older)
