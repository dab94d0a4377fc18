"""A pytest plugin under which PEFT's own tests run, with PEFT's classes or with ours.

`run.py` loads it (``-p peft_suite.plugin``) in a process of its own, whose tests are PEFT's.
``--classes`` says what ``from peft import PeftModel`` and its like give those tests:

- ``peft``: PEFT's own, to compare with;
- ``peftstate``: ours, as if each test had been edited to import from peftstate;
- ``installed``: PEFT's own, after `peftstate.install`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it, which is when it is imported

import peft
import pytest

import peftstate
from peftstate import _policy

CLASSES = ("peft", "peftstate", "installed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that `run.py` passes."""
    group = parser.getgroup("peftstate")
    group.addoption("--classes", choices=CLASSES, default="peft", help="whose classes are tested")
    group.addoption("--any-base", action="store_true", help="another base model is no error")
    group.addoption("--tests", type=Path, help="a JSON object: each file, and what the ids match")
    group.addoption("--only", type=Path, help="a JSON list of the ids of the tests to run")
    group.addoption("--outcomes", type=Path, help="the JSON file that outcomes are written to")


def pytest_configure(config: pytest.Config) -> None:
    """Put the classes in place, before any test module is imported."""
    for mark in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{mark}: one of PEFT's own")
    classes = config.getoption("--classes")
    if classes == "peftstate":
        sys.modules["peft"] = _View(peft, _replacements())
    elif classes == "installed":
        peftstate.install()
    if config.getoption("--any-base"):
        # As if each test passed on_mismatch=. Some tuners compute tensors from the base model's.
        _policy._BY_DEFAULT |= {"base_model": "warn", "adapters": "warn"}
    _believe_in_the_cache()
    if config.getoption("--outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Outcomes(config.getoption("--outcomes")))


def _replacements() -> dict[str, Any]:
    """What `peft` offers and we have, too: the name, and ours."""
    return {name: getattr(peftstate, name) for name in peftstate.__all__ if hasattr(peft, name)}


class _View(types.ModuleType):
    """A module with some names replaced, for those who import it from now on.

    The module itself stays as it is: our classes call PEFT's through it. What is set on the view is
    set on the module, since tests patch what PEFT's own code reads.
    """

    def __init__(self, module: types.ModuleType, replaced: Mapping[str, Any]) -> None:
        super().__init__(module.__name__, module.__doc__)
        vars(self)["_module"] = module
        vars(self)["_replaced"] = dict(replaced)
        for name in ("__file__", "__loader__", "__package__", "__path__", "__spec__"):
            vars(self)[name] = getattr(module, name)

    def __getattr__(self, name: str) -> Any:
        replaced = vars(self)["_replaced"]
        return replaced[name] if name in replaced else getattr(vars(self)["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self)["_replaced"]:
            vars(self)["_replaced"][name] = value
        else:
            setattr(vars(self)["_module"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(vars(self)["_module"], name)

    def __dir__(self) -> Iterable[str]:
        return dir(vars(self)["_module"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that are not asked for; replace what others have from PEFT's modules."""
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    patterns = _read(config, "--tests")
    only = _read(config, "--only")
    for item in items:
        asked = patterns is None or re.search(patterns[item.path.name], item.nodeid)
        (kept if asked and (only is None or item.nodeid in only) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    if config.getoption("--classes") == "peftstate":
        for module in {item.module for item in items if isinstance(item, pytest.Function)}:
            _replace_globals(module)


def _read(config: pytest.Config, option: str) -> Any:
    """What is in the file that an option names, if it does."""
    path = config.getoption(option)
    return path and json.loads(path.read_text())


def _replace_globals(module: types.ModuleType) -> None:
    """Replace what a test module has from PEFT's submodules (`from peft.peft_model import …`)."""
    ours = {id(getattr(peft, name)): value for name, value in _replacements().items()}
    for name, value in list(vars(module).items()):
        if id(value) in ours:
            setattr(module, name, ours[id(value)])


def _believe_in_the_cache() -> None:
    """Have PEFT's helper that goes online for a model's first use believe that it was used."""

    class _All(dict[str, int]):
        """All models were used."""

        def __contains__(self, model_id: object) -> bool:
            return True

        def __missing__(self, model_id: str) -> int:
            return 0

    utils: Any = importlib.import_module("tests.testing_utils")
    if hasattr(utils, "_HUB_MODEL_ACCESSES"):  # not in older releases
        utils._HUB_MODEL_ACCESSES = _All()


class _Outcomes:
    """Writes what came of each test, at the end of the session."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a phase's outcome; a test passed if its call did and nothing failed around it."""
        if report.when == "call" or report.outcome != "passed":
            expected = getattr(report, "wasxfail", None) is not None
            outcome = "xfailed" if expected and report.skipped else report.outcome
            reason = "" if report.passed else report.longreprtext[-4000:]
            self.outcomes[report.nodeid] = {"outcome": outcome, "reason": reason}

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self.path.write_text(json.dumps(self.outcomes, indent=1))
