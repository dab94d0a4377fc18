"""How a model is loaded, and how an adapter is loaded into a live model: the order of the steps."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import attrs
import peft
from peft import LoraModel
from torch import nn

from peftstate import _placeholders as placeholders
from peftstate._base_check import (
    base_checked,
    base_checked_meanwhile,
    check_base_if_changed,
)
from peftstate._initialisation import (
    check_loads_alone,
    not_truncated_again,
    put_back_initialisation,
    without_initialisation,
)
from peftstate._injection import harmless_state_dict, readable_by_peft, set_tensors
from peftstate._injectors import Injector, Load
from peftstate._log import tell
from peftstate._snapshot import AddingSnapshot, Snapshot
from peftstate._source import AdapterFiles, Source
from peftstate._steps import (
    Plan,
    compare_restored,
    prepare_base,
    restore_sections,
)
from peftstate.errors import AdapterLoadError, PeftStateError
from peftstate.manifest import Manifest
from peftstate.sections import (
    _origin,
    adapters,
    base_model,
    dtype,
    extra_tensors,
    quantization,
    records_for_adapters,
    rng,
)
from peftstate.sections._generators import Standing
from peftstate.sections._view import ModelView
from peftstate.sections._walk import TensorSite
from peftstate.sections.predictions import inputs_of
from peftstate.sections.tokenizer import put_back_on_failure

T = TypeVar("T")
M = TypeVar("M", bound=peft.PeftModel)

Add = Callable[[Any, peft.PeftConfig, str], Any]
"""`placeholders.add`: takes the model, the adapter's config and its name."""
Finish = Callable[[peft.PeftModel, _origin.Origin], M]
"""Takes the loaded model, and what its base model's checkpoint gave of it. If it fails, so does the
load."""


def load_model(
    base: nn.Module,
    source: Source,
    *,
    names: Mapping[str, str],
    plan: Plan,
    injector: Injector,
    finish: Finish[M],
    tokenizer: Any = None,
) -> M:
    """Load the adapters of a folder onto a base model.

    Args:
        base: The bare base model. If the load fails, it is as it was before.
        source: What was read from the folder.
        names: The adapters to load: name in the manifest → name in the model.
        plan: Which sections are restored.
        injector: How the adapters are put into it.
        finish: What is left to do with the model.
        tokenizer: The tokenizer that is to go with the model. If the load fails, it is as before.

    Returns:
        What `finish` returns.

    Raises:
        StateMismatchError: The base model does not fit, or something is not as saved afterwards.
        RestoreError: A section cannot be restored.
    """
    began = time.perf_counter()
    manifest = for_adapters(source.manifest, names)
    bare = ModelView(model=base, tokenizer=tokenizer).now()
    given = without_initialisation(source, plan, bare)
    injector = injector.fit_for(given, bare, names.values())

    def steps() -> M:
        if injector.wrap is None:
            shadowed = manifest.sections["base_model"].shadowed
            written = {*shadowed, *_names_in_base(source.adapters)}
            _spare_data(site for site in bare.tensors() if site.name in written)
        prepare_base(bare, manifest, plan)
        restores = extra_tensors.SECTION in plan.sections(bare, manifest)
        extra = manifest.sections["extra_tensors"].adapters[source.own_adapter] if restores else ()
        view = ModelView(
            model=injector.put_in(base, given, names, extra),
            adapters=names,
            folders=_folders(manifest),
            tokenizer=tokenizer,
            probe=inputs_of(manifest.sections.get("predictions")),
        )
        put_back_initialisation(view, source.adapters)
        walked = view.now()
        set_tensors(walked, source.adapters, manifest, plan)
        merges = bool(manifest.sections["adapters"].merged)
        if merges or "predictions" in manifest.sections:
            end_check()
        if merges:
            _spare_data(
                site
                for site in walked.tensors()
                if site.part == "base" and site.adapted and site.tensor.is_floating_point()
            )
        restore_sections(walked, manifest, plan)
        if merges:  # embeddings in the file are merged already
            set_tensors(walked, source.adapters, manifest, plan)
        report = compare_restored(walked, manifest, plan)
        end_check()
        from_sidecar = manifest.sections["extra_tensors"].base
        base_record = manifest.sections["base_model"]
        loaded = finish(view.model, _origin.of_loaded(walked, base_record, extra=from_sidecar))
        tell("loaded", source.folder.path, manifest, since=began, sections=report.sections)
        return loaded

    restores_rng = rng.SECTION in plan.sections(bare, manifest)
    restores_rng = restores_rng and rng.is_own(manifest.sections["rng"])
    # PEFT may write to the weights while it injects; placeholders leave them alone
    check = base_checked if injector.wrap is None else base_checked_meanwhile
    with check(bare, manifest, plan) as end_check, put_back_on_failure(bare):
        return undone_on_failure(base, steps, keep_rng=not restores_rng)


