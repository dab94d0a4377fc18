"""How a model is loaded, and how an adapter is loaded into a live model: the order of the steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import peft
from torch import nn

from peftstate._injection import harmless_state_dict, readable_by_peft, set_tensors
from peftstate._snapshot import Snapshot
from peftstate._source import Source
from peftstate._steps import (
    Plan,
    check_base,
    compare_restored,
    prepare_base,
    restore_sections,
)
from peftstate.manifest import Manifest
from peftstate.sections import _origin, adapters, dtype, records_for_adapters, rng
from peftstate.sections._bitsandbytes_forms import kept
from peftstate.sections._view import ModelView
from peftstate.sections.predictions import inputs_of
from peftstate.sections.tokenizer import put_back_on_failure

T = TypeVar("T")

Inject = Callable[[Path, peft.PeftConfig], peft.PeftModel]
"""PEFT's `from_pretrained` on the base model: takes the folder and the adapter's config."""
Load = Callable[[Any, Path, str], Any]
"""PEFT's `load_adapter`: takes the model, the folder and the adapter's name."""


def load_model(
    base: nn.Module,
    source: Source,
    *,
    names: Mapping[str, str],
    plan: Plan,
    inject: Inject,
    load: Load,
    tokenizer: Any = None,
) -> tuple[peft.PeftModel, _origin.Origin]:
    """Load the adapters of a folder onto a base model.

    Args:
        base: The bare base model. If the load fails, it is as it was before.
        source: What was read from the folder.
        names: The adapters to load: name in the manifest → name in the model.
        plan: Which sections are restored.
        inject: How PEFT loads the first adapter.
        load: How PEFT loads a further one.
        tokenizer: The tokenizer that is to go with the model. If the load fails, it is as before.

    Returns:
        The model, and what its base model's checkpoint gave of it.

    Raises:
        StateMismatchError: The base model does not fit, or something is not as saved afterwards.
        RestoreError: A section cannot be restored.
    """
    manifest = for_adapters(source.manifest, names)
    bare = ModelView(model=base, tokenizer=tokenizer)
    check_base(bare, manifest, plan)
    own = source.own_adapter

    def steps() -> tuple[peft.PeftModel, _origin.Origin]:
        _spare_data(bare, names=manifest.sections["base_model"].shadowed)
        prepare_base(bare, manifest, plan)
        with readable_by_peft(source, own) as folder, kept(base):
            model = inject(folder, source.adapters[own].peft_config())
        for name in names.keys() - {own}:
            with readable_by_peft(source, name) as folder, kept(base):
                load(model, folder, names[name])
        view = ModelView(
            model=model,
            adapters=names,
            folders=_folders(manifest),
            tokenizer=tokenizer,
            probe=inputs_of(manifest.sections.get("predictions")),
        )
        set_tensors(view, source.adapters, manifest, plan)
        restore_sections(view, manifest, plan)
        compare_restored(view, manifest, plan)
        return model, _origin.of_loaded(view, manifest.sections["base_model"])

    restores_rng = rng.SECTION in plan.sections(bare, manifest)
    with put_back_on_failure(bare):
        return undone_on_failure(base, steps, keep_rng=not restores_rng)


def load_adapter(
    model: peft.PeftModel, source: Source, *, name: str, plan: Plan, load: Load
) -> Any:
    """Load one adapter into a live model, whose own state is left alone.

    Args:
        model: The model. If the load fails, it is as it was before.
        source: What was read from the adapter's folder.
        name: The adapter's name in the model; one that exists is replaced.
        plan: Which sections are restored and compared.
        load: How PEFT loads it.

    Returns:
        What PEFT's `load_adapter` returns.

    Raises:
        StateMismatchError: The base model is not the one that the adapter was saved with.
    """
    own = source.own_adapter
    manifest = for_adapters(source.manifest, {own})
    view = ModelView(model=model, adapters={own: name}, folders={own: "."})
    check_base(ModelView(model=view.base), manifest, plan)

    def steps() -> Any:
        _spare_data(view, adapter=name)
        with readable_by_peft(source, own) as folder, harmless_state_dict(model):
            result = load(model, folder, name)
        set_tensors(view, source.adapters, manifest, plan)
        expected = _as_live(manifest, view)
        dtype.restore_adapters(expected.sections["dtype"], view)
        adapters.restore_scaling(expected.sections["adapters"], view)
        compare_restored(view, expected, plan)
        return result

    return undone_on_failure(model, steps, keep_rng=True)


def _spare_data(view: ModelView, *, names: Collection[str] = (), adapter: str = "") -> None:
    """Give tensors other memory, for PEFT loads by writing into them.

    Args:
        view: The model, of which a snapshot was taken.
        names: Names of tensors of the base model.
        adapter: Name of an adapter, if all its tensors are meant.
    """
    for site in view.tensors():
        if (site.part == "base" and site.name in names) or (adapter and site.adapter == adapter):
            site.tensor.data = site.tensor.data.clone()


def for_adapters(manifest: Manifest, names: Collection[str]) -> Manifest:
    """A manifest without the adapters that are not looked at."""
    narrowed = records_for_adapters(manifest.sections, names)
    return attrs.evolve(manifest, sections=narrowed)


def _folders(manifest: Manifest) -> dict[str, str]:
    """The folder of each adapter of a manifest."""
    records = manifest.sections["adapters"].adapters
    return {name: record.folder for name, record in records.items()}


def _as_live(manifest: Manifest, view: ModelView) -> Manifest:
    """The manifest, with the live model's word on which adapters are active, applied, merged."""
    record = adapters.applied_as_in(view, manifest.sections["adapters"])
    return attrs.evolve(manifest, sections={**manifest.sections, "adapters": record})


def undone_on_failure(model: nn.Module, steps: Callable[[], T], *, keep_rng: bool) -> T:
    """Take steps that change a model; if one fails, put the model back.

    Args:
        model: What the steps change.
        steps: The steps.
        keep_rng: Whether the random generators are put back after success too: a load draws
            numbers for weights that it then overwrites.
    """
    generators = rng.states()
    snapshot = Snapshot.of(model)
    try:
        result = steps()
    except BaseException:
        snapshot.restore()
        rng.set_states(generators)
        raise
    if keep_rng:
        rng.set_states(generators)
    return result
