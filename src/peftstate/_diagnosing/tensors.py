"""Tensors: their dtypes, and their values where these differ by more than a dtype loses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial

from peftstate._diagnosing.layers import merged_otherwise, requantized, swap
from peftstate._diagnosing.pair import (
    Difference,
    Key,
    Pair,
    alike,
    counted,
    key,
    plain_tensors,
    put,
    usual,
)
from peftstate.sections._base_tensors import BaseTensor, base_tensors
from peftstate.sections._bitsandbytes_forms import form_of
from peftstate.sections._tensors import dtype_name
from peftstate.sections._walk import TensorSite

_BASE_REMEDY = (
    "Load the base model with the dtype= that it had: base_model_kwargs(adapter), or `peftstate "
    "base-args`. What was cast after that, peftstate casts, too."
)
_ADAPTER_REMEDY = (
    "Load with peftstate, or with PEFT's autocast_adapter_dtype=False: by default PEFT casts an "
    "adapter in 16 bits to float32."
)
_DTYPES = (
    ("base dtype", ("base", "model"), _BASE_REMEDY),
    ("adapter dtype", ("adapter",), _ADAPTER_REMEDY),
)


def dtypes(pair: Pair) -> Iterator[Difference]:
    """The dtypes of the base model's tensors, and of the adapters'."""
    saved = plain_tensors(pair.exact)
    for name, parts, remedy in _DTYPES:
        differing = [
            (dtype_name(saved[each].tensor.dtype), dtype_name(pair.theirs[each].dtype))
            for each in saved.keys() & pair.theirs.keys()
            if saved[each].part in parts and saved[each].tensor.dtype != pair.theirs[each].dtype
        ]
        if differing:
            one, other = usual(differing)
            yield Difference(
                name=name,
                section="dtype",
                saved=one,
                found=other,
                remedy=remedy,
                give=partial(_give_dtypes, pair, parts),
            )


def _give_dtypes(pair: Pair, parts: Collection[str]) -> None:
    """Cast tensors; where the user's hold what the cast would not bring back, take these."""
    for name, site in plain_tensors(pair.exact).items():
        if name in pair.theirs and site.part in parts:
            found = pair.theirs[name]
            if site.tensor.dtype != found.dtype:
                same = alike(site.tensor, found)
                put(site, found if same else site.tensor, dtype=found.dtype)


def values(pair: Pair) -> Iterator[Difference]:
    """Tensors of the base model and of the adapters that are other ones."""
    theirs = base_tensors(pair.users)
    ours = _comparable(pair)
    differing = {
        name
        for name, base in ours.items()
        if name not in theirs or not alike(base.tensor, theirs[name].tensor)
    }
    rounded = {name for name in differing if _is_in_other_form(ours[name], theirs.get(name))}
    extra = pair.manifest.sections["extra_tensors"].among(differing) - rounded
    if rounded:
        yield Difference(
            name="rounded 4-bit scales",
            section="quantization",
            saved="rounded when it had run",
            found="as they were quantized",
            remedy="Load with peftstate, which rounds them as they were.",
            give=partial(_give_base, pair, rounded),
        )
    yield from _of_base(pair, differing - extra - rounded)
    yield from _dropped(pair, extra)
    yield from _of_adapters(pair)


def _comparable(pair: Pair) -> dict[str, BaseTensor]:
    """The exact reload's tensors of the base model whose values can be compared with others."""
    skipped = {*requantized(pair), *merged_otherwise(pair)}
    return {
        name: base
        for name, base in base_tensors(pair.exact).items()
        if not base.shadowed and _layer(base) not in skipped
    }


def _layer(base: BaseTensor) -> str:
    """The name of the module that a tensor of the base model hangs on."""
    return base.owner.name.removesuffix(base.owner.leaf).removesuffix(".")


def _is_in_other_form(base: BaseTensor, other: BaseTensor | None) -> bool:
    """Whether a 4-bit layer was packed and unpacked in one of the models only."""
    if base.site is not None or other is None:
        return False
    return form_of(base.owner.module) != form_of(other.owner.module)


def _of_base(pair: Pair, names: Collection[str]) -> Iterator[Difference]:
    """The weights of another base model, or of one that was trained."""
    if names:
        yield Difference(
            name="base weights",
            section="base_model",
            saved=counted(names),
            found="other values",
            remedy="Load the base model that the adapter was trained on; the manifest's "
            "base_model.commit names it, where it came from the Hub.",
            give=partial(_give_base, pair, names),
        )


