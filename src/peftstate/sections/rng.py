"""`rng`: the random generators of the process.

Loading an adapter itself draws random numbers (PEFT initialises weights that it then
overwrites), so they are put back last. All or nothing: if one cannot be set, all are as before.

When several processes train one model each has its own generators. The manifest has those of the
process that wrote it; the others write a file each (`peftstate._rank_files`), of the same record.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from peftstate._digest import tensor_digest
from peftstate._warn import warn
from peftstate.errors import RankStateWarning, RngMismatchError
from peftstate.sections._base import Section
from peftstate.sections._bit_generators import TWISTER, set_kind, state_of, words_of
from peftstate.sections._generators import Standing, devices
from peftstate.sections._process import this_process
from peftstate.sections._tensors import SidecarTensor

if TYPE_CHECKING:
    import torch

    from peftstate.sections._view import ModelView


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
    """The global generator of `numpy.random`.

    Attributes:
        generator: Its kind: ``"MT19937"``, a Mersenne twister, unless a program set another one.
        state: Its state in words of 32 bits, int64; of a twister 624 of them.
        position: Position in the state; of the other kinds, which have none, 0.
        gauss: The second normal number of a pair, if there is one in hand.
    """

    generator: str
    state: SidecarTensor
    position: int
    gauss: float | None


@attrs.frozen(kw_only=True)
class RankRecord:
    """Which of several processes generators are of.

    Attributes:
        rank: The process's number, from 0.
        world_size: How many processes there were.
        adapters: BLAKE3 over the adapters' tensors, which are the same in all processes: the files
            of ranks that state another digest are of another save.
    """

    rank: int
    world_size: int
    adapters: str


@attrs.frozen(kw_only=True)
class RngRecord:
    """The states of the generators.

    Attributes:
        process: Whose they are; `None` if one process saved alone.
        python: Of `random`.
        numpy: Of `numpy.random`.
        torch_cpu: uint8, shape (5056,): of torch on the CPU.
        accelerators: Of torch on each device: ``"cuda:0"`` → uint8 state.
    """

    process: RankRecord | None
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


def capture_like(_: ModelView, record: RngRecord) -> RngRecord:
    """Read the generators for a comparison; of another rank's, only that they are another's."""
    here, saved = this_process(), record.process
    if not is_own(record):
        process = RankRecord(rank=here.rank, world_size=here.world_size, adapters="")
        if saved is not None:
            process = attrs.evolve(process, adapters=saved.adapters)
        return attrs.evolve(record, process=process)
    found = saved and attrs.evolve(saved, world_size=here.world_size)
    return attrs.evolve(states(), process=found)


def is_own(record: RngRecord) -> bool:
    """Whether generators are those of this process's rank; one that is alone takes any."""
    here = this_process()
    return here.world_size == 1 or here.rank == (record.process.rank if record.process else 0)


def states() -> RngRecord:
    """The states of the generators of this process.

    Raises:
        ValueError: numpy's global generator is of a kind that is not numpy's own.
    """
    import numpy as np
    import torch

    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return RngRecord(
        process=None,
        python=PythonRng(version=version, state=_words("rng.python", words), gauss=gauss),
        numpy=NumpyRng(
            generator=numpy["bit_generator"],
            state=_words("rng.numpy", words_of(numpy)),
            position=int(numpy["state"].get("pos", 0)),
            gauss=float(numpy["gauss"]) if numpy["has_gauss"] else None,
        ),
        torch_cpu=SidecarTensor.of("rng.torch_cpu", torch.get_rng_state()),
        accelerators={
            device: SidecarTensor.of(f"rng.{device}", backend.get_rng_state(index))
            for device, (backend, index) in devices().items()
        },
    )


