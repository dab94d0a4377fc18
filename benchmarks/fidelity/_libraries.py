"""The two libraries, and the usual ways to save and load with either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import peft

import peftstate

Load = Callable[["Library", Callable[[], Any], Path], Any]
"""Loads from a folder with a library; the base model comes from the function."""
Save = Callable[["Library", Any, Path], None]
"""Saves a model into a folder with a library."""


@attrs.frozen(kw_only=True)
class Library:
    """A library whose saves and loads are looked at.

    Attributes:
        name: As a table calls it.
        models: Its `PeftModel`.
        auto_models: Its `AutoPeftModelForCausalLM`.
    """

    name: str
    models: Any
    auto_models: Any

    def save(self, model: Any, folder: Path, **options: Any) -> None:
        """Save a model as this library does, whatever class it is of."""
        self.models.save_pretrained(model, str(folder), **options)

    def load(self, base: Any, folder: Path, **options: Any) -> Any:
        """Load an adapter onto a base model."""
        return self.models.from_pretrained(base, str(folder), **options)

    def load_auto(self, folder: Path, **options: Any) -> Any:
        """Load an adapter and the base model that its config names."""
        return self.auto_models.from_pretrained(str(folder), **options)


PEFT = Library(name="plain PEFT", models=peft.PeftModel, auto_models=peft.AutoPeftModelForCausalLM)
PEFTSTATE = Library(
    name="peftstate",
    models=peftstate.PeftModel,
    auto_models=peftstate.AutoPeftModelForCausalLM,
)


def save(library: Library, model: Any, folder: Path) -> None:
    """Save all there is to the model."""
    library.save(model, folder)


def load(library: Library, base: Callable[[], Any], folder: Path) -> Any:
    """Load the adapter onto a fresh base model; PEFT gives it in eval mode."""
    return library.load(base(), folder)


def load_auto(library: Library, _: Callable[[], Any], folder: Path) -> Any:
    """Load everything in one line."""
    return library.load_auto(folder)


def load_to_train(library: Library, base: Callable[[], Any], folder: Path) -> Any:
    """Load the adapter to go on with training, which PEFT must be told."""
    options = {"is_trainable": True} if library is PEFT else {}
    return library.load(base(), folder, **options)


def load_with(**options: Any) -> Load:
    """Load the adapter with options of PEFT's."""
    return lambda library, base, folder: library.load(base(), folder, **options)
