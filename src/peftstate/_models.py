"""The model classes: PEFT's, under the same names, whose saves and loads keep the whole state.

They are static subclasses, since transformers, MLflow and others compare the names of classes,
and pickle needs to import them. PEFT's `from_pretrained` and `get_peft_model` make objects of its
own classes, which are then given ours.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import peft
import torch
from peft import PeftConfig, PeftMixedModel

from peftstate._arguments import (
    NOT_AN_ADAPTERS,
    check_tokenizer,
    folder_with_manifest,
    hub_arguments,
    is_trainable_in_peft,
    live_names,
    plan_of,
    view_to_save,
)
from peftstate._calls import calling_peft
from peftstate._injectors import Injector
from peftstate._loading import load_adapter, load_model
from peftstate._modules import shared_modules_of
from peftstate._placeholders import add, wrap
from peftstate._policy import OnMismatch, Policy
from peftstate._pushing import PushedModel, with_parameters_of_push
from peftstate._ranks import save_rank
from peftstate._reproducible import keep_process
from peftstate._saving import save
from peftstate._source import Source, read_source
from peftstate._steps import LOCK, Plan
from peftstate._tokenizer_files import check_beside
from peftstate._warn import warn
from peftstate._work import collecting_seldom
from peftstate.errors import TrainModeWarning
from peftstate.sections import _bitsandbytes_forms as forms
from peftstate.sections import _merges, _origin
from peftstate.sections._view import ModelView, keep_tokenizer

if TYPE_CHECKING:
    from peftstate._keys import SigningKey, TrustedKeys

__all__ = [
    "PeftMixedModel",  # PEFT's own, which it can load but not save
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "attach",
    "get_peft_model",
]


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
        tokenizer: Any = None,
        prediction_probe: Mapping[str, torch.Tensor] | torch.Tensor | bool | None = None,
        keep_merged_weights: bool = False,
        sign_with: SigningKey | None = None,
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
            is_main_process: As in PEFT. Of several processes the others write nothing but the
                states of their random generators.
            path_initial_model_for_weight_conversion: As in PEFT.
            fingerprint: What the digests of the base model cover: ``"full"``, every byte;
                ``"sampled"``, some places of each tensor; ``"off"``, nothing.
            tokenizer: The tokenizer, or the processor, that goes with the model. It is recorded,
                and its own files are written into the folder, so that this is complete.
            prediction_probe: Inputs to predict on, now and after each load: a mapping as `forward`
                takes it, a tensor of ids, or ``True`` for a fixed row of ids. The logits are
                stored whole, so a few short texts do.
            keep_merged_weights: Whether the weights that adapters are merged into are saved
                themselves, beside the adapters. Else a load merges again, which gives the same
                weights if they were the checkpoint's before and the adapters were merged once; if
                that is not certain, a warning tells. It takes the space of these weights.
            sign_with: The private key to sign the files with, as `sign` takes it. What a trainer
                writes into the folder afterwards is not covered; call `sign` after that.
            **kwargs: As in PEFT.

        Raises:
            SaveError: The state cannot be saved, or not signed; `rescued` is a folder with what
                could be saved.
            TypeError: The tokenizer or the probe is something else.
            ValueError: There is no such adapter or fingerprint, or no probe can be made up.
        """
        if os.path.isfile(save_directory):  # noqa: PTH113 - PEFT's own words for this follow
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        converts = path_initial_model_for_weight_conversion is not None

        @calling_peft()
        def write(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
            # To convert, PEFT loads the initial adapter into this model, and takes its state then.
            # A trainer passes `None`, for PEFT to ask the model, which would unpack 4-bit layers.
            passed = {name: value for name, value in kwargs.items() if value is not None}
            given = kwargs if converts else {"state_dict": state, **passed}
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
            if tokenizer is not None and is_main_process:
                tokenizer.save_pretrained(str(folder))

        if is_main_process:
            view = view_to_save(
                self,
                selected_adapters,
                fingerprint=fingerprint,
                tokenizer=tokenizer,
                prediction_probe=prediction_probe,
                keep_merged_weights=keep_merged_weights,
            )
            saved = save(
                view, Path(save_directory), write, restores_base=converts, sign_with=sign_with
            )
            keep_process(self, saved)
        else:
            write(Path(save_directory), {})
            view = ModelView.of(self)
            if selected_adapters is not None:
                view = view.limited_to(selected_adapters)
            save_rank(view, Path(save_directory))

    @with_parameters_of_push
    def push_to_hub(
        self,
        repo_id: str,
        *args: Any,
        fingerprint: str = "full",
        tokenizer: Any = None,
        prediction_probe: Mapping[str, torch.Tensor] | torch.Tensor | bool | None = None,
        keep_merged_weights: bool = False,
        sign_with: SigningKey | None = None,
        **kwargs: Any,
    ) -> str:
        """Save the model as `save_pretrained` does, and upload what was saved in one commit.

        Args:
            repo_id: The id of the repo, which is made if there is none.
            *args: As in transformers.
            fingerprint: As in `save_pretrained`.
            tokenizer: As in `save_pretrained`.
            prediction_probe: As in `save_pretrained`.
            keep_merged_weights: As in `save_pretrained`.
            sign_with: As in `save_pretrained`. The model card, which is written later, is not
                covered by any signature.
            **kwargs: As in transformers.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            SaveError: As in `save_pretrained`; nothing was uploaded.
        """
        save_pretrained = partial(
            self.save_pretrained,
            fingerprint=fingerprint,
            tokenizer=tokenizer,
            prediction_probe=prediction_probe,
            keep_merged_weights=keep_merged_weights,
            sign_with=sign_with,
        )
        return PushedModel(save_pretrained).push_to_hub(repo_id, *args, **kwargs)

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
        tokenizer: Any = None,
        trusted_keys: TrustedKeys | None = None,
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
            low_cpu_mem_usage: As in PEFT, for an adapter without a manifest. With one it is not
                passed on: of some tuners PEFT makes fewer tensors then, or other ones.
            key_mapping: As in PEFT.
            on_mismatch: What to do about differences: ``"error"``, ``"warn"`` or ``"ignore"``,
                for all or by section. What is ignored is not restored either. By default
                `environment` and `runtime` warn and the rest is an error.
            require_manifest: Whether an adapter without a manifest is an error, not a warning.
            adapters: The adapters to load, by their saved names; by default all. The folder's own
                is always among them.
            tokenizer: The tokenizer, or the processor, that goes with the model. If one was saved
                it must be the same; its sides, maximum length and chat template are set as saved.
                Without it, that which lies in the folder is compared, if there is one.
            trusted_keys: Load only what the owner of one of these public keys has signed, file by
                file: each the path of a PEM file, the bytes of one, or a key of `cryptography`.
            **kwargs: As in PEFT.

        Raises:
            AdapterNotFoundError: There is no such folder, and the Hub is not to be reached. What
                the Hub refuses is an error of `huggingface_hub`.
            ManifestError: The manifest cannot be used.
            IntegrityError: A file is not the one that was saved.
            StateMismatchError: The model differs from the saved one in what cannot be restored.
            RestoreError: Some state cannot be set.
            SignatureError: The folder is not as the owner of a trusted key has signed it.
        """
        hub = hub_arguments(kwargs)
        policy = Policy.of(on_mismatch)
        check_tokenizer(tokenizer)

        @calling_peft()
        def peft_load(
            source: str, trainable: bool, config: PeftConfig | None, *, low_cpu_mem_usage: bool
        ) -> peft.PeftModel:
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

        with LOCK, ExitStack() as stack:
            folder = folder_with_manifest(
                model_id, hub, require_manifest=require_manifest, trusted_keys=trusted_keys
            )
            if folder is None:
                origin = _origin.observe(ModelView(model=model))
                plain = peft_load(
                    str(model_id),
                    bool(is_trainable),
                    config,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                )
                return attach_observed(plain, origin, tokenizer)
            for name in hub:
                del kwargs[name]
            stack.enter_context(collecting_seldom())
            source = read_source(folder, adapters)
            plan = plan_of(policy, source, is_trainable=is_trainable)
            trainable = is_trainable_in_peft(source, policy, is_trainable=is_trainable)
            if tokenizer is None:
                check_beside(source.folder, source.manifest, policy)
            return load_model(
                model,
                source,
                names=live_names(source, adapter_name),
                plan=plan,
                injector=Injector(
                    inject=lambda path, saved: peft_load(
                        str(path), trainable, config or saved, low_cpu_mem_usage=False
                    ),
                    load=calling_peft()(
                        lambda live, path, name: peft.PeftModel.load_adapter(live, str(path), name)
                    ),
                    wrap=None
                    if config or key_mapping or ephemeral_gpu_offload or kwargs
                    else lambda saved: wrap(model, saved, adapter_name, is_trainable=trainable),
                ),
                finish=lambda loaded, origin: _finish(
                    attach_observed(loaded, origin, tokenizer), source, is_trainable=is_trainable
                ),
                tokenizer=tokenizer,
            )

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
        trusted_keys: TrustedKeys | None = None,
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
            low_cpu_mem_usage: As in `from_pretrained`.
            key_mapping: As in PEFT.
            on_mismatch: As in `from_pretrained`.
            require_manifest: As in `from_pretrained`.
            trusted_keys: As in `from_pretrained`.
            **kwargs: As in PEFT.

        Returns:
            What PEFT returns: the keys that were missing, and those that were not expected.

        Raises:
            ManifestError: The manifest cannot be used.
            IntegrityError: A file is not the one that was saved.
            StateMismatchError: The base model is not the one that the adapter was saved with.
            SignatureError: The folder is not as the owner of a trusted key has signed it.
        """
        hub = hub_arguments(kwargs)
        policy = Policy.of(on_mismatch)

        @calling_peft()
        def peft_load(
            live: Any, path: str | Path, name: str, *, low_cpu_mem_usage: bool = False
        ) -> Any:
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

        with LOCK, ExitStack() as stack:
            folder = folder_with_manifest(
                model_id, hub, require_manifest=require_manifest, trusted_keys=trusted_keys
            )
            if folder is None:
                return peft_load(
                    self, str(model_id), adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
                )
            for name in hub:
                del kwargs[name]
            stack.enter_context(collecting_seldom())
            source = read_source(folder, ())
            plan = Plan(policy=policy, skipped=NOT_AN_ADAPTERS)
            return load_adapter(
                self,
                source,
                name=adapter_name,
                plan=plan,
                load=peft_load,
                add=None if is_trainable or key_mapping or ephemeral_gpu_offload or kwargs else add,
            )

    def train(self, mode: bool = True) -> Self:
        """Set the train flags; for training, put 4-bit layers back that a CPU has packed.

        Evaluation packs them on some CPUs, and no gradient goes through a packed layer.

        Args:
            mode: As in torch.
        """
        if mode:
            forms.make_trainable(shared_modules_of(self))
        elif not all(config.inference_mode for config in self.peft_config.values()):
            forms.remember_fresh(shared_modules_of(self))
        return super().train(mode)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into the base model as PEFT does, and note whether a load can repeat it.

        Args:
            adapter_names: As in PEFT.
            safe_merge: As in PEFT.
        """
        merge: Any = self.base_model.merge_adapter  # which prompts do not have
        _merges.observe(self, lambda: merge(adapter_names, safe_merge), is_safe=safe_merge)


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


CLASSES: dict[type[peft.PeftModel], type[PeftModel]] = {
    peft.PeftModel: PeftModel,
    peft.PeftModelForCausalLM: PeftModelForCausalLM,
    peft.PeftModelForFeatureExtraction: PeftModelForFeatureExtraction,
    peft.PeftModelForQuestionAnswering: PeftModelForQuestionAnswering,
    peft.PeftModelForSeq2SeqLM: PeftModelForSeq2SeqLM,
    peft.PeftModelForSequenceClassification: PeftModelForSequenceClassification,
    peft.PeftModelForTokenClassification: PeftModelForTokenClassification,
}
"""The class of ours that an object of PEFT's is given."""


def attach(model: peft.PeftModel, *, tokenizer: Any = None) -> PeftModel:
    """Make a model that somebody else wrapped save and load with its whole state.

    Args:
        model: What `peft.get_peft_model` or a trainer made; it is changed in place. One that is
            attached already is left alone. Attach before `torch.compile`, FSDP or DDP wrap it, and
            before it is trained: a change of the base model is seen against what it was now.
        tokenizer: The tokenizer, or the processor, that goes with the model: it is recorded with
            each save. Its files are written by whoever saves it.

    Returns:
        The same object, now of our class of the same name.

    Raises:
        TypeError: It is not a PEFT model, or of a class that this version does not know.
    """
    check_tokenizer(tokenizer)
    if not isinstance(model, PeftModel):
        return attach_observed(model, _origin.observe(ModelView.of(model)), tokenizer)
    if tokenizer is not None:
        keep_tokenizer(model, tokenizer)
    return model


def attach_observed(
    model: peft.PeftModel, origin: _origin.Origin, tokenizer: Any = None
) -> PeftModel:
    """Give a model its class, and what was seen of its base before it was trained."""
    if type(model) not in CLASSES:
        known = ", ".join(cls.__name__ for cls in CLASSES)
        raise TypeError(
            f"cannot attach to a {type(model).__name__}; it must be one of PEFT's {known}"
        )
    attached: Any = model
    attached.__class__ = CLASSES[type(model)]
    _origin.keep(attached, origin)
    keep_tokenizer(attached, tokenizer)
    ours: PeftModel = attached
    return ours


def _finish(loaded: PeftModel, source: Source, *, is_trainable: bool | None) -> PeftModel:
    """What comes last in a load: what else PEFT's promise of inference takes, and a warning."""
    if is_trainable is False:
        _make_inference_only(loaded)
    keep_process(loaded, source.manifest)
    if is_trainable is None and any(module.training for module in loaded.modules()):
        warn(
            "The model is in train mode, as it was saved, so dropout is on where it has any. "
            "For inference call model.eval(), or load it with is_trainable=False.",
            TrainModeWarning,
        )
    return loaded


def _make_inference_only(loaded: PeftModel) -> None:
    """Do for prompts, too, what PEFT does of a load for inference.

    One that layers compute goes on being computed, as when it was saved, so its config does not say
    that it is in the form of PEFT's file.
    """
    loaded.requires_grad_(requires_grad=False)
    for name, config in loaded.peft_config.items():
        if config.is_prompt_learning:
            weights = dict(loaded.prompt_encoder[name].named_parameters())
            config.inference_mode = weights.keys() == {"embedding.weight"}


@contextmanager
def _as_pefts_own(model: PeftModel) -> Iterator[None]:
    """Have a model be of PEFT's own class for a while, so that what PEFT calls on it is PEFT's."""
    ours: Any = type(model)
    theirs: Any = next(theirs for theirs, cls in CLASSES.items() if cls is ours)
    try:
        model.__class__ = theirs
        yield
    finally:
        model.__class__ = ours


def get_peft_model(
    model: torch.nn.Module, peft_config: PeftConfig, *args: Any, **kwargs: Any
) -> Any:
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
    with calling_peft():
        wrapped = peft.get_peft_model(model, peft_config, *args, **kwargs)
    return wrapped if isinstance(wrapped, PeftMixedModel) else attach_observed(wrapped, origin)
