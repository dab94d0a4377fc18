"""Digests of a base model's large tensors, computed while an adapter is put into it.

Only large ones: whenever a thread has done with a tensor it waits, for up to
`sys.getswitchinterval`, until the thread that works on the model lets it go on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import attrs

from peftstate._progress import progress
from peftstate.errors import RestoreError
from peftstate.sections import _bitsandbytes_forms as forms
from peftstate.sections._base_tensors import BaseTensor, base_tensors
from peftstate.sections._remembered import remembered_digest
from peftstate.sections._seen import Looks
from peftstate.sections._tensors import TensorRecord

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView

LARGE = 16 * 1024 * 1024
"""Bytes; BLAKE3 takes 2 ms for them."""


@attrs.frozen
class Ahead:
    """Digests that are being computed.

    Attributes:
        saved: The records of the tensors, by their names.
    """

    saved: Mapping[str, TensorRecord]
    _looks: Looks | None
    _found: Mapping[str, Future[str]]
    _pool: ThreadPoolExecutor

    @classmethod
    def begun(cls, view: ModelView, saved: Mapping[str, TensorRecord]) -> Ahead:
        """Begin, with tensors that must not be written to until `end`.

        Another may take the place of one.

        Args:
            view: The bare base model; what is digested goes into its `looks`.
            saved: What `large_tensors` gave.
        """
        pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="peftstate-digest")
        found = base_tensors(view)
        jobs: dict[tuple[int, str], Future[str]] = {}  # of tied tensors, one
        for name, record in saved.items():
            key = _job(found[name], record)
            if key not in jobs:
                tensor = found[name].tensor.detach()  # for the parameter may be given other data
                jobs[key] = pool.submit(remembered_digest, tensor, record.dtype)
        by_name = {name: jobs[_job(found[name], record)] for name, record in saved.items()}
        return cls(saved, view.looks, by_name, pool)

    def agrees(self) -> bool:
        """Wait, and say whether all the tensors are as they were saved.

        Raises:
            RestoreError: One could not be read.
        """
        with progress("Comparing the base model", len(self.saved), "tensors") as reach:
            for done, (name, record) in enumerate(self.saved.items(), start=1):
                if self._digest(name) != record.digest:
                    return False
                reach(done)
        if self._looks is not None:
            self._looks.note(self.saved.items())
        return True

    def _digest(self, name: str) -> str:
        """Wait for a digest."""
        try:
            return self._found[name].result()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            message = f"the tensor {name} of the base model could not be read ({reason})"
            raise RestoreError("base_model", message) from error

    def differs(self) -> bool:
        """Wait, and say whether a tensor is another one, as far as they can be read."""
        with suppress(RestoreError):
            return not self.agrees()
        return False

    def end(self) -> None:
        """Begin with no other tensor, and wait for the rest."""
        self._pool.shutdown(cancel_futures=True)


def _job(base: BaseTensor, record: TensorRecord) -> tuple[int, str]:
    """What decides the digest of a tensor."""
    return id(base.owner.tensor), record.dtype


def large_tensors(view: ModelView, saved: Mapping[str, TensorRecord]) -> Mapping[str, TensorRecord]:
    """The records of the tensors that are worth a thread of their own, by name.

    Args:
        view: The bare base model.
        saved: The records of all that are wanted.
    """
    return {
        name: saved[name]
        for name, base in base_tensors(view).items()
        if name in saved
        and _is_large(name, base)
        and saved[name].digest is not None
        and saved[name].shape == tuple(base.tensor.shape)
    }


def _is_large(name: str, base: BaseTensor) -> bool:
    """Whether a tensor is large, readable, and there without being made of others."""
    owner = base.owner
    is_whole = name == owner.name and forms.form_of(owner.module) == forms.FRESH
    return is_whole and owner.tensor.nbytes >= LARGE and base.is_readable
