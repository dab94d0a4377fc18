"""The tensors of an adapter, digested by other threads while other sections are compared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from peftstate._work import switching_often
from peftstate.sections._adapter_tensors import AdapterTensors, tensors_of_lora
from peftstate.sections._tensors import Reading

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView


@attrs.frozen
class ReadAhead:
    """An adapter that other threads read.

    Attributes:
        tensors: Its tensors.
        saved: What is read of them: those that are in a file.
    """

    tensors: AdapterTensors
    saved: Reading


@contextmanager
def reading(view: ModelView, files: Mapping[str, Collection[str]]) -> Iterator[None]:
    """Have other threads read an adapter for which PEFT has nothing to compute.

    There is one, mostly; to begin with others would not end any sooner.

    Args:
        view: The model.
        files: The names in the file of each adapter, by its name in the manifest.
    """
    found = _first_of_lora(view, files)
    if found is None:
        yield
        return
    name, tensors = found
    begun = Reading.begun(tensors.saved)
    try:
        view.read_ahead[name] = ReadAhead(tensors, begun)
        with switching_often():
            yield
    finally:
        begun.end()
        view.read_ahead.pop(name, None)


def _first_of_lora(
    view: ModelView, files: Mapping[str, Collection[str]]
) -> tuple[str, AdapterTensors] | None:
    """The first adapter in the model whose tensors need not be asked of PEFT, and these."""
    for name, in_file in files.items():
        tensors = tensors_of_lora(view, name, in_file) if name in view.adapters else None
        if tensors is not None:
            return name, tensors
    return None
