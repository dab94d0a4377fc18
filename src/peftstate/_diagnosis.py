"""Why the predictions of a model differ from those of the model that was saved."""

from __future__ import annotations

import os

import attrs

from peftstate._diff import Json, printable


@attrs.frozen(kw_only=True)
class Effect:
    """How far logits are from those of the exact reload.

    Attributes:
        max_difference: The largest difference of a logit.
        kl_divergence: The mean divergence of the distributions from the exact ones, in nats.
        top1_agreement: The fraction of positions, from 0 to 1, where the most likely is the same.
    """

    max_difference: float
    kl_divergence: float
    top1_agreement: float

    @property
    def is_none(self) -> bool:
        """Whether not one bit differs."""
        return self.max_difference == 0.0

    def __str__(self) -> str:
        largest, divergence, agreement = figures(self)
        return f"{largest}, KL {divergence}, top-1 {agreement}"


@attrs.frozen(kw_only=True)
class Cause:
    """One thing that the model does not have as it was saved.

    Attributes:
        name: What it is: ``"adapter dtype"``.
        section: The section of the manifest that records it: ``"dtype"``.
        saved: What was saved, in a few words.
        found: What the model has instead.
        remedy: What to do about it.
        effect: What it does to the logits, alone; `None` if that was not, or cannot be, measured.
        note: How it was measured, or why it was not.
        in_total: Whether the total has it, too, which is measured in eval mode and in this process.
    """

    name: str
    section: str
    saved: str
    found: str
    remedy: str
    effect: Effect | None
    note: str = ""
    in_total: bool = True

    def __str__(self) -> str:
        effect = f"max |Δ logits| {self.effect}; " if self.effect else ""
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.name} [{self.section}]: {effect}saved {printable(self.saved)}, "
            f"found {printable(self.found)}{note}"
        )


@attrs.frozen(kw_only=True)
class Diagnosis:
    """What a model predicts otherwise than the saved one, and what each cause adds to it.

    Every number comes from running a model; none is estimated. The effects of causes are each
    measured alone, so that they need not sum up to the total.

    Attributes:
        adapter: The adapter's folder or repo.
        model: How the model that is diagnosed was loaded, in a few words.
        inputs: What was predicted on, in a few words.
        failure: Why the model does not run; empty if it does.
        total: What all that differs does together, in eval mode; `None` if the model does not run,
            or its logits have another shape.
        rest: What it does that no cause explains: the effect on the exact reload of everything that
            has no name here; `None` if that could not be measured.
        causes: What was measured, the largest first; what is not in the total comes last.
        unmeasured: What differs too and has no effect on these logits, or none that was measured.
    """

    adapter: str
    model: str
    inputs: str
    failure: str
    total: Effect | None
    rest: Effect | None
    causes: tuple[Cause, ...]
    unmeasured: tuple[Cause, ...]

    @property
    def ok(self) -> bool:
        """Whether the model predicts, to the last bit, what the saved model predicts."""
        effects = [self.total, *(cause.effect for cause in self.causes)]
        return all(effect is not None and effect.is_none for effect in effects)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        if self.failure:
            return f"The model does not run: {self.failure}"
        if self.total is None:
            return "The logits have another shape than those of the saved model."
        if not self.total.is_none:
            return f"The predictions differ: max |Δ logits| {self.total}."
        if not self.ok:
            return "In eval mode and in this environment, the predictions are the same."
        return "The predictions are the same, to the last bit."

    def to_dict(self) -> dict[str, Json]:
        """The diagnosis as JSON."""
        return {"ok": self.ok, **attrs.asdict(self)}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the causes as a bar chart.

        Args:
            path: The file; its suffix (``.png``, ``.svg``, ``.pdf``) decides the format.

        Raises:
            ImportError: The package `matplotlib` is missing.
            ValueError: There is no such format.
        """
        from peftstate._chart import draw

        draw(self, path)

    def _repr_html_(self) -> str:
        """The diagnosis as a notebook shows it."""
        from peftstate._html import diagnosis_html

        return diagnosis_html(self)

    def __str__(self) -> str:
        lines = [self.verdict, *map(str, self.causes)]
        if self.rest is not None and not self.rest.is_none:
            lines.append(f"not explained by these: max |Δ logits| {self.rest}")
        return "\n".join([*lines, *(f"not measured: {cause}" for cause in self.unmeasured)])


def figures(effect: Effect | None) -> tuple[str, str, str]:
    """An effect as three figures, in which a small one does not look like none."""
    if effect is None:
        return ("not measured", "", "")
    agreement = min(100 * effect.top1_agreement, 99.9)
    return (
        f"{effect.max_difference:.3g}",
        f"{effect.kl_divergence:.2g}",
        "100%" if effect.top1_agreement == 1.0 else f"{agreement:.1f}%",
    )
