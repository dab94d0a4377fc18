"""How much memory a load or a save takes at most, each in a process of its own.

Run as a program, it does one of them and prints the figures as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks._generations import silently
from benchmarks._page import ROOT
from benchmarks.fidelity._libraries import PEFT, PEFTSTATE, Library
from benchmarks.performance._workloads import WORKLOADS, Workload

ADAPTERS = 50
"""Further adapters that are loaded to see what one takes."""


@attrs.frozen
class Peak:
    """Resident memory of a process, in bytes.

    Attributes:
        before: Just before the work.
        peak: The most that it was while it was done.
    """

    before: int
    peak: int

    @property
    def increase(self) -> int:
        """What the work took at most."""
        return self.peak - self.before


def _base_of(workload: Workload) -> Any:
    """A base model that has been read, as it is when it has run.

    A checkpoint is mapped into memory, and counts as far as it was read. What reads it first, be it
    a digest or the first prediction, would seem to need memory for it.
    """
    base = workload.make()
    for tensor in base.parameters():
        tensor.view(-1).view(torch.uint8).max()
    return base


def of_load(library: Library, workload: Workload, adapter: Path) -> Peak:
    """The memory of a load onto a bare base model."""
    base = _base_of(workload)
    return _peak_of(partial(library.load, base, adapter, is_trainable=False))


def of_save(library: Library, workload: Workload, adapter: Path) -> Peak:
    """The memory of a save of a model that was just loaded."""
    model = library.load(_base_of(workload), adapter, is_trainable=False)
    with tempfile.TemporaryDirectory() as folder:
        return _peak_of(partial(library.save, model, Path(folder, "saved")))


def of_adapters(library: Library, workload: Workload, adapter: Path) -> Peak:
    """The memory of many further adapters on one live model."""
    model = library.load(_base_of(workload), adapter, is_trainable=False)
    model.load_adapter(str(adapter), "first")

    def load() -> None:
        for number in range(ADAPTERS):
            model.load_adapter(str(adapter), f"further-{number}")

    return attrs.evolve(_peak_of(load), peak=_resident("VmRSS"))


PATHS: Mapping[str, Callable[[Library, Workload, Path], Peak]] = {
    "load": of_load,
    "save": of_save,
    "adapters": of_adapters,
}


def _peak_of(work: Callable[[], object]) -> Peak:
    """Do some work, and see how much memory it took.

    The peak that the kernel keeps is set back before, for making the model may have needed more.
    What was read meanwhile of files that are mapped into memory counts like other memory. What
    making the model has left to the process is given back before, or it would hide what the work
    takes: up to a hundred MB after quantizing, in one run and not in the next.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    result = work()
    peak = _resident("VmHWM")
    del result
    return Peak(before, peak)


def _resident(field: str) -> int:
    """What the kernel says of this process's resident memory: `VmRSS` now, `VmHWM` at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise OSError(f"the kernel does not tell {field}")
    return 1024 * int(found[1])


def measure(path: str, workload: Workload, adapter: Path) -> tuple[Peak, Peak]:
    """Measure plain PEFT and peftstate, each in a process of its own.

    Args:
        path: A name in `PATHS`.
        workload: The base model.
        adapter: The folder of the adapter.
    """
    peft, ours = (_in_process(path, library, workload, adapter) for library in (PEFT, PEFTSTATE))
    return peft, ours


def _in_process(path: str, library: Library, workload: Workload, adapter: Path) -> Peak:
    """Run this module as a program."""
    command = [sys.executable, "-m", "benchmarks.performance._memory"]
    command += [path, library.name, workload.name, str(adapter)]
    done = subprocess.run(  # noqa: S603
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    return Peak(**json.loads(done.stdout))


def main() -> None:
    """Do the work of one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", choices=PATHS)
    parser.add_argument("library", choices=[PEFT.name, PEFTSTATE.name])
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("adapter", type=Path)
    options = parser.parse_args()
    library = PEFT if options.library == PEFT.name else PEFTSTATE
    with silently():
        peak = PATHS[options.path](library, WORKLOADS[options.workload], options.adapter)
    print(json.dumps(attrs.asdict(peak)))


if __name__ == "__main__":
    main()
