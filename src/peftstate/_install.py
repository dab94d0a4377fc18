"""`install`: PEFT's own classes save and load with the whole state, for code nobody edits.

PEFT's methods are wrapped in place, since scripts, trainers and servers hold PEFT's classes from
imports of their own (`from peft import PeftModel`). The wrappers compose: what somebody else put
over a method before is called below ours, and what is put over ours later calls ours.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import peft
from transformers import Trainer
from transformers.integrations.peft import PeftAdapterMixin

from peftstate import _auto, _models
from peftstate._arguments import hub_arguments
from peftstate._calls import is_calling_peft
from peftstate._folder import AdapterFolder
from peftstate._hub import may_have
from peftstate._keys import trusted_by_id
from peftstate._policy import OnMismatch, Policy
from peftstate._storage import MANIFEST_NAME
from peftstate._warn import warn
from peftstate.errors import SignatureError, UnverifiedWarning
from peftstate.integrations.trainer import (
    with_best_model,
    with_rank,
    with_resume,
    with_state,
    with_tokenizer,
)
from peftstate.sections import _origin
from peftstate.sections._view import ModelView

if TYPE_CHECKING:
    from peftstate._keys import PublicKey, TrustedKeys

Method = Callable[..., Any]


@attrs.frozen(kw_only=True)
class _Options:
    """What `install` was called with, for loads by code that never heard of peftstate."""

    on_mismatch: OnMismatch | None = None
    require_manifest: bool = False
    trusted_keys: tuple[PublicKey, ...] | None = None


_options: _Options | None = None
"""The options of the installation; `None` while nothing is installed."""


def install(
    *,
    on_mismatch: OnMismatch | None = None,
    require_manifest: bool = False,
    trusted_keys: TrustedKeys | None = None,
) -> None:
    """Have PEFT's own classes save and load with the whole state, in this process.

    Models that PEFT makes from now on are attached; `save_pretrained` writes manifests;
    `from_pretrained` and `load_adapter` verify and restore, and the auto classes rebuild the base
    model. PEFT's default holds for `is_trainable`: a load is for inference unless its caller says
    otherwise. Call it at the top of a script, since a method that was bound before
    (``save = model.save_pretrained``) is not reached. To install again changes the options.

    Args:
        on_mismatch: As in `PeftModel.from_pretrained`, for loads that do not say.
        require_manifest: As in `PeftModel.from_pretrained`, for loads that do not say.
        trusted_keys: As in `PeftModel.from_pretrained`, for loads that do not say. An adapter that
            transformers would load by itself, which looks at no signature, is refused.

    Raises:
        ValueError: `on_mismatch` names an action or a section that there is not, or a key cannot be
            used.
        TypeError: `trusted_keys` is one key, not several.
        OSError: A key cannot be read.
        ImportError: There are keys, and the package `cryptography` is missing.
    """
    global _options  # noqa: PLW0603 - an installation is the process's
    Policy.of(on_mismatch)
    keys = None if trusted_keys is None else tuple(trusted_by_id(trusted_keys).values())
    _options = _Options(
        on_mismatch=on_mismatch, require_manifest=require_manifest, trusted_keys=keys
    )
    for patch in _PATCHES:
        patch.put_on()


def uninstall() -> None:
    """Undo `install`. A wrapper that somebody else has wrapped since stays, and only passes on."""
    global _options  # noqa: PLW0603 - an installation is the process's
    _options = None
    for patch in _PATCHES:
        patch.take_off()


@contextmanager
def installed(
    *,
    on_mismatch: OnMismatch | None = None,
    require_manifest: bool = False,
    trusted_keys: TrustedKeys | None = None,
) -> Iterator[None]:
    """`install` for the time of a ``with`` statement; afterwards all is as it was before.

    Args:
        on_mismatch: As in `install`.
        require_manifest: As in `install`.
        trusted_keys: As in `install`.

    Raises:
        ValueError: As in `install`.
        TypeError: As in `install`.
        OSError: As in `install`.
        ImportError: As in `install`.
    """
    before = _options
    install(on_mismatch=on_mismatch, require_manifest=require_manifest, trusted_keys=trusted_keys)
    try:
        yield
    finally:
        if before is None:
            uninstall()
        else:
            install(**attrs.asdict(before, recurse=False))


def _load_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a load: those that its caller gave go before the installation's."""
    options = _options or _Options()
    return {**attrs.asdict(options, recurse=False), **given}


