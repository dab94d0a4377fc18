"""Saves that happen elsewhere: with other versions of the libraries, on another machine."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from peftstate.sections import _platform


def with_version(package: str, version: str) -> Callable[[], AbstractContextManager[object]]:
    """Have a package pass for another version."""
    real = importlib.metadata.version
    return lambda: mock.patch(
        "importlib.metadata.version",
        lambda name: version if name == package else real(name),
    )


def versions(package: str) -> Callable[[Any], dict[str, str]]:
    """Reads the version of a package."""
    return lambda _: {package: importlib.metadata.version(package)}


def on_another_machine() -> AbstractContextManager[object]:
    """Have this be a machine with an accelerator."""
    return mock.patch.object(_platform, "accelerators", return_value=("0: NVIDIA H100",))


def accelerators(_: Any) -> dict[str, str]:
    """Reads which accelerators there are."""
    return {"accelerators": ", ".join(_platform.accelerators())}
