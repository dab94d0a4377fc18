"""What a situation is: how a model is made, saved, loaded and compared, and what should come of it.

The defaults are the usual way: the whole model is saved, the adapter is loaded onto a base model
that was loaded as the first one was, and the logits are compared in eval mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import attrs

from benchmarks.fidelity._compare import Observation
from benchmarks.fidelity._libraries import Load, Save, load, save
from benchmarks.fidelity._models import Make, Place, logits
from benchmarks.fidelity._outcome import EXACT, NOWHERE, Expected, Kind, Message


def _nothing(_: Any) -> Observation:
    """Nothing but the answers is compared."""
    return {}


@attrs.frozen(kw_only=True)
class Situation:
    """A model, how it is saved and loaded again, and what is compared.

    Attributes:
        cause: The number of the cause, such as ``"A1"``; ``""`` if it is none of these.
        title: What is special, in a few words.
        build: Makes the model, and trains it.
        base: Loads the base model for the reload, as the user of this situation does.
        save: Saves with one of the libraries.
        after_save: What happens to the folder afterwards.
        load: Loads with one of the libraries.
        state: Reads what matters and no run of the model shows; it changes nothing.
        answers: What the model computes in eval mode; to ask it may change the model.
        saving: What holds while the model is made and saved.
        loading: What holds while it is loaded and compared.
        names: What a warning of any library says that names the difference.
        ours: What should come of it with peftstate.
    """

    cause: str = ""
    title: str
    build: Make
    base: Make = Place.load
    save: Save = save
    after_save: Callable[[Path], object] = _nothing
    load: Load = load
    state: Callable[[Any], Observation] = _nothing
    answers: Callable[[Any], Observation] = logits
    saving: Callable[[], AbstractContextManager[object]] = nullcontext
    loading: Callable[[], AbstractContextManager[object]] = nullcontext
    names: str = NOWHERE
    ours: Expected = EXACT

    @property
    def id(self) -> str:
        """A name for this situation, of letters, digits and hyphens."""
        words = re.sub(r"[^A-Za-z0-9_.]+", "-", self.title).strip("-")
        return f"{self.cause or 'further'}-{words}"

    def is_named_by(self, message: Message) -> bool:
        """Whether a message names the difference."""
        told = self.ours.match if self.ours.kind is Kind.TOLD else NOWHERE
        return any(re.search(words, message.text) for words in (self.names, told))
