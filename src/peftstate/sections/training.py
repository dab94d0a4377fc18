"""`training`: train flags, dropout, trainable parameters, gradient checkpointing.

One flag on the model does not tell: `get_peft_model` on a base model in eval mode leaves the
adapter's dropout in train mode, and PEFT's load puts everything in eval mode. Nor do the configs
tell of dropout: trainers that compare with a reference model set the live layers' to 0.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._modules import is_container
from peftstate.errors import TrainingStateMismatchError
from peftstate.sections._base import Section
from peftstate.sections._table import Table

if TYPE_CHECKING:
    from torch import nn

    from peftstate.sections._view import ModelView
    from peftstate.sections._walk import Site, TensorSite


@attrs.frozen(kw_only=True)
class PartRecord:
    """The training state of one part of a model.

    Attributes:
        train: The train flag of each module.
        requires_grad: The flag of each parameter.
        dropout: The probability of each dropout layer, from 0 to 1; empty if it is not known
            (schemas 1 and 2).
    """

    train: Table[bool]
    requires_grad: Table[bool]
    dropout: Table[float]

    def comparable(self, saved: PartRecord | None) -> PartRecord:
        """The record for a comparison with another one, which may know nothing of dropout.

        Which layers there are is for the configs to say, which other sections compare.
        """
        if saved is None or _NOTHING not in (self.dropout, saved.dropout):
            return self
        return attrs.evolve(self, dropout=saved.dropout)


_NOTHING: Table[float] = Table.of({})


@attrs.frozen(kw_only=True)
class TrainingRecord:
    """The training state of a model.

    Attributes:
        base: Of the base model.
        adapters: Of each adapter.
        model: Of what PEFT holds beside both.
        inference_mode: Whether an adapter's config in memory says that it is for inference, as
            PEFT writes of all; of prompts, of multitask ones only.
        gradient_checkpointing: Names of the base model's modules that recompute activations.
        use_reentrant: Which implementation of checkpointing they use; `None` for torch's default.
    """

    base: PartRecord
    adapters: Mapping[str, PartRecord]
    model: PartRecord
    inference_mode: Mapping[str, bool]
    gradient_checkpointing: tuple[str, ...]
    use_reentrant: bool | None

    def for_adapters(self, names: Collection[str]) -> TrainingRecord:
        """The record without the adapters that are not looked at."""
        kept = {name: part for name, part in self.adapters.items() if name in names}
        modes = {name: mode for name, mode in self.inference_mode.items() if name in names}
        return attrs.evolve(self, adapters=kept, inference_mode=modes)

    @property
    def in_train_mode(self) -> bool:
        """Whether any module is in train mode."""
        tables = [self.base.train, self.model.train]
        tables += [part.train for part in self.adapters.values()]
        return any(table.default or True in table.exceptions.values() for table in tables)

    @property
    def trains_adapter(self) -> bool:
        """Whether any parameter of an adapter is trainable."""
        tables = [part.requires_grad for part in self.adapters.values()]
        return any(table.default or True in table.exceptions.values() for table in tables)


def capture(view: ModelView) -> TrainingRecord:
    """Read the flag of every module and parameter."""
    sites, tensors = _flagged(view), view.tensors()

    def part(name: str, adapter: str | None = None) -> PartRecord:
        return PartRecord(
            train=Table.of(
                {
                    site.name: site.module.training
                    for site in sites
                    if site.part == name and site.adapter == adapter
                }
            ),
            requires_grad=Table.of(
                {
                    site.name: site.tensor.requires_grad
                    for site in tensors
                    if site.part == name
                    and site.adapter == adapter
                    and site.leaf in site.module._parameters
                }
            ),
            dropout=Table.of(
                {
                    site.name: float(probability)
                    for site in sites
                    if site.part == name
                    and site.adapter == adapter
                    and (probability := _dropout(site.module)) is not None
                }
            ),
        )

    return TrainingRecord(
        base=part("base"),
        adapters={saved: part("adapter", live) for saved, live in view.adapters.items()},
        model=part("model"),
        inference_mode={
            saved: bool(config.inference_mode)
            for saved, live in view.adapters.items()
            if not (config := view.model.peft_config[live]).is_prompt_learning
            or config.peft_type == "MULTITASK_PROMPT_TUNING"  # the form of others goes with it
        },
        gradient_checkpointing=tuple(
            sorted(name for name, module in view.base_modules() if _checkpoints(module))
        ),
        use_reentrant=_use_reentrant(view),
    )


def capture_like(view: ModelView, record: TrainingRecord) -> TrainingRecord:
    """Capture for a comparison with a record, which may not know all that is looked at now."""
    found = capture(view)
    return attrs.evolve(
        found,
        base=found.base.comparable(record.base),
        adapters={
            name: part.comparable(record.adapters.get(name))
            for name, part in found.adapters.items()
        },
        model=found.model.comparable(record.model),
        inference_mode={
            name: found.inference_mode.get(name, mode)
            for name, mode in record.inference_mode.items()
        },
    )


def _dropout(module: nn.Module) -> float | None:
    """The probability of a dropout layer; `None` of any other module."""
    layer: Any = module
    cls: type = type(module)
    return layer.p if _drops(cls) else None


@functools.cache
def _drops(cls: type) -> bool:
    """Whether the modules of a class are dropout layers."""
    from torch.nn.modules.dropout import _DropoutNd

    return issubclass(cls, _DropoutNd)


def _flagged(view: ModelView) -> tuple[Site, ...]:
    """The modules whose train flag is looked at: PEFT's mere containers run nothing."""
    return tuple(
        site for site in view.sites() if site.part == "base" or not is_container(site.module)
    )


