"""The auto classes, which rebuild the base model from the manifest."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
from peft import PeftConfig

from peftstate import _models
from peftstate._calls import calling_peft
from peftstate._injection import temporary_folder
from peftstate._keys import trusted_by_id
from peftstate._policy import OnMismatch
from peftstate._rebuilding import recorded_base
from peftstate._steps import LOCK
from peftstate._storage import ADAPTER_CONFIG_NAME
from peftstate.sections._model_config import BUILT_CONFIG

if TYPE_CHECKING:
    from peftstate._keys import TrustedKeys


class _PeftLoader:
    """Stands where PEFT expects the class of the PEFT model, and adds our own arguments."""

    def __init__(
        self, target: type[_models.PeftModel], path: str, arguments: dict[str, Any]
    ) -> None:
        self.__name__ = target.__name__
        self._target = target
        self._path = path
        self._arguments = arguments

    def from_pretrained(self, model: Any, _: str, **kwargs: Any) -> _models.PeftModel:
        """Load the adapter onto the base model, without the arguments that were for the base."""
        kept = {name: value for name, value in kwargs.items() if name not in _FOR_THE_BASE}
        return self._target.from_pretrained(model, self._path, **{**kept, **self._arguments})


_FOR_THE_BASE = (
    frozenset(
        {
            "quantization_config",
            "dtype",
            "torch_dtype",
            "attn_implementation",
            "experts_implementation",
        }
    )
    | BUILT_CONFIG
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
        trusted_keys: TrustedKeys | None = None,
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
            trusted_keys: As in `PeftModel.from_pretrained`.
            **kwargs: As in PEFT. What is passed for the base model wins over what was recorded,
                and is then compared with it like anything else.

        Raises:
            PeftStateError: As in `PeftModel.from_pretrained`.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if trusted_keys is not None:  # which may be an iterator, and are used twice
            trusted_keys = list(trusted_by_id(trusted_keys).values())
        own = {
            "on_mismatch": on_mismatch,
            "require_manifest": require_manifest,
            "adapters": adapters,
            "tokenizer": tokenizer,
            "revision": revision,
            "trusted_keys": trusted_keys,
        }
        if import_allowlist is not None:
            kwargs["import_allowlist"] = import_allowlist
        with LOCK, ExitStack() as stack:
            recorded = recorded_base(path, revision, kwargs, trusted_keys)
            seen = path
            if recorded is not None:
                own |= {name: kwargs.pop(name) for name in ("subfolder",) if name in kwargs}
                own["revision"] = recorded.commit or revision  # a branch may move meanwhile
                seen = str(stack.enter_context(_with_config_only(recorded.config)))
                kwargs = {**recorded.kwargs, **kwargs}
            loader = _loader(cls, path, own)
            stack.enter_context(calling_peft())
            return loader.from_pretrained(
                seen,
                adapter_name=adapter_name,
                is_trainable=is_trainable,
                config=config,
                revision=revision,
                **kwargs,
            )


def _loader(cls: type[_Auto], path: str, own: dict[str, Any]) -> Any:
    """PEFT's auto class, which loads with ours."""
    return type(
        cls.__name__,
        (peft.auto._BaseAutoPeftModel,),
        {
            "_target_class": cls._target_class,
            "_target_peft_class": _PeftLoader(cls._target_peft_class, path, own),
        },
    )


@contextmanager
def _with_config_only(config: bytes) -> Iterator[Path]:
    """A folder in which PEFT finds an adapter's config, and no tokenizer.

    It would load one and, where it has more tokens than the base model has embeddings, add random
    ones (`peft/auto.py`). The sizes that were saved are in the manifest.
    """
    with temporary_folder() as folder:
        (folder / ADAPTER_CONFIG_NAME).write_bytes(config)
        yield folder


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


CLASSES: dict[type[Any], type[_Auto]] = {
    peft.AutoPeftModel: AutoPeftModel,
    peft.AutoPeftModelForCausalLM: AutoPeftModelForCausalLM,
    peft.AutoPeftModelForFeatureExtraction: AutoPeftModelForFeatureExtraction,
    peft.AutoPeftModelForQuestionAnswering: AutoPeftModelForQuestionAnswering,
    peft.AutoPeftModelForSeq2SeqLM: AutoPeftModelForSeq2SeqLM,
    peft.AutoPeftModelForSequenceClassification: AutoPeftModelForSequenceClassification,
    peft.AutoPeftModelForTokenClassification: AutoPeftModelForTokenClassification,
}
"""The class of ours for each of PEFT's."""
