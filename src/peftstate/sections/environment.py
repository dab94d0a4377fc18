"""`environment`: versions of the libraries, and the devices.

Nothing of it can be restored. A difference explains why the last bits may differ, and is a warning
unless the caller asks for more.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from peftstate.errors import EnvironmentMismatchError
from peftstate.sections._base import Section

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "flash-attn",
    "kernels",
    "liger-kernel",
    "peft",
    "safetensors",
    "torch",
    "transformers",
    "trl",
    "unsloth",
)
"""Distributions whose version is recorded if they are installed."""


@attrs.frozen(kw_only=True)
class EnvironmentRecord:
    """Where a model was saved.

    Attributes:
        python: Version of Python.
        packages: Version of each installed distribution of `PACKAGES`.
        cuda: Version of CUDA that torch was built for, or `None`.
        machine: Architecture of the processor, such as ``"x86_64"``.
        devices: Kinds of device that the model's tensors are on, such as ``("cpu",)``.
        accelerators: Names of the CUDA or XPU devices that torch sees.
    """

    python: str
    packages: Mapping[str, str]
    cuda: str | None
    machine: str
    devices: tuple[str, ...]
    accelerators: tuple[str, ...]


def capture(view: ModelView) -> EnvironmentRecord:
    """Read versions and devices."""
    import torch

    return EnvironmentRecord(
        python=platform.python_version(),
        packages=_versions(),
        cuda=torch.version.cuda,
        machine=platform.machine(),
        devices=tuple(sorted({site.tensor.device.type for site in view.tensors()})),
        accelerators=_accelerators(),
    )


def _versions() -> dict[str, str]:
    """The versions of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _accelerators() -> tuple[str, ...]:
    """The names of the accelerators, in the order of their indices."""
    import torch

    for backend in (torch.cuda, torch.xpu):
        if backend.is_available():
            return tuple(
                f"{index}: {backend.get_device_name(index)}"
                for index in range(backend.device_count())
            )
    return ()


SECTION = Section(
    name="environment",
    record=EnvironmentRecord,
    capture=capture,
    error=EnvironmentMismatchError,
)