def _checkpoints(module: nn.Module) -> bool:
    """Whether a module recomputes its activations."""
    return bool(getattr(module, "gradient_checkpointing", False))


def _use_reentrant(view: ModelView) -> bool | None:
    """The argument that transformers bound to torch's checkpoint function."""
    for _, module in view.base_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if _checkpoints(module) and isinstance(function, functools.partial):
            value = function.keywords.get("use_reentrant")
            return value if isinstance(value, bool) else None
    return None


def restore(record: TrainingRecord, view: ModelView) -> None:
    """Set the flag of every module and parameter, dropout, and gradient checkpointing."""
    for site in view.sites():  # the containers, too: they have the names of what they hold
        if (part := _part_of(record, view, site)) is not None:
            _restore_module(part, site)
    for tensor in view.tensors():
        if (part := _part_of(record, view, tensor)) is not None:
            _restore_parameter(part, tensor)
    for saved, mode in record.inference_mode.items():
        if saved in view.adapters:
            view.model.peft_config[view.adapters[saved]].inference_mode = mode
    _restore_checkpointing(record, view)


def _part_of(record: TrainingRecord, view: ModelView, site: Site | TensorSite) -> PartRecord | None:
    """What is recorded of the part of the model that something belongs to."""
    if site.part == "adapter":
        return record.adapters.get(view.saved_name(site.adapter or "") or "")
    return record.base if site.part == "base" else record.model


def _restore_module(part: PartRecord, site: Site) -> None:
    """Set the train flag of a module, and the probability of a dropout layer."""
    module: Any = site.module
    flag, probability = part.train[site.name], part.dropout[site.name]
    if flag is not None:
        module.training = flag
    if probability is not None and 0 <= probability <= 1 and _dropout(module) is not None:
        module.p = probability


def _restore_parameter(part: PartRecord, site: TensorSite) -> None:
    """Set the flag of a parameter; integers cannot have one."""
    flag = part.requires_grad[site.name] if site.leaf in site.module._parameters else None
    if flag is not None and (site.tensor.is_floating_point() or not flag):
        site.tensor.requires_grad_(flag)


def _restore_checkpointing(record: TrainingRecord, view: ModelView) -> None:
    """Switch gradient checkpointing on or off, and set the flag of each module."""
    modules: list[tuple[str, Any]] = list(view.base_modules())
    if record.gradient_checkpointing and hasattr(view.base, "_set_gradient_checkpointing"):
        arguments = {} if record.use_reentrant is None else {"use_reentrant": record.use_reentrant}
        # its name changed in transformers 5, where the old one warns
        enable = getattr(
            view.base,
            "activation_checkpointing_enable",
            getattr(view.base, "gradient_checkpointing_enable", None),
        )
        if enable is not None:
            enable(arguments)
    names = set(record.gradient_checkpointing)
    for name, module in modules:
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = name in names


_UNKNOWN_PART = PartRecord(train=Table.of({}), requires_grad=Table.of({}), dropout=_NOTHING)
UNKNOWN = TrainingRecord(
    base=_UNKNOWN_PART,
    adapters={},
    model=_UNKNOWN_PART,
    inference_mode={},
    gradient_checkpointing=(),
    use_reentrant=None,
)

SECTION = Section(
    name="training",
    record=TrainingRecord,
    capture=capture,
    capture_like=capture_like,
    restore=restore,
    per_adapter=True,
    unknown=UNKNOWN,
    error=TrainingStateMismatchError,
)
