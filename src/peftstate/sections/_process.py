"""Which of several processes this one is, if several train one model."""

from __future__ import annotations

import os

import attrs


@attrs.frozen
class Process:
    """A process among those that were launched together.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are.
    """

    rank: int
    world_size: int


ALONE = Process(0, 1)
"""The only process there is."""


def this_process() -> Process:
    """Which process this is, without asking the others.

    Before `torch.distributed` is initialised it is what the launcher says: `torchrun` and
    `accelerate launch` set both variables for each process.
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Process(torch.distributed.get_rank(), torch.distributed.get_world_size())
    try:
        process = Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except (KeyError, ValueError):
        return ALONE
    return process if 0 <= process.rank < process.world_size else ALONE
