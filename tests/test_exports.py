"""The public names, and that the light ones stay light."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import peftstate
from peftstate.manifest import SCHEMA_VERSION

GOLDEN = Path(__file__).parent / "golden" / f"schema-{SCHEMA_VERSION}" / "causal-lm"
HEAVY = ("accelerate", "bitsandbytes", "numpy", "peft", "safetensors", "torch", "transformers")


def test_all() -> None:
    """`__all__` holds every public name, sorted; `dir` shows them."""
    assert peftstate.__all__ == sorted(peftstate._HOMES)
    assert len(set(peftstate.__all__)) == len(peftstate.__all__)
    assert set(dir(peftstate)) >= {*peftstate.__all__, "__version__"}
    assert all(not name.startswith("_") for name in peftstate.__all__)


@pytest.mark.parametrize("name", peftstate.__all__)
def test_importable(name: str) -> None:
    """Every public name is there, is documented, and is what its module calls so."""
    value = getattr(peftstate, name)
    module = importlib.import_module(f"peftstate.{peftstate._HOMES[name]}")
    assert value is (module if inspect.ismodule(value) else getattr(module, name))
    assert inspect.getdoc(value)
    namespace: dict[str, object] = {}
    exec(f"from peftstate import {name}", namespace)  # noqa: S102
    assert namespace[name] is value


def test_unknown_name() -> None:
    """A name that does not exist is an attribute error, as in any module."""
    with pytest.raises(AttributeError, match=r"^module 'peftstate' has no attribute 'nothing'$"):
        peftstate.nothing  # noqa: B018
    with pytest.raises(ImportError):
        exec("from peftstate import nothing")  # noqa: S102


def test_static_names() -> None:
    """Type checkers see the same names, from the same modules, as those who run the code."""
    tree = ast.parse(Path(peftstate.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "re-exports are written `name as name`"
            home = alias.name if node.module == "peftstate" else str(node.module)
            seen[alias.name] = home.removeprefix("peftstate.")
    assert seen == peftstate._HOMES


def _imported(code: str) -> set[str]:
    """Which of the heavy packages a new process has imported after some code."""
    code = f"import sys\n{code}\nprint(*sys.modules.keys() & set({HEAVY!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_import_is_light() -> None:
    """Importing the package, and its errors, imports none of the heavy packages."""
    assert _imported("import peftstate; peftstate.errors.IntegrityError") == set()


def test_files_are_light() -> None:
    """Neither does reading, verifying and comparing what was saved."""
    code = f"""
import peftstate
folder = {str(GOLDEN)!r}
manifest = peftstate.read_manifest(folder)
assert manifest.sections.keys() >= {{"base_model", "rng"}}
assert peftstate.verify_files(folder).ok
report = peftstate.diff(manifest, peftstate.read_manifest(folder))
assert isinstance(report, peftstate.Report) and report.ok, str(report)
peftstate.Manifest.from_json(manifest.to_json(), path="")
"""
    assert _imported(code) == set()


def test_heavy_is_seen() -> None:
    """The tests above would see it: a module that needs torch imports it."""
    assert "torch" in _imported("import peftstate._snapshot")
