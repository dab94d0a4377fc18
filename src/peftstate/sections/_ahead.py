"""Digests of a base model's large tensors, computed while an adapter is put into it.

Only large ones: whenever a thread has done with a tensor it waits until the thread that works on
the model lets it go on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import attrs

from peftstate._progress import progress
from peftstate._work import Work
from peftstate.errors import RestoreError
from peftstate.sections import _bitsandbytes_forms as forms
from peftstate.sections._base_tensors import BaseTensor, base_tensors
from peftstate.sections._host_bytes import wait_until_written
from peftstate.sections._remembered import remembered_digest
from peftstate.sections._seen import Looks
from peftstate.sections._tensors import TensorRecord

if TYPE_CHECKING:
    import torch

    from peftstate.sections._view import ModelView

LARGE = 256 * 1024
"""Bytes; BLAKE3 takes about as long for them as Python to ask for it."""


@attrs.frozen
class _Job:
    """A tensor to digest, over a dtype."""

    name: str
    tensor: torch.Tensor
    dtype: str

    def run(self) -> str | RestoreError:
        """The digest, or why there is none."""
        try:
            return remembered_digest(self.tensor, self.dtype)
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            reason = f"{type(error).__name__}: {error}"
            message = f"the tensor {self.name} of the base model could not be read ({reason})"
            failure = RestoreError("base_model", message)
            failure.__cause__ = error
            return failure


@attrs.frozen
class Ahead:
    """Digests that are being computed.

    Attributes:
        saved: The records of the tensors, by their names.
        _keys: By these names, which job gives the digest; of tied tensors it is one.
        _jobs: The jobs, in the order in which they were begun.
    """

    saved: Mapping[str, TensorRecord]
    _looks: Looks | None
    _keys: Mapping[str, tuple[int, str]]
    _jobs: Sequence[tuple[int, str]]
    _work: Work[_Job, str | RestoreError]

    @classmethod
    def begun(cls, view: ModelView, saved: Mapping[str, TensorRecord]) -> Ahead:
        """Begin, with tensors that must not be written to until `agrees` was called.

        Another may take the place of one, which then stays in memory as long.

        Args:
            view: The bare base model; what is digested goes into its `looks`.
            saved: What `large_tensors` gave.
        """
        found = base_tensors(view)
        keys = {name: _key(found[name], record) for name, record in saved.items()}
        jobs = {  # of tied tensors one; without the parameter, which may be given other data
            keys[name]: _Job(name, found[name].tensor.detach(), record.dtype)
            for name, record in saved.items()
        }
        wait_until_written(job.tensor for job in jobs.values())
        largest_first = sorted(jobs, key=lambda key: jobs[key].tensor.nbytes, reverse=True)
        work = Work.begun([jobs[key] for key in largest_first], _Job.run)
        return cls(saved, view.looks, keys, largest_first, work)

    def agrees(self) -> bool:
        """Wait, and say whether all the tensors are as they were saved.

        Raises:
            RestoreError: One could not be read.
        """
        with progress("Comparing the base model", len(self._jobs), "tensors") as reach:
            found = dict(zip(self._jobs, self._work.results(reach), strict=True))
        for name, record in self.saved.items():
            digest = found[self._keys[name]]
            if isinstance(digest, RestoreError):
                raise digest
            if digest != record.digest:
                return False
        if self._looks is not None:
            self._looks.note(self.saved.items())
        return True

    def differs(self) -> bool:
        """Wait, and say whether a tensor is another one, as far as they can be read."""
        with suppress(RestoreError):
            return not self.agrees()
        return False

    def end(self) -> None:
        """Leave undone what was not begun, and wait for what was."""
        self._work.end()


def _key(base: BaseTensor, record: TensorRecord) -> tuple[int, str]:
    """What decides the digest of a tensor."""
    return id(base.owner.tensor), record.dtype


def large_tensors(
    view: ModelView, saved: Mapping[str, TensorRecord], *, changed: Collection[str]
) -> Mapping[str, TensorRecord]:
    """The records of the tensors that are worth being digested meanwhile, by name.

    Args:
        view: The bare base model.
        saved: The records of all.
        changed: The names of those that the load changes; neither these nor others that are the
            same tensors are among what is given.
    """
    found = base_tensors(view)
    written = {id(found[name].owner.tensor) for name in set(changed) & found.keys()}
    return {
        name: saved[name]
        for name, base in found.items()
        if name in saved
        and id(base.owner.tensor) not in written
        and _is_large(name, base)
        and saved[name].digest is not None
        and saved[name].shape == tuple(base.tensor.shape)
    }


def _is_large(name: str, base: BaseTensor) -> bool:
    """Whether a tensor is large, readable, and there without being made of others."""
    owner = base.owner
    is_whole = name == owner.name and forms.form_of(owner.module) == forms.FRESH
    return is_whole and owner.tensor.nbytes >= LARGE and base.is_readable
