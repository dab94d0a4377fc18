"""Saves that happen elsewhere: with other versions of the libraries, on another machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from peftstate.sections import _platform


def with_version(package: str, version: str) -> Callable[[], AbstractContextManager[object]]:
    """Have a package pass for another version."""
    there = {**_platform.versions(), package: version}
    return lambda: mock.patch.object(_platform, "versions", return_value=there)


def versions(package: str) -> Callable[[Any], dict[str, str]]:
    """Reads the version of a package."""
    return lambda _: {package: _platform.versions()[package]}


def on_another_machine() -> AbstractContextManager[object]:
    """Have this be a machine with an accelerator."""
    return mock.patch.object(_platform, "accelerators", return_value=("0: NVIDIA H100",))


def accelerators(_: Any) -> dict[str, str]:
    """Reads which accelerators there are."""
    return {"accelerators": ", ".join(_platform.accelerators())}
