"""Which modules import which: one way only, and the heavy packages in few places."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

import peftstate

ROOT = Path(peftstate.__file__).parent
PACKAGE = "peftstate"
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "numpy",
    "peft",
    "safetensors",
    "torch",
    "transformers",
    "trl",
}
"""What takes seconds to import, or imports torch."""
MAY_BE_HEAVY = {
    "_adopting",
    "_api",
    "_auto",
    "_base_loading",
    "_demo",
    "_diagnosing",
    "_initialisation",
    "_injection",
    "_injectors",
    "_install",
    "_loading",
    "_models",
    "_modules",
    "_placeholders",
    "_pushing",
    "_ranks",
    "_rebuilding",
    "_reproducible",
    "_request_rng",
    "_rescue",
    "_saving",
    "_snapshot",
    "_source",
    "_tokenizer_files",
    "_weights",
    "_written",
    "cli",
    "integrations",
    "sections",
}
"""The modules and packages that may import them at all."""
BELOW_SECTIONS = {
    "_codec",
    "_diff",
    "_digest",
    "_modules",
    "_progress",
    "_snapshot",
    "_warn",
    "_work",
    "errors",
    "sections",
}
"""What sections may import of ours."""


@attrs.frozen
class Import:
    """One import of a module of ours.

    Attributes:
        importer: The module that imports, without ``peftstate.``.
        target: What it imports: of ours the module, of others the top-level package.
        is_ours: Whether it is a module of ours.
        is_static: Whether only type checkers see it.
        is_late: Whether it runs when a function is called.
    """

    importer: str
    target: str
    is_ours: bool
    is_static: bool
    is_late: bool


def _module(path: Path) -> str:
    """The name of a module of ours; that of the package itself is empty."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {_module(path): path for path in sorted(ROOT.rglob("*.py"))}


def _statements(
    node: ast.AST, *, static: bool = False, late: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """The import statements below a node, with whether they are static and late."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, static, late
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        for child in node.body:
            yield from _statements(child, static=True, late=late)
        for child in node.orelse:
            yield from _statements(child, static=static, late=late)
        return
    late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for inner in ast.iter_child_nodes(node):
        yield from _statements(inner, static=static, late=late)


def _targets(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The full names of the modules that a statement imports."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    assert statement.level == 0, "imports are absolute"
    for alias in statement.names:
        inner = f"{statement.module}.{alias.name}"
        is_module = inner.removeprefix(f"{PACKAGE}.") in PATHS
        yield inner if is_module else str(statement.module)


def _imports(module: str, source: str) -> Iterator[Import]:
    """Every import in the source of a module of ours."""
    for statement, static, late in _statements(ast.parse(source)):
        for target in _targets(statement):
            top, _, rest = target.partition(".")
            is_ours = top == PACKAGE
            yield Import(module, rest if is_ours else top, is_ours, static, late)


IMPORTS = [
    found for module, path in PATHS.items() for found in _imports(module, path.read_text("utf-8"))
]


def _section(module: str) -> str | None:
    """The section that a module is; `None` for what sections share."""
    package, _, name = module.partition(".")
    return name if package == "sections" and name and not name.startswith("_") else None


def test_imports_are_seen() -> None:
    """The walk of these tests tells the kinds of imports apart."""
    source = """
import os.path
from typing import TYPE_CHECKING
from peftstate import __version__, errors
if TYPE_CHECKING:
    import torch
    from peftstate.sections._base import Section
class A:
    import peft
    def method(self):
        from peftstate.sections import rng
"""
    assert list(_imports("m", source)) == [
        Import("m", "os", is_ours=False, is_static=False, is_late=False),
        Import("m", "typing", is_ours=False, is_static=False, is_late=False),
        Import("m", "", is_ours=True, is_static=False, is_late=False),
        Import("m", "errors", is_ours=True, is_static=False, is_late=False),
        Import("m", "torch", is_ours=False, is_static=True, is_late=False),
        Import("m", "sections._base", is_ours=True, is_static=True, is_late=False),
        Import("m", "peft", is_ours=False, is_static=False, is_late=False),
        Import("m", "sections.rng", is_ours=True, is_static=False, is_late=True),
    ]
    assert {"", "errors", "sections", "sections.rng", "integrations.trainer"} <= PATHS.keys()


def test_one_way() -> None:
    """No module imports itself by way of others."""
    graph: dict[str, set[str]] = {module: set() for module in PATHS}
    for found in IMPORTS:
        if found.is_ours and not found.is_static and not found.is_late:
            graph[found.importer].add(found.target)
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(PATHS)


def test_foundations() -> None:
    """The errors import nothing of ours but `_diff`, and values know nothing of sections."""

    def imported(module: str) -> set[str]:
        return {
            found.target
            for found in IMPORTS
            if found.importer == module and found.is_ours
            if not found.is_static and not found.is_late
        }

    assert imported("errors") == {"_diff"}
    assert imported("_diff") == imported("_digest") == set()
    assert imported("_report") == {"errors", "_diff"}
    assert imported("_codec") == {"_diff"}


@pytest.mark.parametrize("section", sorted(filter(None, map(_section, PATHS))))
def test_sections_apart(section: str) -> None:
    """A section imports no other section, not even for its types."""
    others = {
        _section(found.target) for found in IMPORTS if found.importer == f"sections.{section}"
    }
    assert others <= {None, section}


def test_sections_below() -> None:
    """What sections are made of knows of no section, and of nothing that loads or saves them."""
    for found in IMPORTS:
        if found.importer.startswith("sections.") and found.is_ours and not found.is_static:
            package = found.target.partition(".")[0]
            assert package in BELOW_SECTIONS, found
        if found.importer.startswith("sections._") and found.is_ours:
            assert _section(found.target) is None, found


def test_heavy_in_few_places() -> None:
    """Only some modules import torch and its like at all."""
    heavy = {
        found.importer.partition(".")[0]
        for found in IMPORTS
        if found.target in HEAVY and not found.is_ours and not found.is_static
    }
    assert heavy <= MAY_BE_HEAVY
    for module in ("_steps", "_policy", "_files", "_folder", "_storage", "manifest", "_schema"):
        assert module in PATHS
        assert module not in heavy


def test_sections_are_light() -> None:
    """A section's records are there without torch: it is imported where it is used."""
    for found in IMPORTS:
        if found.importer.partition(".")[0] == "sections" and found.target in HEAVY:
            assert found.is_ours or found.is_static or found.is_late, found


def test_light_modules_import_light_ones() -> None:
    """What need not be heavy imports, when it is imported, nothing that is."""
    graph: dict[str, set[str]] = {module: set() for module in PATHS}
    for found in IMPORTS:
        if not found.is_static and not found.is_late:
            graph[found.importer].add(found.target)
    heavy = {module for module, targets in graph.items() if targets & HEAVY}
    while more := {m for m, targets in graph.items() if targets & heavy} - heavy:
        heavy |= more
    assert {module.partition(".")[0] for module in heavy} <= MAY_BE_HEAVY - {"sections"}
