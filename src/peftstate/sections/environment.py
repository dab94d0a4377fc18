"""`environment`: versions of the libraries, and the devices.

Nothing of it can be restored. A difference explains why the last bits may differ, and is a warning
unless the caller asks for more.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from peftstate.errors import EnvironmentMismatchError
from peftstate.sections import _platform
from peftstate.sections._base import Section

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView


@attrs.frozen(kw_only=True)
class EnvironmentRecord:
    """Where a model was saved.

    Attributes:
        python: Version of Python.
        packages: Versions of the installed libraries that take part: ``"torch"`` → ``"2.13.0"``.
        cuda: Version of CUDA that torch was built for, or `None`.
        machine: Architecture of the processor, such as ``"x86_64"``.
        devices: Kinds of device that the model's tensors are on, such as ``("cpu",)``.
        accelerators: Names of the CUDA or XPU devices that torch sees.
        processor: Name of the processor, and the instructions that torch uses; `None` if no tensor
            of the model is there.
    """

    python: str
    packages: Mapping[str, str]
    cuda: str | None
    machine: str
    devices: tuple[str, ...]
    accelerators: tuple[str, ...]
    processor: str | None


def capture(view: ModelView) -> EnvironmentRecord:
    """Read versions and devices."""
    import torch

    devices = sorted({site.tensor.device.type for site in view.tensors()})
    return EnvironmentRecord(
        python=platform.python_version(),
        packages=_platform.versions(),
        cuda=torch.version.cuda,
        machine=platform.machine(),
        devices=tuple(devices),
        accelerators=_platform.accelerators(),
        processor=_platform.processor() if "cpu" in devices else None,
    )


SECTION = Section(
    name="environment",
    record=EnvironmentRecord,
    capture=capture,
    error=EnvironmentMismatchError,
)