def _is_ours(model: peft.PeftModel) -> bool:
    """Attach to a model that PEFT made before `install`; whether it can be attached to."""
    if isinstance(model, _models.PeftModel):
        return True
    if type(model) not in _models.CLASSES:
        warn(
            f"peftstate knows no {type(model).__name__}, so it is saved and loaded as by PEFT.",
            UnverifiedWarning,
        )
        return False
    _models.attach(model)
    return True


def _init(original: Method) -> Method:
    """`PeftModel.__init__`: looks at the base model before PEFT wraps it, and attaches."""

    @functools.wraps(original)
    def __init__(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if _passes_on() or type(self) not in _models.CLASSES:
            original(self, model, *args, **kwargs)
            return
        origin = _origin.observe(ModelView(model=model))
        original(self, model, *args, **kwargs)
        _models.attach_observed(self, origin)

    return __init__


def _save_pretrained(original: Method) -> Method:
    """`PeftModel.save_pretrained`."""

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        if _passes_on() or not _is_ours(self):
            original(self, *args, **kwargs)
            return
        _models.PeftModel.save_pretrained(self, *args, **kwargs)

    return save_pretrained


def _load_adapter(original: Method) -> Method:
    """`PeftModel.load_adapter`."""

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _passes_on() or not _is_ours(self):
            return original(self, *args, **kwargs)
        return _models.PeftModel.load_adapter(self, *args, **kwargs)

    return load_adapter


def _load_adapter_of_ours(original: Method) -> Method:
    """`load_adapter` of our class, which models have whose users never heard of it."""

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **_load_arguments(kwargs))

    return load_adapter