def restore(record: RngRecord, _: ModelView) -> None:
    """Set every generator that this process has, unless the states are another rank's."""
    here, saved = this_process(), record.process
    rank, world_size = (saved.rank, saved.world_size) if saved else (0, 1)
    if is_own(record):
        set_states(record)
        if world_size != here.world_size:
            warn(
                f"The state was saved by {_processes(world_size)} and is loaded by "
                f"{here.world_size}. The random generators of this process, rank {here.rank}, "
                f"were set to those of rank {rank}; what the processes draw together is not what "
                "it would have been.",
                RankStateWarning,
            )
        return
    warn(
        f"The state was saved by {_processes(world_size)} and is loaded by {here.world_size}. It "
        f"holds no random generators of rank {here.rank}, so those of this process were left as "
        "they stood.",
        RankStateWarning,
    )


def _processes(count: int) -> str:
    """A number of processes in a sentence."""
    return "1 process" if count == 1 else f"{count} processes"


def set_states(record: RngRecord) -> None:
    """Set every generator that this process has.

    Raises:
        ValueError: A state does not fit its generator; all generators are then as they were.
    """
    before = Standing.now()
    try:
        _set(record)
    except BaseException:
        before.put_back()
        raise


def _set(record: RngRecord) -> None:
    """Set the generators one after the other."""
    import torch

    python = record.python
    random.setstate((python.version, tuple(_ints(python.state)), python.gauss))
    _set_numpy(record.numpy)
    _check_torch(record.torch_cpu.load())
    torch.set_rng_state(record.torch_cpu.load())
    present = devices()
    for device, state in record.accelerators.items():
        if device in present:
            backend, index = present[device]
            backend.set_rng_state(state.load(), index)


def _set_numpy(record: NumpyRng) -> None:
    """Set numpy's global generator, to another kind if it is of another one."""
    import numpy as np

    words = _ints(record.state)
    state = state_of(record.generator, words)
    if record.generator == TWISTER:
        if not 0 <= record.position <= len(words):  # numpy would read beyond the end
            raise ValueError(f"the state of numpy's generator has no position {record.position}")
        state["state"]["pos"] = record.position
    set_kind(record.generator)
    has_gauss = record.gauss is not None
    np.random.set_state({**state, "has_gauss": int(has_gauss), "gauss": record.gauss or 0.0})


def _check_torch(state: torch.Tensor) -> None:
    """Refuse a state with which torch would read beyond its end.

    torch looks at two numbers in it, how many words are left and which is the next, but not at both
    (`ATen/core/MT19937RNGEngine.h::mt19937::is_valid`).

    Raises:
        ValueError: They do not fit.
    """
    raw = state.numpy().tobytes()
    if len(raw) >= _TORCH_HEAD.size:
        _, left, _, following = _TORCH_HEAD.unpack_from(raw)
        if left + following > _TWISTER_WORDS + 1:
            raise ValueError("the state of torch's generator has words beyond its end")


_TWISTER_WORDS = 624
_TORCH_HEAD = struct.Struct("=Qiiq")
"""Seed, words left, whether it was seeded, and the next word
(`ATen/CPUGeneratorImpl.cpp::CPUGeneratorImplStateLegacy`)."""


def _ints(state: SidecarTensor) -> list[int]:
    """The words of a state.

    Raises:
        ValueError: There are more than any generator has.
    """
    if (count := state.load().numel()) > _TWISTER_WORDS + 1:
        raise ValueError(f"a state of {count} words, more than any generator has")
    return [int(word) for word in state.load().tolist()]


# one zero byte, for older safetensors reads no empty tensor
_NO_STATE = SidecarTensor(
    tensor="rng.unknown", dtype="uint8", shape=(1,), digest=tensor_digest("uint8", (1,), b"\0")
)
UNKNOWN = RngRecord(
    process=None,
    python=PythonRng(version=0, state=_NO_STATE, gauss=None),
    numpy=NumpyRng(generator="", state=_NO_STATE, position=0, gauss=None),
    torch_cpu=_NO_STATE,
    accelerators={},
)

SECTION = Section(
    name="rng",
    record=RngRecord,
    capture=capture,
    capture_like=capture_like,
    restore=restore,
    unknown=UNKNOWN,
    error=RngMismatchError,
)
