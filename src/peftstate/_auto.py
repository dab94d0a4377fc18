"""The auto classes, which rebuild the base model from the manifest."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import attrs
import peft
from peft import PeftConfig

from peftstate import _models
from peftstate._arguments import hub_arguments
from peftstate._files import consistently, manifest_of, read_manifest
from peftstate._folder import open_folder
from peftstate._policy import OnMismatch
from peftstate._steps import LOCK
from peftstate._storage import MANIFEST_NAME
from peftstate.manifest import Manifest
from peftstate.sections import quantization
from peftstate.sections._tensors import dtype_named
from peftstate.sections.implementation import ATTENTION, EXPERTS, ImplementationRecord


def base_model_kwargs(source: Manifest | str | os.PathLike[str], **hub: Any) -> dict[str, Any]:
    """What to hand to ``AutoModelFor….from_pretrained`` to rebuild the base model of an adapter.

    Args:
        source: A manifest, the adapter's folder, or the id of a repo on the Hub.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like, of the adapter.

    Returns:
        The quantization config, the dtype, the implementation of attention and experts, and the
        revision, as far as they were recorded.

    Raises:
        ManifestError: There is no manifest, or it cannot be used.
        ValueError: The model was quantized in a way that cannot be rebuilt from a manifest; the
            caller must pass ``quantization_config`` himself.
    """
    manifest = source if isinstance(source, Manifest) else read_manifest(source, **hub)
    quantized = quantization.quantization_kwargs(manifest.sections["quantization"])
    return quantized | _kwargs_but_quantization(manifest)


def _kwargs_but_quantization(manifest: Manifest) -> dict[str, Any]:
    """Dtype, implementation and revision of the base model, as far as they were recorded."""
    kwargs = _implementation_kwargs(manifest.sections["implementation"])
    base = manifest.sections["base_model"]
    if base.load_dtype is not None:
        kwargs["dtype"] = dtype_named(base.load_dtype)
    revision = base.commit or base.revision
    if revision is not None:
        kwargs["revision"] = revision
    return kwargs


def _implementation_kwargs(record: ImplementationRecord) -> dict[str, Any]:
    """The arguments for attention and experts, from the closed tables only."""
    kwargs: dict[str, Any] = {}
    for name, saved, allowed in (
        ("attn_implementation", record.attention, ATTENTION),
        ("experts_implementation", record.experts, EXPERTS),
    ):
        if saved and all(value in allowed for value in saved.values()):
            kwargs[name] = saved[""] if saved.keys() == {""} else dict(saved)
    return kwargs


@attrs.frozen
class _BaseLoader:
    """Stands where PEFT expects the class of the base model, and adds what was recorded."""

    target: Any
    revision: str | None

    def from_pretrained(self, name: str, *, revision: str | None = None, **kwargs: Any) -> Any:
        """Load the base model, at the recorded revision if PEFT knows of none."""
        return self.target.from_pretrained(name, revision=revision or self.revision, **kwargs)


class _PeftLoader:
    """Stands where PEFT expects the class of the PEFT model, and adds our own arguments."""

    def __init__(self, target: type[_models.PeftModel], arguments: dict[str, Any]) -> None:
        self.__name__ = target.__name__
        self._target = target
        self._arguments = arguments

    def from_pretrained(self, model: Any, model_id: str, **kwargs: Any) -> _models.PeftModel:
        """Load the adapter onto the base model, without the arguments that were for the base."""
        kept = {name: value for name, value in kwargs.items() if name not in _FOR_THE_BASE}
        return self._target.from_pretrained(model, model_id, **kept, **self._arguments)


_FOR_THE_BASE = frozenset(
    {"quantization_config", "dtype", "torch_dtype", "attn_implementation", "experts_implementation"}
)
"""Arguments that PEFT hands on to both loads and that mean nothing to the second."""


class _Auto:
    """What our auto classes add to PEFT's."""

    _target_class: Any
    _target_peft_class: Any

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool | None = None,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        *,
        on_mismatch: OnMismatch | None = None,
        require_manifest: bool = False,
        adapters: Collection[str] | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Rebuild the base model as it was, and load the adapter onto it.

        Args:
            pretrained_model_name_or_path: The adapter's folder, or the id of a repo on the Hub.
            adapter_name: As in PEFT.
            is_trainable: As in `PeftModel.from_pretrained`.
            config: As in PEFT.
            revision: The revision of the adapter, as in PEFT.
            import_allowlist: As in PEFT, which has it in newer versions.
            on_mismatch: As in `PeftModel.from_pretrained`.
            require_manifest: As in `PeftModel.from_pretrained`.
            adapters: As in `PeftModel.from_pretrained`.
            tokenizer: As in `PeftModel.from_pretrained`.
            **kwargs: As in PEFT. What is passed for the base model wins over what was recorded,
                and is then compared with it like anything else.

        Raises:
            PeftStateError: As in `PeftModel.from_pretrained`.
        """
        path = os.fspath(pretrained_model_name_or_path)
        with LOCK:
            recorded = _recorded(path, revision, kwargs)
            base_revision = recorded.pop("revision", None)
            if "torch_dtype" in kwargs:  # the old name of the same argument
                recorded.pop("dtype", None)
            own = {
                "on_mismatch": on_mismatch,
                "require_manifest": require_manifest,
                "adapters": adapters,
                "tokenizer": tokenizer,
            }
            if import_allowlist is not None:
                kwargs["import_allowlist"] = import_allowlist
            target = cls._target_class
            loader = type(
                cls.__name__,
                (peft.auto._BaseAutoPeftModel,),
                {
                    "_target_class": target and _BaseLoader(target, base_revision),
                    "_target_peft_class": _PeftLoader(cls._target_peft_class, own),
                },
            )
            return loader.from_pretrained(  # type: ignore[attr-defined]
                path,
                adapter_name=adapter_name,
                is_trainable=is_trainable,
                config=config,
                revision=revision,
                **{**recorded, **kwargs},
            )


def _recorded(path: str, revision: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of the base model; nothing if there is none."""
    folder = open_folder(path, revision=revision, **hub_arguments(kwargs))
    if not folder.exists(MANIFEST_NAME):
        return {}
    manifest = consistently(folder, lambda: manifest_of(folder))
    passed = "quantization_config" in kwargs  # then it need not be one that can be rebuilt
    return _kwargs_but_quantization(manifest) if passed else base_model_kwargs(manifest)


