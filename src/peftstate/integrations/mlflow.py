"""MLflow: what `mlflow.transformers` logs of a PEFT model comes back on the base model it was on.

MLflow writes down the task, the dtype and where the base model is, and no quantization: a QLoRA
pipeline comes back on a base model in full precision, without a word. The adapter's folder in the
artifact has the manifest, so the base model is loaded by that, and the adapter is verified.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
from mlflow.transformers import model_io

from peftstate._files import read_manifest
from peftstate._folder import AdapterFolder
from peftstate._models import PeftModel, attach
from peftstate._policy import OnMismatch, Policy
from peftstate._rebuilding import base_model_kwargs
from peftstate._storage import MANIFEST_NAME

_FLAVOR: Any = importlib.import_module("mlflow.transformers")
"""The module itself: `mlflow.transformers` may be a stand-in that loads it later."""
_ADAPTER = "peft_adaptor"
"""The key of MLflow's flavor that names the folder of the adapter in the artifact."""
_CPU = -1
"""What transformers' pipelines call the CPU."""
_MARK = "__peftstate__"
_recorded: ContextVar[Mapping[str, Any]] = ContextVar(
    "peftstate_mlflow", default=MappingProxyType({})
)
"""How the base model of the artifact that is being loaded in this thread is to be loaded."""


def register(*, on_mismatch: OnMismatch | None = None) -> None:
    """Have `mlflow.transformers` keep the whole state of PEFT models, in this process.

    `log_model` and `save_model` write a manifest with the adapter; `load_model`, and
    `mlflow.pyfunc.load_model`, load the base model as the manifest says, and verify and restore the
    adapter for inference. An artifact without a manifest is loaded as by MLflow, with a warning.

    Args:
        on_mismatch: As in `PeftModel.from_pretrained`. To register again changes nothing.

    Raises:
        ValueError: `on_mismatch` names an action or a section that there is not.
    """
    Policy.of(on_mismatch)
    if hasattr(_FLAVOR.save_model, _MARK):
        return
    _FLAVOR.save_model = _attached(_FLAVOR.save_model)
    _FLAVOR._load_model = _with_manifest(_FLAVOR._load_model)
    _FLAVOR.get_model_with_peft_adapter = functools.partial(_verified, on_mismatch)
    model_io._load_model = _as_recorded(model_io._load_model)


def _attached(original: Callable[..., None]) -> Callable[..., None]:
    """`save_model`, which `log_model` calls, too: attach to the model, so that it saves all."""

    @functools.wraps(original)
    def save_model(transformers_model: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(transformers_model, Mapping):
            model = transformers_model.get("model")
        else:
            model = getattr(transformers_model, "model", None)  # of a pipeline
        if isinstance(model, peft.PeftModel):
            attach(model)
        original(transformers_model, *args, **kwargs)

    setattr(save_model, _MARK, True)
    return save_model


def _with_manifest(original: Callable[..., Any]) -> Callable[..., Any]:
    """The load of an artifact: read how its base model is to be loaded."""

    @functools.wraps(original)
    def _load_model(path: str, flavor_config: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        with _manifest_of(path, flavor_config.get(_ADAPTER)):
            return original(path, flavor_config, *args, **kwargs)

    return _load_model


@contextmanager
def _manifest_of(artifact: str, adapter: str | None) -> Iterator[None]:
    """Have base models be loaded as the manifest of an artifact says, if there is one."""
    recorded: dict[str, Any] = {}
    if adapter is not None:
        folder = Path(artifact, adapter)
        if AdapterFolder.at(folder).exists(MANIFEST_NAME):
            recorded = base_model_kwargs(read_manifest(folder))
    token = _recorded.set(recorded)
    try:
        yield
    finally:
        _recorded.reset(token)


def _as_recorded(original: Callable[..., Any]) -> Callable[..., Any]:
    """The load of a base model, which tries the arguments for accelerate first.

    If `from_pretrained` does not take them, as it takes no device, it tries fewer.
    """

    @functools.wraps(original)
    def _load_model(
        model_name_or_path: Any,
        flavor_conf: Mapping[str, Any],
        accelerate_conf: Mapping[str, Any],
        device: Any,
        revision: str | None = None,
    ) -> Any:
        recorded = dict(_recorded.get())
        revision = recorded.pop("revision", revision)
        conf = {**accelerate_conf, **recorded}
        if recorded and "device" in conf:
            place = conf.pop("device")
            conf["device_map"] = {"": "cpu" if place == _CPU else place}
        return original(model_name_or_path, flavor_conf, conf, device, revision)

    return _load_model


def _verified(on_mismatch: OnMismatch | None, base_model: Any, peft_adapter_path: str) -> PeftModel:
    """Load an adapter onto its base model, in place of `get_model_with_peft_adapter`."""
    return PeftModel.from_pretrained(
        base_model, peft_adapter_path, is_trainable=False, on_mismatch=on_mismatch
    )