def _from_pretrained(original: Any) -> Any:
    """`PeftModel.from_pretrained`."""
    theirs = original.__func__

    @functools.wraps(theirs)
    def from_pretrained(
        cls: type[peft.PeftModel],
        model: Any,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,  # noqa: FBT001, FBT002 - as in PEFT
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given = (model, model_id, adapter_name, is_trainable, *args)
        if _passes_on():
            return theirs(cls, *given, **kwargs)
        return _models.PeftModel.from_pretrained(*given, **_load_arguments(kwargs))

    return classmethod(from_pretrained)


def _auto_from_pretrained(original: Any) -> Any:
    """`from_pretrained` of the auto classes."""
    theirs = original.__func__

    @functools.wraps(theirs)
    def from_pretrained(
        cls: type[Any],
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,  # noqa: FBT001, FBT002 - as in PEFT
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given = (pretrained_model_name_or_path, adapter_name, is_trainable, *args)
        if _passes_on() or cls not in _auto.CLASSES:
            return theirs(cls, *given, **kwargs)
        return _auto.CLASSES[cls].from_pretrained(*given, **_load_arguments(kwargs))

    return classmethod(from_pretrained)


def _load_into_transformers(original: Method) -> Method:
    """`load_adapter` of transformers' own models, through which ``pipeline(folder)`` goes.

    It makes no PEFT model, so there is nothing that could be verified or restored.
    """

    @functools.wraps(original)
    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind_partial(self, peft_model_id, *args, **kwargs)
        hub = _hub_arguments(given.arguments)  # before transformers takes some of them out
        if peft_model_id is not None and not _passes_on() and _load_arguments({})["trusted_keys"]:
            raise SignatureError(
                str(peft_model_id),
                "transformers would load this adapter by itself, and look at no signature. Load it "
                "with AutoPeftModelFor….from_pretrained.",
            )
        result = original(self, peft_model_id, *args, **kwargs)
        if peft_model_id is None or _passes_on():
            return result
        if _may_have_manifest(peft_model_id, **hub):
            warn(
                f"{peft_model_id}: transformers loaded this adapter by itself, so nothing of its "
                "state was verified or restored. Load it with AutoPeftModelFor….from_pretrained "
                "for that.",
                UnverifiedWarning,
            )
        return result

    return load_adapter


def _hub_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """How transformers was told to find an adapter on the Hub."""
    adapter_kwargs = given.get("adapter_kwargs") or {}
    found = hub_arguments({**given, **given.get("kwargs", {}), **adapter_kwargs})
    return {name: found[name] for name in _OF_A_FILE if name in found}


_OF_A_FILE = ("subfolder", "revision", "token", "local_files_only")


def _may_have_manifest(
    path: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any
) -> bool:
    """Whether there is a manifest, or none can be seen: the load itself must not fail for this."""
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where it may not look
        return AdapterFolder.at(Path(path, subfolder or "")).exists(MANIFEST_NAME)
    return may_have(os.fspath(path), MANIFEST_NAME, subfolder=subfolder, **hub)


def _passes_on() -> bool:
    """Whether a wrapper only calls what it wraps."""
    return _options is None or is_calling_peft()


@attrs.define
class _Patch:
    """A wrapper of ours over a method of somebody else's class.

    Attributes:
        owner: The class.
        name: The method's name.
        wrap: Makes the wrapper, of what the class has under that name.
        wrapped: What was there when the wrapper was put on.
        wrapper: The wrapper, once it was made.
    """

    owner: type[Any]
    name: str
    wrap: Callable[[Any], Any]
    wrapped: Any = None
    wrapper: Any = None

    def put_on(self) -> None:
        """Wrap the method, unless the wrapper is on it, be it below those of others."""
        present = vars(self.owner)[self.name]
        if self.wrapper is None or not self._is_in(present):
            self.wrapped, self.wrapper = present, self.wrap(present)
            setattr(self.owner, self.name, self.wrapper)

    def take_off(self) -> None:
        """Put back what was wrapped, unless somebody has wrapped the wrapper."""
        if self.wrapper is not None and vars(self.owner)[self.name] is self.wrapper:
            setattr(self.owner, self.name, self.wrapped)
            self.wrapped = self.wrapper = None

    def _is_in(self, method: Any) -> bool:
        """Whether a method is the wrapper, or wraps it as `functools.wraps` notes."""
        ours = getattr(self.wrapper, "__func__", self.wrapper)
        inner = getattr(method, "__func__", method)
        while inner is not None and inner is not ours:
            inner = getattr(inner, "__wrapped__", None)
        return inner is ours


_PATCHES = (
    _Patch(peft.PeftModel, "__init__", _init),
    _Patch(peft.PeftModel, "save_pretrained", _save_pretrained),
    _Patch(peft.PeftModel, "from_pretrained", _from_pretrained),
    _Patch(peft.PeftModel, "load_adapter", _load_adapter),
    _Patch(_models.PeftModel, "load_adapter", _load_adapter_of_ours),
    _Patch(peft.auto._BaseAutoPeftModel, "from_pretrained", _auto_from_pretrained),
    _Patch(PeftAdapterMixin, "load_adapter", _load_into_transformers),
    _Patch(Trainer, "__init__", with_tokenizer),
    _Patch(Trainer, "_push_from_checkpoint", with_state),
    _Patch(Trainer, "save_model", with_rank),
    _Patch(Trainer, "_load_from_checkpoint", with_resume),
    _Patch(Trainer, "_load_best_model", with_best_model),
)
"""All that `install` wraps."""