class AutoPeftModel(_Auto, peft.AutoPeftModel):
    """`peft.AutoPeftModel`, which rebuilds the base model from the manifest."""

    _target_peft_class = _models.PeftModel


class AutoPeftModelForCausalLM(_Auto, peft.AutoPeftModelForCausalLM):
    """`peft.AutoPeftModelForCausalLM`, which rebuilds the base model from the manifest."""

    _target_peft_class = _models.PeftModelForCausalLM


class AutoPeftModelForFeatureExtraction(_Auto, peft.AutoPeftModelForFeatureExtraction):
    """`peft.AutoPeftModelForFeatureExtraction`, which rebuilds the base from the manifest."""

    _target_peft_class = _models.PeftModelForFeatureExtraction


class AutoPeftModelForQuestionAnswering(_Auto, peft.AutoPeftModelForQuestionAnswering):
    """`peft.AutoPeftModelForQuestionAnswering`, which rebuilds the base from the manifest."""

    _target_peft_class = _models.PeftModelForQuestionAnswering


class AutoPeftModelForSeq2SeqLM(_Auto, peft.AutoPeftModelForSeq2SeqLM):
    """`peft.AutoPeftModelForSeq2SeqLM`, which rebuilds the base model from the manifest."""

    _target_peft_class = _models.PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_Auto, peft.AutoPeftModelForSequenceClassification):
    """`peft.AutoPeftModelForSequenceClassification`, which rebuilds the base from the manifest."""

    _target_peft_class = _models.PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_Auto, peft.AutoPeftModelForTokenClassification):
    """`peft.AutoPeftModelForTokenClassification`, which rebuilds the base from the manifest."""

    _target_peft_class = _models.PeftModelForTokenClassification
