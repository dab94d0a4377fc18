"""Saving and loading the random generators of each of several processes.

No process waits for another one: trainers save on one rank only, sometimes in a signal handler.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import safetensors.torch

from peftstate._digest import json_digest
from peftstate._disk import set_mode, sync_file, sync_folder, usual_mode
from peftstate._folder import AdapterFolder
from peftstate._rank_files import metadata_of, rank_file_name, rank_state, sealed
from peftstate._saver import staging_name
from peftstate._storage import RESERVED_PREFIX
from peftstate._warn import warn
from peftstate._weights import check_tensors, parse_weights
from peftstate.errors import RankStateWarning
from peftstate.sections import rng
from peftstate.sections._process import this_process
from peftstate.sections._tensors import sidecar_tensors, tensor_records, with_tensors
from peftstate.sections._view import ModelView
from peftstate.sections.rng import RankRecord, RngRecord


def rank_of(view: ModelView) -> RankRecord | None:
    """Which of several processes saves this view; `None` if there is but one."""
    here = this_process()
    if here.world_size == 1:
        return None
    tensors = {
        f"{site.adapter}: {site.name}": site.tensor for site in view.tensors() if site.adapter
    }
    described = {name: attrs.astuple(record) for name, record in tensor_records(tensors).items()}
    return RankRecord(rank=here.rank, world_size=here.world_size, adapters=json_digest(described))


def save_rank(view: ModelView, directory: Path) -> None:
    """Save the random generators of this process, whose model another one saves.

    That they cannot be saved is no reason to end a training: the model is not at stake.

    Args:
        view: The model, and the adapters that are saved.
        directory: The folder that they are saved to.
    """
    if this_process().world_size == 1:
        return
    states = rng.states()
    try:
        process = rank_of(view)
        if process is None:
            return
        data = _packed(attrs.evolve(states, process=process))
        for folder in sorted(set(view.folders.values())):
            name = rank_file_name(process.rank, process.world_size)
            _write(directory / folder, name, data)
    except (OSError, ValueError) as error:
        warn(
            f"{directory}: the random generators of rank {this_process().rank} could not be saved "
            f"({error}). A load will leave those of this rank as they stand.",
            RankStateWarning,
        )


def _packed(record: RngRecord) -> bytes:
    """A record as the file of its rank."""
    tensors = {tensor.tensor: tensor.load() for tensor in sidecar_tensors(record)}
    return sealed(safetensors.torch.save(tensors, metadata=metadata_of(record)))


def _write(directory: Path, name: str, data: bytes) -> None:
    """Write a file of an adapter's folder, which has the old or the new one at any moment."""
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    with staging_name() as staging_folder:
        staging = directory / staging_folder
        staging.mkdir()
        written = staging / name
        try:
            written.write_bytes(data)
            set_mode(written, usual_mode(staging, f"{RESERVED_PREFIX}mode"))
            sync_file(written)
            written.replace(directory / name)
            sync_folder(directory)
        finally:
            written.unlink(missing_ok=True)
            staging.rmdir()


def with_own_states(folder: AdapterFolder, sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a manifest, the random generators those that this process's rank saved.

    If it saved none they stay those of the rank that wrote the manifest, and say so.

    Args:
        folder: The folder.
        sections: The sections, their tensors filled in.

    Raises:
        IntegrityError: The rank's file is damaged.
        SchemaVersionError: It was written by a newer peftstate.
    """
    saved: RngRecord = sections[rng.SECTION.name]
    if saved.process is None or rng.is_own(saved):
        return dict(sections)
    name = rank_file_name(this_process().rank, saved.process.world_size)
    try:
        found = rank_state(folder, name, saved.process)
    except FileNotFoundError:
        found = None
    if found is None:
        return dict(sections)
    record, data = found
    path = str(folder.path / name)
    tensors = parse_weights(path, data)
    check_tensors(path, tensors, {tensor.tensor: tensor for tensor in sidecar_tensors(record)})
    return {**sections, rng.SECTION.name: with_tensors(record, tensors)}
