"""`rng`: the random generators of the process.

Loading an adapter itself draws random numbers (PEFT initialises weights that it then
overwrites), so they are put back last. All or nothing: if one cannot be set, all are as before.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from peftstate.errors import RngMismatchError
from peftstate.sections._base import Section
from peftstate.sections._generators import devices
from peftstate.sections._tensors import SidecarTensor

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView

TWISTER = "MT19937"
"""The only kind of generator that numpy's old interface knows, and that a manifest has."""


@attrs.frozen(kw_only=True)
class PythonRng:
    """The generator of `random`.

    Attributes:
        version: Version of the state, as `random.getstate` gives it.
        state: int64, shape (625,): the Mersenne twister and its position.
        gauss: The second normal number of a pair, if `random.gauss` has one in hand.
    """

    version: int
    state: SidecarTensor
    gauss: float | None


@attrs.frozen(kw_only=True)
class NumpyRng:
    """The global generator of `numpy.random`, a Mersenne twister.

    Attributes:
        state: int64, shape (624,).
        position: Position in the state.
        gauss: The second normal number of a pair, if there is one in hand.
    """

    state: SidecarTensor
    position: int
    gauss: float | None


@attrs.frozen(kw_only=True)
class RngRecord:
    """The states of the generators.

    Attributes:
        python: Of `random`.
        numpy: Of `numpy.random`.
        torch_cpu: uint8, shape (5056,): of torch on the CPU.
        accelerators: Of torch on each device: ``"cuda:0"`` → uint8 state.
    """

    python: PythonRng
    numpy: NumpyRng
    torch_cpu: SidecarTensor
    accelerators: Mapping[str, SidecarTensor]


def _words(name: str, words: object) -> SidecarTensor:
    """32-bit words, as they stand in the sidecar: older safetensors knows no uint32."""
    import torch

    return SidecarTensor.of(name, torch.tensor(words, dtype=torch.int64))


def capture(_: ModelView) -> RngRecord:
    """Read the generators without drawing from them."""
    return states()


def states() -> RngRecord:
    """The states of the generators of this process.

    Raises:
        ValueError: numpy's global generator is not the one it has by default.
    """
    import numpy as np
    import torch

    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    if numpy["bit_generator"] != TWISTER:
        raise ValueError(
            f"numpy's global generator is a {numpy['bit_generator']}, of which the state is not "
            f"saved; give it a {TWISTER} with numpy.random.set_bit_generator"
        )
    return RngRecord(
        python=PythonRng(version=version, state=_words("rng.python", words), gauss=gauss),
        numpy=NumpyRng(
            state=_words("rng.numpy", numpy["state"]["key"].tolist()),
            position=int(numpy["state"]["pos"]),
            gauss=float(numpy["gauss"]) if numpy["has_gauss"] else None,
        ),
        torch_cpu=SidecarTensor.of("rng.torch_cpu", torch.get_rng_state()),
        accelerators={
            device: SidecarTensor.of(f"rng.{device}", backend.get_rng_state(index))
            for device, (backend, index) in devices().items()
        },
    )


def restore(record: RngRecord, _: ModelView) -> None:
    """Set every generator that this process has."""
    set_states(record)


def set_states(record: RngRecord) -> None:
    """Set every generator that this process has.

    Raises:
        ValueError: A state does not fit its generator; all generators are then as they were.
    """
    before = states()
    try:
        _set(record)
    except BaseException:
        _set(before)
        raise


def _set(record: RngRecord) -> None:
    """Set the generators one after the other."""
    import numpy as np
    import torch

    python, numpy = record.python, record.numpy
    words = _ints(numpy.state)
    if not 0 <= numpy.position <= len(words):  # numpy would read beyond the end
        raise ValueError(f"the state of numpy's generator has no position {numpy.position}")
    random.setstate((python.version, tuple(_ints(python.state)), python.gauss))
    np.random.set_state(
        (
            TWISTER,
            np.array(words, dtype=np.uint32),
            numpy.position,
            int(numpy.gauss is not None),
            numpy.gauss or 0.0,
        )
    )
    torch.set_rng_state(record.torch_cpu.load())
    present = devices()
    for device, state in record.accelerators.items():
        if device in present:
            backend, index = present[device]
            backend.set_rng_state(state.load(), index)


def _ints(state: SidecarTensor) -> list[int]:
    """The words of a state."""
    return [int(word) for word in state.load().tolist()]


SECTION = Section(
    name="rng",
    record=RngRecord,
    capture=capture,
    restore=restore,
    error=RngMismatchError,
)