def _dropped(pair: Pair, extra: Collection[str]) -> Iterator[Difference]:
    """What no file of PEFT has: of the base model, and of the adapters."""
    adapters = _differing(pair, extra=True)
    if extra or adapters:
        names = [*extra, *(name for _, _, name in adapters)]

        def give() -> None:
            _give_base(pair, extra)
            _give_plain(pair, adapters)

        yield Difference(
            name="tensors PEFT drops",
            section="extra_tensors",
            saved=counted(names),
            found="as before the training",
            remedy="Load with peftstate, which keeps them in peftstate.tensors.",
            give=give,
        )


def _of_adapters(pair: Pair) -> Iterator[Difference]:
    """Tensors of the adapters that did not come from the adapter's file."""
    if names := _differing(pair, extra=False):
        yield Difference(
            name="adapter weights",
            section="adapters",
            saved=counted(name for _, _, name in names),
            found="other values",
            remedy="Load with peftstate, or look for PEFT's warning of missing adapter keys.",
            give=partial(_give_plain, pair, names),
        )


def _differing(pair: Pair, *, extra: bool) -> list[Key]:
    """The adapters' tensors whose values differ: those of the sidecar, or those of PEFT's file."""
    dropped = _names_of_dropped(pair)
    return [
        each
        for each, site in plain_tensors(pair.exact).items()
        if site.part == "adapter" and ((site.adapter, site.name) in dropped) is extra
        if each[1] in pair.users.adapters.values()
        if each not in pair.theirs or not alike(site.tensor, pair.theirs[each])
    ]


def _names_of_dropped(pair: Pair) -> set[tuple[str | None, str]]:
    """The live adapter and the name of each adapter's tensor that PEFT does not save."""
    adapters: Mapping[str, Mapping[str, object]] = pair.manifest.sections["extra_tensors"].adapters
    return {(pair.exact.adapters[saved], name) for saved in adapters for name in adapters[saved]}


def _give_base(pair: Pair, names: Collection[str]) -> None:
    """Give the exact reload tensors of the user's base model, in the dtypes that it has.

    Raises:
        LookupError: The user's model does not have one.
    """
    ours = base_tensors(pair.exact)
    if layers := sorted({_layer(ours[name]) for name in names if ours[name].site is None}):
        swap(pair, layers)
    for name in names:
        site = ours[name].site
        if site is not None:
            _put_theirs(pair, site)


def _give_plain(pair: Pair, names: Collection[Key]) -> None:
    """Give the exact reload tensors of the user's adapters, in the dtypes that it has.

    Raises:
        LookupError: The user's model does not have one.
    """
    prompts = {name for _, name, _ in names if name and _has_another_form(pair, name)}
    for name in prompts:
        _give_prompt(pair, name)
    for site in pair.exact.tensors():
        if key(site) in names and site.adapter not in prompts:
            _put_theirs(pair, site)


def _has_another_form(pair: Pair, adapter: str) -> bool:
    """Whether a prompt is computed by layers in one of the models, and an embedding in the other.

    PEFT loads the embedding that the layers computed, without these.
    """
    ours = {site for site in plain_tensors(pair.exact) if site[1] == adapter}
    theirs = {site for site in pair.theirs if site[1] == adapter}
    return ours != theirs and bool(pair.exact.model.peft_config[adapter].is_prompt_learning)


def _give_prompt(pair: Pair, adapter: str) -> None:
    """Give the exact reload the whole of what makes a prompt in the user's model."""
    ours, theirs = pair.exact.model, pair.users.model
    ours.prompt_encoder[adapter] = theirs.prompt_encoder[adapter]
    ours.peft_config[adapter].inference_mode = theirs.peft_config[adapter].inference_mode


def _put_theirs(pair: Pair, site: TensorSite) -> None:
    """Put the user's tensor in a place of the exact reload, in the dtype that this has.

    Raises:
        LookupError: The user's model does not have it.
    """
    if key(site) not in pair.theirs:
        raise LookupError(f"the model as it was loaded has no {site.name}")
    put(site, pair.theirs[key(site)], dtype=site.tensor.dtype)
