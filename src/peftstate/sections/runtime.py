"""`runtime`: the numerics of the process: precision, determinism, choice of kernels.

These settings belong to the process, not to the model, so a load compares them and sets none. They
are set inside `peftstate.reproducible`, and put back when it ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from peftstate._diff import Json
from peftstate.errors import RuntimeMismatchError
from peftstate.sections import _flags, _platform
from peftstate.sections._base import Section
from peftstate.sections._tensors import dtype_name

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView

AUTOCAST_DEVICES = ("cpu", "cuda", "hpu", "mps", "xpu")
"""Kinds of device that are looked at for autocast."""


@attrs.frozen(kw_only=True)
class RuntimeRecord:
    """The numerics of a process.

    Attributes:
        flags: torch's settings of precision, determinism and choice of kernels, as far as this
            torch has them: ``"cudnn.benchmark"`` → false.
        cpu_threads: How many threads share a sum on the CPU; `None` if no tensor of the model is
            there.
        autocast: The dtype of each kind of device for which autocast is on, in the thread that
            captured.
        variables: The environment variables that decide about kernels, as far as they are set, such
            as ``"CUBLAS_WORKSPACE_CONFIG"``.
    """

    flags: Mapping[str, Json]
    cpu_threads: int | None
    autocast: Mapping[str, str]
    variables: Mapping[str, str]


def capture(view: ModelView) -> RuntimeRecord:
    """Read the settings."""
    import torch

    on_cpu = any(site.tensor.device.type == "cpu" for site in view.tensors())
    return RuntimeRecord(
        flags=_flags.read(),
        cpu_threads=torch.get_num_threads() if on_cpu else None,
        autocast={
            device: dtype_name(torch.get_autocast_dtype(device))
            for device in AUTOCAST_DEVICES
            if torch.is_autocast_enabled(device)
        },
        variables=_platform.variables(),
    )


def capture_like(view: ModelView, record: RuntimeRecord) -> RuntimeRecord:
    """Capture for a comparison: flags that the torch of that time did not have say nothing."""
    found = capture(view)
    flags = {name: value for name, value in found.flags.items() if name in record.flags}
    return attrs.evolve(found, flags=flags)


@contextmanager
def applied(record: RuntimeRecord | None, flags: Mapping[str, Json]) -> Iterator[None]:
    """Set flags and the number of threads in the body, and put them back when it ends.

    Autocast is left to the caller's own ``with``, and environment variables are read too early.

    Args:
        record: The settings; `None` for those there are.
        flags: Values of flags that win over the record's.
    """
    saved = {} if record is None else record.flags
    threads = None if record is None else record.cpu_threads
    with _flags.set_to({**saved, **flags}), _cpu_threads(threads):
        yield


@contextmanager
def _cpu_threads(number: int | None) -> Iterator[None]:
    """Compute in so many threads, if this machine has as many processors."""
    import torch

    before = torch.get_num_threads()
    if number is not None and 1 <= number <= (os.cpu_count() or 1):
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


UNKNOWN = RuntimeRecord(flags={}, cpu_threads=None, autocast={}, variables={})

SECTION = Section(
    name="runtime",
    record=RuntimeRecord,
    capture=capture,
    capture_like=capture_like,
    unknown=UNKNOWN,
    error=RuntimeMismatchError,
)
