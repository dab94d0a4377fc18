"""What differs and does nothing to the logits of one forward pass in eval mode."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from peftstate._diagnosis import Cause
from peftstate._diff import Mismatch, shown, steps
from peftstate._policy import Policy
from peftstate._steps import Plan, compare
from peftstate.manifest import Manifest
from peftstate.sections import SECTIONS
from peftstate.sections._view import ModelView


@attrs.frozen(kw_only=True)
class _Kind:
    """Differences that are told in one line.

    Attributes:
        name: What they are, for a person.
        note: What they do.
        remedy: What to do about them.
    """

    name: str
    note: str
    remedy: str = "Load with peftstate, which restores it."


_MEASURED = frozenset({("implementation", "attention"), ("implementation", "experts")})
_KINDS: Mapping[tuple[str, str], _Kind] = {
    ("implementation", "autocast"): _Kind(
        name="autocast wrapper", note="changes what calling the model gives, not forward itself"
    ),
    ("implementation", "hooks"): _Kind(
        name="hooks",
        note="may change what the model computes",
        remedy="Set the hooks that were on the model.",
    ),
    ("implementation", "kernels"): _Kind(
        name="kernels",
        note="may change the last bits",
        remedy="Patch in the kernels that the model was saved with.",
    ),
    ("training", ""): _Kind(
        name="training state",
        note="matters to training only",
        remedy="Load with peftstate to go on with the training.",
    ),
    ("generation", ""): _Kind(name="generation config", note="changes how text is generated"),
    ("tokenizer", ""): _Kind(
        name="tokenizer",
        note="changes what goes into the model",
        remedy="Load the tokenizer from the adapter's folder, or pass tokenizer= to the load.",
    ),
    ("runtime", ""): _Kind(
        name="runtime flags",
        note="may change the last bits",
        remedy="Evaluate within peftstate.reproducible(model).",
    ),
    ("environment", ""): _Kind(
        name="environment",
        note="may change the last bits",
        remedy="Install the versions that `peftstate show` lists.",
    ),
    ("rng", ""): _Kind(name="random numbers", note="changes sampled text and dropout"),
}
"""What differences are, by section and first field, or by section."""
_PARTS = frozenset({"base", "adapters", "model"})
"""The parts of a model whose train flags `training` records."""


def unmeasured(view: ModelView, manifest: Manifest) -> tuple[Cause, ...]:
    """Compare a user's model with what was saved, in all that logits do not show.

    Args:
        view: The model.
        manifest: What was saved.
    """
    looked_at = {section for section, _ in _KINDS}
    plan = Plan(
        policy=Policy.of(None),
        skipped=frozenset(section.name for section in SECTIONS if section.name not in looked_at),
    )
    report = compare(view, manifest, plan, lambda section: section.capture_like)
    lines: dict[_Kind, list[Mismatch]] = {}
    for mismatch in report.mismatches:
        kind = _kind_of(mismatch)
        if kind is not None and plan.policy.action(mismatch) != "ignore":
            lines.setdefault(kind, []).append(mismatch)
    return (
        *_not_loaded(view, manifest),
        *(_cause(kind, mismatches) for kind, mismatches in lines.items()),
    )


def _kind_of(mismatch: Mismatch) -> _Kind | None:
    """What a difference is; `None` if it is measured."""
    path = steps(mismatch.field)
    is_train_flag = mismatch.section == "training" and "train" in path and path[0] in _PARTS
    if is_train_flag or (mismatch.section, path[0]) in _MEASURED:
        return None
    return _KINDS.get((mismatch.section, path[0])) or _KINDS.get((mismatch.section, ""))


def _cause(kind: _Kind, mismatches: list[Mismatch]) -> Cause:
    """One line about some differences, of which it names the first."""
    first, *others = mismatches
    more = f" and {len(others)} more" if others else ""
    return Cause(
        name=kind.name,
        section=first.section,
        saved=shown(first.saved),
        found=shown(first.found),
        remedy=kind.remedy,
        effect=None,
        note=f"{kind.note}: {first.field}{more}",
    )


def _not_loaded(view: ModelView, manifest: Manifest) -> list[Cause]:
    """The adapters that are not in the model at all."""
    saved = manifest.sections["adapters"].adapters
    if not (missing := sorted(saved.keys() - view.adapters.keys())):
        return []
    cause = Cause(
        name="adapters not loaded",
        section="adapters",
        saved=", ".join(saved),
        found=", ".join(view.adapters),
        remedy="Load with peftstate, which loads all of them, or load each with load_adapter.",
        effect=None,
        note=f"{', '.join(missing)} cannot be used",
    )
    return [cause]
