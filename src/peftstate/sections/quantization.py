"""`quantization`: how the base model is quantized.

PEFT records nothing of it, so a reload gets another quantization or none. For bitsandbytes what
counts are the live layers: a checkpoint may override the config that was passed, and a layer's
compute dtype may be set by hand. For other methods it is the quantization config.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from peftstate._diff import Json
from peftstate._digest import seal_digest
from peftstate._warn import warn
from peftstate.errors import QuantizationMismatchError, StateMismatchWarning
from peftstate.sections import _bitsandbytes, _origin, _quantization_config
from peftstate.sections import _bitsandbytes_forms as forms
from peftstate.sections._base import Section
from peftstate.sections._base_tensors import base_tensors
from peftstate.sections._bitsandbytes import LayerSettings, LayerState
from peftstate.sections._table import Table
from peftstate.sections._tensors import digest
from peftstate.sections._walk import is_peft_model

if TYPE_CHECKING:
    from torch import nn

    from peftstate.sections._view import ModelView

V = TypeVar("V")

BITSANDBYTES = "bitsandbytes"


@attrs.frozen(kw_only=True)
class QuantizationRecord:
    """How a base model is quantized.

    Attributes:
        method: transformers' name of the method, such as ``"bitsandbytes"``; `None` if the model
            is not quantized.
        config: The quantization config. Of bitsandbytes' it is not compared, the layers are.
        pre_quantized: Whether the checkpoint was quantized already. Not compared.
        modules: Which modules bitsandbytes quantized: names with each number as ``*`` → the
            numbers, ``{"model.layers.*.mlp.up_proj": "0-27"}``.
        layers: How they are quantized.
        state: What was set on them and what running them changed; restored.
        requantized: Layers whose weight was quantized again, since an adapter is or was merged into
            it or began with rewriting it; they are compared after the load has put it back.
        scales: Digest of the scales that packing rounded, of all layers that are not fresh;
            `None` if all are.
    """

    method: str | None
    config: Mapping[str, Json] | None
    pre_quantized: bool
    modules: Mapping[str, str]
    layers: Table[LayerSettings]
    state: Table[LayerState]
    requantized: tuple[str, ...]
    scales: str | None


RESTORED = frozenset({"state", "scales"})
"""The fields that `prepare` and `finish` set."""


def capture(view: ModelView) -> QuantizationRecord:
    """Read the quantization config and the layers of bitsandbytes."""
    layers = _layers(view)
    return _describe(view, layers, requantized=_requantized(view, layers))


def _requantized(view: ModelView, layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The names of the layers whose weight is another one than the base model was loaded with."""
    if not layers:
        return ()
    merged = {site.name for site in view.sites() if site.merged}
    found = base_tensors(view)
    lost = {found[name].owner.name.removesuffix(".weight") for name in _origin.lost(view, found)}
    return tuple(sorted(layers.keys() & (merged | lost)))


def _describe(
    view: ModelView, layers: Mapping[str, nn.Module], *, requantized: tuple[str, ...]
) -> QuantizationRecord:
    """The record of a model with some layers of bitsandbytes."""
    base: Any = view.base
    config = _quantization_config.of_model(base)
    method = None if config is None else config.get("quant_method")
    if method in (None, BITSANDBYTES):  # a config may outlive the layers, and layers need none
        method = BITSANDBYTES if layers else None
    return QuantizationRecord(
        method=method,
        config=config,
        pre_quantized=bool(getattr(getattr(base, "hf_quantizer", None), "pre_quantized", False)),
        modules=_numbered(layers),
        layers=_table({name: _bitsandbytes.settings_of(module) for name, module in layers.items()}),
        state=_table({name: _bitsandbytes.state_of(module) for name, module in layers.items()}),
        requantized=requantized,
        scales=_scales(layers),
    )


def _scales(layers: Mapping[str, nn.Module]) -> str | None:
    """One digest over the scales of the layers that are not fresh."""
    changed = [module for module in layers.values() if forms.form_of(module) != forms.FRESH]
    return _scales_digest(map(forms.weight_of, changed))


def capture_like(view: ModelView, record: QuantizationRecord) -> QuantizationRecord:
    """Capture for a comparison with a record.

    What makes no difference to the outcome is taken over from it: where the quantization came
    from, and forms of layers that lead to the same or that no layer can have on this machine.
    """
    layers = _layers(view)
    found = _describe(view, layers, requantized=record.requantized)
    compares_config = {record.method, found.method} - {None, BITSANDBYTES}
    state = _table(
        {
            name: _comparable_state(module, found.state[name], record.state[name])
            for name, module in layers.items()
        }
    )
    if not is_peft_model(view.model):  # a load merges into the layers of the bare base model
        requantized = set(record.requantized)
        settings = {
            name: record.layers[name] if name in requantized else found.layers[name]
            for name in layers
        }
        found = attrs.evolve(found, layers=_table(settings))
    return attrs.evolve(
        found,
        config=found.config if compares_config else record.config,
        pre_quantized=record.pre_quantized,
        state=state,
        scales=found.scales if state == found.state else record.scales,
    )


def _comparable_state(
    module: nn.Module, found: LayerState | None, saved: LayerState | None
) -> LayerState | None:
    """The state of a layer, in the saved form if the form it has is as good as that one.

    The first forward in eval mode packs a fresh layer. In train mode, fresh and packed differ.
    """
    if found is None or saved is None:
        return found
    change = (saved.form, found.form)
    runs_alike = change == (forms.FRESH, forms.PACKED) and not module.training
    out_of_reach = change == (forms.PACKED, forms.FRESH) and not forms.can_hold(module, saved.form)
    return attrs.evolve(found, form=saved.form) if runs_alike or out_of_reach else found