def load_adapter(
    model: peft.PeftModel,
    source: Source,
    *,
    name: str,
    plan: Plan,
    load: Load,
    add: Add | None = None,
) -> Any:
    """Load one adapter into a live model, whose own state is left alone.

    Args:
        model: The model. If the load fails, it is as it was before.
        source: What was read from the adapter's folder.
        name: The adapter's name in the model; one that exists is replaced.
        plan: Which sections are restored and compared.
        load: How PEFT loads it.
        add: How a new adapter is added where all weights are in its file; `None` if PEFT was asked
            for something that it has to do itself.

    Returns:
        What PEFT's `load_adapter` returns.

    Raises:
        StateMismatchError: The base model is not the one that the adapter was saved with.
        RestoreError: The adapter needs a base model whose weights it rewrote.
    """
    began = time.perf_counter()
    check_loads_alone(source)
    own = source.own_adapter
    manifest = for_adapters(source.manifest, {own})
    view = ModelView(model=model, adapters={own: name}, folders={own: "."})
    bare = ModelView(model=view.base).now()
    # The parameters of an adapter that is there stay the objects that an optimizer holds.
    is_new = name not in model.peft_config and isinstance(model.base_model, LoraModel)
    if not is_new or not placeholders.suffice(source, bare, {name}):
        add = None
    check_base_if_changed(bare, manifest, plan)

    def loaded() -> Any:
        """What PEFT loads."""
        written = _names_in_base(source.adapters)
        _spare_data(
            site
            for site in view.tensors()
            if site.adapter == name or (site.part == "base" and site.name in written)
        )
        readable = readable_by_peft(source, own)
        with readable as folder, harmless_state_dict(model), not_truncated_again(source, view):
            return load(model, folder, name)

    def steps() -> Any:
        result = loaded() if add is None else add(model, source.adapters[own].peft_config(), name)
        walked = view.now()
        set_tensors(walked, source.adapters, manifest, plan)
        expected = _as_live(manifest, walked, plan)
        dtype.restore_adapters(expected.sections["dtype"], walked)
        adapters.restore_scaling(expected.sections["adapters"], walked)
        report = compare_restored(walked, expected, plan)
        tell("loaded", source.folder.path, manifest, since=began, sections=report.sections)
        return result

    snapshot = Snapshot.of if add is None else AddingSnapshot.of
    return undone_on_failure(model, steps, keep_rng=True, snapshot=snapshot)


def _spare_data(sites: Iterable[TensorSite]) -> None:
    """Give tensors other memory, for PEFT writes into them: a snapshot refers to what they have."""
    for site in sites:
        site.tensor.data = site.tensor.data.clone()


def _names_in_base(files: Mapping[str, AdapterFiles]) -> set[str]:
    """What adapters' files would have for names if they were tensors of the base model.

    Embeddings and biases may be there; in a file that was made to do harm it may be any tensor.
    """
    keys = (key for read in files.values() for key in read.tensors)
    names = (key.removeprefix("base_model.").removeprefix("model.") for key in keys)
    return {_WRAPPERS.sub(".", name) for name in names}


_WRAPPERS = re.compile(r"\.(?:base_layer|original_module)\.")
"""What PEFT puts into the names of the modules that it wraps."""


def for_adapters(manifest: Manifest, names: Collection[str]) -> Manifest:
    """A manifest without the adapters that are not looked at."""
    narrowed = records_for_adapters(manifest.sections, names)
    return attrs.evolve(manifest, sections=narrowed)


def _folders(manifest: Manifest) -> dict[str, str]:
    """The folder of each adapter of a manifest."""
    records = manifest.sections["adapters"].adapters
    return {name: record.folder for name, record in records.items()}


def _as_live(manifest: Manifest, view: ModelView, plan: Plan) -> Manifest:
    """The manifest, with the live model's word on what is no matter of one adapter.

    That is which adapters are active, applied and merged, the special ids, and what running the
    base model has changed.
    """
    record = adapters.applied_as_in(view, manifest.sections["adapters"])
    sections = {**manifest.sections, "adapters": record}
    compared = {section.name for section in plan.sections(view, manifest)}
    for section in (base_model, dtype, quantization):
        if (name := section.SECTION.name) in compared:
            sections[name] = section.as_live(sections[name], view)
    return attrs.evolve(manifest, sections=sections)


def undone_on_failure(
    model: nn.Module,
    steps: Callable[[], T],
    *,
    keep_rng: bool,
    snapshot: Callable[[nn.Module], Snapshot | AddingSnapshot] = Snapshot.of,
) -> T:
    """Take steps that change a model; if one fails, put the model back.

    Args:
        model: What the steps change.
        steps: The steps.
        keep_rng: Whether the random generators are put back after success too: a load draws
            numbers for weights that it then overwrites.
        snapshot: Takes down how the model is.

    Raises:
        AdapterLoadError: PEFT, or torch, raised an error of its own.
    """
    generators = Standing.now()
    before = snapshot(model)
    try:
        result = steps()
        if keep_rng:
            generators.put_back()
        return result  # as late as this, Ctrl-C may come
    except BaseException as error:
        before.restore()
        generators.put_back()
        if isinstance(error, (PeftStateError, Warning)) or not isinstance(error, Exception):
            raise
        message = f"the adapter could not be loaded ({type(error).__name__}: {error})"
        raise AdapterLoadError("adapters", message) from error
