"""Running the two models, and the exact reload with one thing of the other, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from peftstate._diagnosing import layers, settings, tensors
from peftstate._diagnosing.pair import Difference, Pair
from peftstate._diagnosis import Cause, Effect
from peftstate._snapshot import Snapshot
from peftstate.errors import AdapterLoadError
from peftstate.sections import training
from peftstate.sections._generators import Standing
from peftstate.sections._probe import LENGTH, predict, probe_inputs
from peftstate.sections.predictions import agreement, difference, divergence, inputs_of

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView
    from peftstate.sections.predictions import PredictionsRecord
    from peftstate.sections.training import TrainingRecord

_FINDERS: tuple[Callable[[Pair], Iterator[Difference]], ...] = (
    layers.quantization,  # whole layers first: what follows is set on them, too
    layers.merges,
    layers.compute_dtype,
    tensors.values,
    tensors.dtypes,
    settings.functions,
    settings.applied,
    settings.config,
)
"""What is looked for, in the order in which all of it can be given to one model."""
_NOT_RUNNING = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""What torch and models raise over tensors and layers that do not go together."""

_PASSED = "the inputs that were passed"


@attrs.frozen(kw_only=True)
class Measurement:
    """The two models, and what they predict in eval mode.

    Attributes:
        pair: The models.
        inputs: What is predicted on.
        words: The same for a person.
        stored: What the saved model predicted when it was saved, if the manifest has it.
        exact_logits: What the exact reload predicts.
        users_logits: What the user's model predicts; `None` if it does not run.
        failure: Why it does not.
        differences: In what the models differ.
        generators: Where the random generators stood when the model was saved.
        snapshot: The user's model as it was.
    """

    pair: Pair
    inputs: Mapping[str, torch.Tensor]
    words: str
    stored: torch.Tensor | None
    exact_logits: torch.Tensor
    users_logits: torch.Tensor | None
    failure: str
    differences: tuple[Difference, ...]
    generators: Standing
    snapshot: Snapshot

    @classmethod
    def of(cls, pair: Pair, probe: Any, generators: Standing) -> Measurement:
        """Compare the models, and run both.

        Args:
            pair: The models.
            probe: Inputs as `PeftModel.save_pretrained` takes them, or `None`.
            generators: Where the random generators stood when the model was saved.

        Raises:
            TypeError: The inputs are something else.
            ValueError: No inputs can be made up for this model.
            AdapterLoadError: The exact reload does not run on them, so neither did the saved model.
        """
        inputs, stored, words = _inputs(pair, probe)
        exact_logits, reason = _logits(pair.exact, inputs)
        if exact_logits is None:
            raise AdapterLoadError("predictions", f"the exact reload does not run ({reason})")
        users_logits, failure = _logits(pair.users, inputs)
        return cls(
            pair=pair,
            inputs=inputs,
            words=words,
            stored=stored,
            exact_logits=exact_logits,
            users_logits=users_logits,
            failure=failure,
            differences=tuple(found for find in _FINDERS for found in find(pair)),
            generators=generators,
            snapshot=Snapshot.of(pair.users.model),
        )

    @property
    def total(self) -> Effect | None:
        """What all that differs does together."""
        return None if self.users_logits is None else effect(self.exact_logits, self.users_logits)

    def rest(self) -> Effect | None:
        """What is left between the user's model and the exact one with all that differs."""

        def give_all() -> None:
            for found in self.differences:
                found.give()

        if self.users_logits is None:
            return None
        try:
            return effect(self._run(give_all), self.users_logits)
        except _NOT_RUNNING:
            return None

    def causes(self) -> tuple[tuple[Cause, ...], tuple[Cause, ...]]:
        """Each difference alone: those that were measured, the largest first, and the others."""
        found = [self._alone(difference) for difference in self.differences]
        found += [*self._train_mode(), *self._environment()]
        measured = [(cause.effect, cause) for cause in found if cause.effect is not None]
        measured.sort(key=lambda item: (not item[1].in_total, -item[0].max_difference))
        return (
            tuple(cause for _, cause in measured),
            tuple(cause for cause in found if cause.effect is None),
        )

    def _run(self, give: Callable[[], None]) -> torch.Tensor:
        """Run the exact reload after a change; both models are then as they were."""
        try:
            return predict(self.pair.exact.model, self.inputs, lambda _: give())
        finally:
            self.snapshot.restore()

    def _alone(self, difference: Difference) -> Cause:
        """Measure one difference, if the model runs with it alone."""
        found, note = None, ""
        try:
            found = effect(self.exact_logits, self._run(difference.give))
        except _NOT_RUNNING as error:
            note = f"the model does not run with it alone ({_in_one_line(error)})"
        else:
            note = "" if found else "alone it gives logits of another shape"
        return Cause(
            name=difference.name,
            section=difference.section,
            saved=difference.saved,
            found=difference.found,
            remedy=difference.remedy,
            effect=found,
            note=note,
        )

    def _train_mode(self) -> Iterator[Cause]:
        """Measure what train flags do, from the random numbers that the model was saved with."""
        saved: TrainingRecord = self.pair.manifest.sections["training"]
        found = training.capture_like(self.pair.users, saved)
        if saved.in_train_mode == found.in_train_mode:
            return

        def run(record: TrainingRecord) -> torch.Tensor:
            def give() -> None:
                training.restore(record, self.pair.exact)
                self.generators.put_back()

            return self._run(give)

        words = {True: "train", False: "eval"}
        yield Cause(
            name="train mode",
            section="training",
            saved=words[saved.in_train_mode],
            found=words[found.in_train_mode],
            remedy="Compare predictions in eval mode. Loaded by peftstate, a model is in the mode "
            "that it was saved in, unless is_trainable=False is passed.",
            effect=effect(run(saved), run(found)),
            note="both modes with the saved random numbers, from which dropout draws",
            in_total=False,
        )

    def _environment(self) -> Iterator[Cause]:
        """Measure what another machine, or other libraries, do to the exact reload itself."""
        if self.stored is None:
            return
        found = effect(self.stored, self.exact_logits)
        if found is not None and not found.is_none:
            yield Cause(
                name="this environment",
                section="predictions",
                saved="logits that were saved",
                found="those of the exact reload here",
                remedy="Evaluate on the machine and with the versions that `peftstate show` lists.",
                effect=found,
                note="the exact reload against what was predicted when it was saved",
                in_total=False,
            )


def _inputs(pair: Pair, probe: Any) -> tuple[Mapping[str, torch.Tensor], torch.Tensor | None, str]:
    """What is predicted on, what the saved model predicted on it, and the inputs in words."""
    record: PredictionsRecord | None = pair.manifest.sections.get("predictions")
    if probe is None and record is not None:
        return inputs_of(record) or {}, record.logits.load(), "the inputs that were saved"
    is_made_up = probe is None or probe is True
    inputs = probe_inputs(True if is_made_up else probe, pair.exact.base)
    return inputs or {}, None, f"a row of {LENGTH} ids" if is_made_up else _PASSED


def _logits(view: ModelView, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, str]:
    """What a model predicts, or why it does not run."""
    try:
        return predict(view.model, inputs), ""
    except _NOT_RUNNING as error:
        return None, _in_one_line(error)


def _in_one_line(error: Exception) -> str:
    """An error, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def effect(saved: torch.Tensor, found: torch.Tensor) -> Effect | None:
    """How far logits are from others; `None` if they are of another shape."""
    if saved.shape != found.shape:
        return None
    return Effect(
        max_difference=difference(saved, found),
        kl_divergence=divergence(saved, found),
        top1_agreement=agreement(saved, found),
    )