def as_live(record: QuantizationRecord, view: ModelView) -> QuantizationRecord:
    """The record, with the live forms of 4-bit layers: which have run is no matter of one adapter.

    What unpacking changed shows in the digests of the base model's tensors.
    """
    layers = _layers(view)
    state = {
        name: attrs.evolve(saved, form=forms.form_of(module))
        for name, module in layers.items()
        if (saved := record.state[name]) is not None
    }
    if all(record.state[name] == live for name, live in state.items()):
        return record
    return attrs.evolve(record, state=_table(state), scales=_scales(layers))


def prepare(record: QuantizationRecord, view: ModelView) -> None:
    """Set the compute dtype of each layer."""
    for name, module in _layers(view).items():
        state = record.state[name]
        if state is not None:
            _bitsandbytes.set_compute_dtype(module, state)


def finish(record: QuantizationRecord, view: ModelView) -> None:
    """Set the compute dtype of layers that a merge made new, and bring each into its form.

    PEFT asks for the state dict while it loads, which would unpack a layer, and cannot merge into
    one that is packed.
    """
    prepare(record, view)
    wanted = [
        (module, state.form)
        for name, module in _layers(view).items()
        if (state := record.state[name]) is not None and state.form != forms.FRESH
    ]
    if not all(forms.can_hold(module, form) for module, form in wanted):
        warn(
            "The 4-bit layers of the base model were saved as a CPU with AVX512-BF16 repacks them "
            "when it runs them; here they cannot be repacked, so outputs may differ slightly.",
            StateMismatchWarning,
        )
    if wanted and any(parameter.requires_grad for parameter in view.model.parameters()):
        forms.remember_fresh(module for module, _ in wanted)  # for `train`
    _restore_forms(record, wanted)
    if wanted:
        view.tensors_changed()


def _restore_forms(record: QuantizationRecord, wanted: list[tuple[nn.Module, str]]) -> None:
    """Bring layers into forms, by as many rounds of packing as give the saved scales.

    If none does, the layers are left as they are, and the comparison tells.
    """
    if not all(forms.can_compute(module, form) for module, form in wanted):
        return
    for cycles in range(1, forms.MAX_CYCLES + 1):
        weights = [forms.in_form(module, form, cycles=cycles) for module, form in wanted]
        if _scales_digest(weights) != record.scales:
            continue
        for (module, form), weight in zip(wanted, weights, strict=True):
            if forms.can_hold(module, form):
                forms.assign(module, weight)
            elif cycles > 1:  # what it was packed from
                forms.convert(module, forms.UNPACKED, cycles=cycles - 1)
        return


def quantization_kwargs(record: QuantizationRecord) -> dict[str, object]:
    """What to hand to ``from_pretrained`` so that the base model is quantized as recorded.

    Returns:
        ``{"quantization_config": BitsAndBytesConfig(...)}``; nothing if the model is not
        quantized, or if its checkpoint is, which then brings its own config.

    Raises:
        ValueError: The model was quantized while loading in a way that is not rebuilt from a
            manifest: by another method than bitsandbytes, by hand, or with a config that holds
            what this version does not know. The caller must pass ``quantization_config``.
    """
    if record.method is None or record.pre_quantized:
        return {}
    if record.method != BITSANDBYTES or record.config is None:
        raise ValueError(
            f"the base model was quantized by {record.method!r} while it was loaded, which is not "
            "repeated from a manifest; pass quantization_config= as it was passed then"
        )
    return {"quantization_config": _quantization_config.bitsandbytes_config(record.config)}


def _layers(view: ModelView) -> dict[str, nn.Module]:
    """The layers of bitsandbytes in the base model."""
    return {name: module for name, module in view.base_modules() if _bitsandbytes.kind_of(module)}


def _table(values: Mapping[str, V | None]) -> Table[V]:
    """The table of something about each layer, where there is anything to say."""
    return Table.of({name: value for name, value in values.items() if value is not None})


def _scales_digest(weights: Iterable[forms.Weight4bit]) -> str | None:
    """One digest over the scales of many weights; `None` for no weight."""
    digests = [digest(tensor) for weight in weights for tensor in forms.scales(weight)]
    return seal_digest("\n".join(digests).encode()) if digests else None


def _numbered(names: Iterable[str]) -> dict[str, str]:
    """A set of module names in few lines: equal sets give equal lines, and the other way round.

    ``layers.0.up``, ``layers.1.up`` and ``head`` are ``{"layers.*.up": "0-1", "head": "present"}``.
    """
    numbers: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        pattern = ".".join("*" if _is_number(part) else part for part in parts)
        numbers[pattern].add(tuple(int(part) for part in parts if _is_number(part)))
    return {pattern: _folded(found) or "present" for pattern, found in numbers.items()}


def _is_number(part: str) -> bool:
    """Whether a part of a name is a number that is written in the one usual way."""
    return part.isdecimal() and part == str(int(part))


def _folded(numbers: Iterable[tuple[int, ...]]) -> str:
    """Tuples of numbers as products of ranges: ``"0-27.0-7"``, several in parentheses."""
    tails: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    for number in numbers:
        if number:
            tails[number[0]].add(number[1:])
    alike: defaultdict[str, list[int]] = defaultdict(list)
    for first in sorted(tails):
        alike[_folded(tails[first])].append(first)
    products = [_ranges(firsts) + (f".{tail}" if tail else "") for tail, firsts in alike.items()]
    return products[0] if len(products) == 1 else " ".join(f"({product})" for product in products)


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs drawn together: ``"0-2,5"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


SECTION = Section(
    name="quantization",
    record=QuantizationRecord,
    capture=capture,
    capture_like=capture_like,
    prepare=prepare,
    finish=finish,
    restored=RESTORED,
    checked_on_base=True,
    error=QuantizationMismatchError,
)
