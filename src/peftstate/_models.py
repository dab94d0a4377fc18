"""The model classes: PEFT's, under the same names, whose saves and loads keep the whole state.

They are static subclasses, since transformers, MLflow and others compare the names of classes,
and pickle needs to import them. PEFT's `from_pretrained` and `get_peft_model` make objects of its
own classes, which are then given ours.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft import PeftConfig
from peft import PeftMixedModel as PeftMixedModel  # as it is: PEFT cannot save it

from peftstate._folder import AdapterFolder, open_folder
from peftstate._loading import load_adapter, load_model
from peftstate._policy import OnMismatch, Policy
from peftstate._saving import save
from peftstate._source import read_source
from peftstate._steps import LOCK, Plan
from peftstate._storage import MANIFEST_NAME
from peftstate._warn import warn
from peftstate.errors import ManifestNotFoundError, MissingManifestWarning, TrainModeWarning
from peftstate.sections import _origin
from peftstate.sections._view import FINGERPRINTS, ModelView

if TYPE_CHECKING:
    from peftstate._source import Source

HUB_ARGUMENTS = (
    "subfolder",
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
)


class PeftModel(peft.PeftModel):
    """`peft.PeftModel`, saved and loaded with its whole state.

    Everything that is not said here is as in PEFT.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        fingerprint: str = "full",
        **kwargs: Any,
    ) -> None:
        """Save the adapters as PEFT does, and beside them the state that PEFT drops.

        The live model is left as it was, bit for bit. The folder reads as the old or as the new
        generation at any moment, also if the process is killed.

        Args:
            save_directory: The folder. It stays an ordinary PEFT adapter.
            safe_serialization: As in PEFT.
            selected_adapters: As in PEFT.
            save_embedding_layers: As in PEFT.
            is_main_process: As in PEFT: the other processes write nothing.
            path_initial_model_for_weight_conversion: As in PEFT.
            fingerprint: What the digests of the base model cover: ``"full"``, every byte;
                ``"sampled"``, some places of each tensor; ``"off"``, nothing.
            **kwargs: As in PEFT.

        Raises:
            SaveError: The state cannot be saved; `rescued` is a folder with what PEFT could save.
        """
        if os.path.isfile(save_directory):  # noqa: PTH113 - PEFT's own words for this follow
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        converts = path_initial_model_for_weight_conversion is not None

        def write(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
            # To convert, PEFT loads the initial adapter into this model, and takes its state then.
            given = kwargs if converts else {"state_dict": state, **kwargs}
            with _as_pefts_own(self) if converts else nullcontext():
                peft.PeftModel.save_pretrained(
                    self,
                    str(folder),
                    safe_serialization,
                    selected_adapters,
                    save_embedding_layers,
                    is_main_process,
                    path_initial_model_for_weight_conversion,
                    **given,
                )

        if is_main_process:
            view = _view_to_save(self, selected_adapters, fingerprint)
            save(view, Path(save_directory), write, restores_base=converts)
        else:
            write(Path(save_directory), {})

    @classmethod
    def from_pretrained(
        cls,
        model: torch.nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool | None = None,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        on_mismatch: OnMismatch | None = None,
        require_manifest: bool = False,
        adapters: Collection[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the saved model onto a base model, in the state it was saved in, or raise.

        Args:
            model: The base model. If the load fails it is as it was before.
            model_id: The folder, or the id of a repo on the Hub.
            adapter_name: The name that the folder's own adapter gets in the model.
            is_trainable: ``None``: as it was saved, train flags, trainable parameters and random
                generators included. ``False``: PEFT's promise of inference: eval mode, frozen, and
                the random generators stand after the load where they stood before. ``True``: as it
                was saved, to go on with training.
            config: As in PEFT.
            autocast_adapter_dtype: As in PEFT, for an adapter without a manifest. With one, every
                tensor gets the dtype it was saved in.
            ephemeral_gpu_offload: As in PEFT.
            low_cpu_mem_usage: As in PEFT.
            key_mapping: As in PEFT.
            on_mismatch: What to do about differences: ``"error"``, ``"warn"`` or ``"ignore"``,
                for all or by section. What is ignored is not restored either. By default
                `environment` and `runtime` warn and the rest is an error.
            require_manifest: Whether an adapter without a manifest is an error, not a warning.
            adapters: The adapters to load, by their saved names; by default all. The folder's own
                is always among them.
            **kwargs: As in PEFT.

        Raises:
            ManifestError: The manifest cannot be used.
            IntegrityError: A file is not the one that was saved.
            StateMismatchError: The model differs from the saved one in what cannot be restored.
            RestoreError: Some state cannot be set.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        policy = Policy.of(on_mismatch)

        def peft_load(source: str, trainable: bool, config: PeftConfig | None) -> peft.PeftModel:
            loaded: peft.PeftModel = peft.PeftModel.from_pretrained(
                model,
                source,
                adapter_name,
                trainable,
                config,
                autocast_adapter_dtype=autocast_adapter_dtype,
                ephemeral_gpu_offload=ephemeral_gpu_offload,
                low_cpu_mem_usage=low_cpu_mem_usage,
                key_mapping=key_mapping,
                **kwargs,
            )
            return loaded

        with LOCK:
            folder = _folder_with_manifest(model_id, hub, require_manifest=require_manifest)
            if folder is None:
                origin = _origin.observe(ModelView(model=model))
                return _attach(peft_load(str(model_id), bool(is_trainable), config), origin)
            for name in hub:
                del kwargs[name]
            source = read_source(folder, adapters)
            plan = _plan(policy, source, is_trainable=is_trainable)
            trainable = _is_trainable_in_peft(source, policy, is_trainable=is_trainable)
            loaded, origin = load_model(
                model,
                source,
                names=_live_names(source, adapter_name),
                plan=plan,
                inject=lambda path, saved: peft_load(str(path), trainable, config or saved),
                load=lambda live, path, name: peft.PeftModel.load_adapter(live, str(path), name),
            )
        if is_trainable is None and any(module.training for module in loaded.modules()):
            warn(
                "The model is in train mode, as it was saved, so dropout is on where it has any. "
                "For inference call model.eval(), or load it with is_trainable=False.",
                TrainModeWarning,
            )
        return _attach(loaded, origin)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        on_mismatch: OnMismatch | None = None,
        require_manifest: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load one more adapter, verified against the live base model.

        Nothing but the adapter's own state is restored. If it fails the model is as it was.

        Args:
            model_id: The folder, or the id of a repo on the Hub.
            adapter_name: The name that it gets; an adapter of that name is replaced.
            is_trainable: As in PEFT.
            torch_device: As in PEFT.
            autocast_adapter_dtype: As in PEFT, for an adapter without a manifest.
            ephemeral_gpu_offload: As in PEFT.
            low_cpu_mem_usage: As in PEFT.
            key_mapping: As in PEFT.
            on_mismatch: As in `from_pretrained`.
            require_manifest: As in `from_pretrained`.
            **kwargs: As in PEFT.

        Returns:
            What PEFT returns: the keys that were missing, and those that were not expected.

        Raises:
            ManifestError: The manifest cannot be used.
            IntegrityError: A file is not the one that was saved.
            StateMismatchError: The base model is not the one that the adapter was saved with.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        policy = Policy.of(on_mismatch)

        def peft_load(live: Any, path: str | Path, name: str) -> Any:
            return peft.PeftModel.load_adapter(
                live,
                str(path),
                name,
                is_trainable,
                torch_device,
                autocast_adapter_dtype=autocast_adapter_dtype,
                ephemeral_gpu_offload=ephemeral_gpu_offload,
                low_cpu_mem_usage=low_cpu_mem_usage,
                key_mapping=key_mapping,
                **kwargs,
            )

        with LOCK:
            folder = _folder_with_manifest(model_id, hub, require_manifest=require_manifest)
            if folder is None:
                return peft_load(self, str(model_id), adapter_name)
            for name in hub:
                del kwargs[name]
            source = read_source(folder, ())
            plan = Plan(policy=policy, skipped=_NOT_AN_ADAPTERS)
            return load_adapter(self, source, name=adapter_name, plan=plan, load=peft_load)


class PeftModelForCausalLM(PeftModel, peft.PeftModelForCausalLM):
    """`peft.PeftModelForCausalLM`, saved and loaded with its whole state."""


class PeftModelForFeatureExtraction(PeftModel, peft.PeftModelForFeatureExtraction):
    """`peft.PeftModelForFeatureExtraction`, saved and loaded with its whole state."""


class PeftModelForQuestionAnswering(PeftModel, peft.PeftModelForQuestionAnswering):
    """`peft.PeftModelForQuestionAnswering`, saved and loaded with its whole state."""


class PeftModelForSeq2SeqLM(PeftModel, peft.PeftModelForSeq2SeqLM):
    """`peft.PeftModelForSeq2SeqLM`, saved and loaded with its whole state."""


class PeftModelForSequenceClassification(PeftModel, peft.PeftModelForSequenceClassification):
    """`peft.PeftModelForSequenceClassification`, saved and loaded with its whole state."""


class PeftModelForTokenClassification(PeftModel, peft.PeftModelForTokenClassification):
    """`peft.PeftModelForTokenClassification`, saved and loaded with its whole state."""


_CLASSES: dict[type[peft.PeftModel], type[PeftModel]] = {
    peft.PeftModel: PeftModel,
    peft.PeftModelForCausalLM: PeftModelForCausalLM,
    peft.PeftModelForFeatureExtraction: PeftModelForFeatureExtraction,
    peft.PeftModelForQuestionAnswering: PeftModelForQuestionAnswering,
    peft.PeftModelForSeq2SeqLM: PeftModelForSeq2SeqLM,
    peft.PeftModelForSequenceClassification: PeftModelForSequenceClassification,
    peft.PeftModelForTokenClassification: PeftModelForTokenClassification,
}
"""The class of ours that an object of PEFT's is given."""


def attach(model: peft.PeftModel) -> PeftModel:
    """Make a model that somebody else wrapped save and load with its whole state.

    Args:
        model: What `peft.get_peft_model` or a trainer made; it is changed in place. One that is
            attached already is left alone. Attach before `torch.compile`, FSDP or DDP wrap it, and
            before it is trained: a change of the base model is seen against what it was now.

    Returns:
        The same object, now of our class of the same name.

    Raises:
        TypeError: It is not a PEFT model, or of a class that this version does not know.
    """
    if isinstance(model, PeftModel):
        return model
    return _attach(model, _origin.observe(ModelView.of(model)))


def _attach(model: peft.PeftModel, origin: _origin.Origin) -> PeftModel:
    """Give a model its class, and what was seen of its base before it was trained."""
    if type(model) not in _CLASSES:
        known = ", ".join(cls.__name__ for cls in _CLASSES)
        raise TypeError(f"cannot attach to a {type(model).__name__}; it must be one of PEFT's {known}")
    model.__class__ = _CLASSES[type(model)]
    _origin.keep(model, origin)
    assert isinstance(model, PeftModel)
    return model


@contextmanager
def _as_pefts_own(model: PeftModel) -> Iterator[None]:
    """Have a model be of PEFT's own class for a while, so that what PEFT calls on it is PEFT's."""
    ours: Any = type(model)
    theirs: Any = next(theirs for theirs, cls in _CLASSES.items() if cls is ours)
    model.__class__ = theirs
    try:
        yield
    finally:
        model.__class__ = ours


def get_peft_model(model: torch.nn.Module, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
    """`peft.get_peft_model`, and `attach`.

    Args:
        model: The base model.
        peft_config: The adapter's config.
        *args: As in PEFT.
        **kwargs: As in PEFT.

    Returns:
        The wrapped model; with ``mixed=True`` PEFT's own `PeftMixedModel`, which PEFT cannot save.
    """
    origin = _origin.observe(ModelView(model=model))
    wrapped = peft.get_peft_model(model, peft_config, *args, **kwargs)
    return wrapped if isinstance(wrapped, PeftMixedModel) else _attach(wrapped, origin)


_NOT_AN_ADAPTERS = frozenset(
    {"implementation", "training", "generation", "environment", "rng"}
)
"""Sections that say nothing of one adapter in a model that has more."""
_OF_TRAINING = frozenset({"training", "rng"})
"""Sections that a load for inference leaves alone."""


def _folder_with_manifest(
    model_id: str | os.PathLike[str], hub: Mapping[str, Any], *, require_manifest: bool
) -> AdapterFolder | None:
    """Open a folder; `None`, after a warning, if there is no manifest in it.

    Raises:
        ManifestNotFoundError: There is none, but one is required.
    """
    folder = open_folder(model_id, **hub)
    if folder.exists(MANIFEST_NAME):
        return folder
    path = str(folder.path / MANIFEST_NAME)
    if require_manifest:
        raise ManifestNotFoundError(path)
    warn(
        f"{path}: there is no peftstate manifest. The adapter is loaded as PEFT loads it; nothing "
        "of its state is verified or restored. Save it with peftstate to change that.",
        MissingManifestWarning,
    )
    return None


def _plan(policy: Policy, source: Source, *, is_trainable: bool | None) -> Plan:
    """Which sections a load restores."""
    if is_trainable is False:
        return Plan(policy=policy, skipped=_OF_TRAINING)
    if is_trainable and not source.manifest.sections["training"].trains_adapter:
        return Plan(policy=policy, skipped=frozenset({"training"}))
    return Plan(policy=policy)


def _is_trainable_in_peft(source: Source, policy: Policy, *, is_trainable: bool | None) -> bool:
    """What PEFT is told, which refuses to load prompts for training; `training` restores that."""
    if source.is_prompt_learning:
        return False
    if is_trainable is not None:
        return is_trainable
    saved: bool = source.manifest.sections["training"].trains_adapter
    return saved and policy.handles("training")


def _live_names(source: Source, adapter_name: str) -> dict[str, str]:
    """The names of the adapters in the model: the folder's own gets the one that was asked for."""
    names = {name: name for name in source.adapters}
    names[source.own_adapter] = adapter_name
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of another adapter in {source.folder.path}; "
            "choose another one, or limit adapters=."
        )
    return names


def _view_to_save(model: PeftModel, selected: list[str] | None, fingerprint: str) -> ModelView:
    """The view of the adapters that are saved.

    Raises:
        ValueError: There is no such adapter, or no such fingerprint.
    """
    if fingerprint not in FINGERPRINTS:
        raise ValueError(f"{fingerprint=} is none of {FINGERPRINTS}")
    view = ModelView.of(model, fingerprint=fingerprint)
    names = list(view.adapters) if selected is None else selected
    if unknown := [name for name in names if name not in view.adapters]:
        raise ValueError(
            f"You passed an invalid `selected_adapters` arguments, current supported adapter names "
            f"are {list(view.adapters)} - got {unknown}."
        )
    return view.limited_to(names)
