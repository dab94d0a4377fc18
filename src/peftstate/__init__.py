"""Save and reload PEFT adapters bit for bit, in the state they were saved in.

Importing peftstate imports neither torch nor peft; a name that needs them does so when it is
first used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOMES = {
    "AutoPeftModel": "_auto",
    "AutoPeftModelForCausalLM": "_auto",
    "AutoPeftModelForFeatureExtraction": "_auto",
    "AutoPeftModelForQuestionAnswering": "_auto",
    "AutoPeftModelForSeq2SeqLM": "_auto",
    "AutoPeftModelForSequenceClassification": "_auto",
    "AutoPeftModelForTokenClassification": "_auto",
    "Cause": "_diagnosis",
    "Diagnosis": "_diagnosis",
    "Effect": "_diagnosis",
    "Manifest": "manifest",
    "Mismatch": "_diff",
    "PeftMixedModel": "_models",
    "PeftModel": "_models",
    "PeftModelForCausalLM": "_models",
    "PeftModelForFeatureExtraction": "_models",
    "PeftModelForQuestionAnswering": "_models",
    "PeftModelForSeq2SeqLM": "_models",
    "PeftModelForSequenceClassification": "_models",
    "PeftModelForTokenClassification": "_models",
    "PeftStateCallback": "integrations.trainer",
    "Report": "_report",
    "adopt": "_adopting",
    "attach": "_models",
    "base_model_kwargs": "_rebuilding",
    "capture": "_api",
    "diagnose": "_diagnosing.run",
    "diff": "_files",
    "errors": "errors",
    "get_peft_model": "_models",
    "install": "_install",
    "installed": "_install",
    "probe": "_served",
    "read_manifest": "_files",
    "reproducible": "_reproducible",
    "request_rng": "_request_rng",
    "restore": "_api",
    "sign": "_signing",
    "signing_key": "_keys",
    "uninstall": "_install",
    "verify": "_api",
    "verify_files": "_verifying",
    "verify_signature": "_signing",
}
"""The module that each public name is in."""

__all__ = sorted(_HOMES)  # noqa: PLE0605 - static for type checkers below

if TYPE_CHECKING:
    from peftstate import errors as errors
    from peftstate._adopting import adopt as adopt
    from peftstate._api import capture as capture
    from peftstate._api import restore as restore
    from peftstate._api import verify as verify
    from peftstate._auto import AutoPeftModel as AutoPeftModel
    from peftstate._auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from peftstate._auto import (
        AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
    )
    from peftstate._auto import (
        AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
    )
    from peftstate._auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from peftstate._auto import (
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
    )
    from peftstate._auto import (
        AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
    )
    from peftstate._diagnosing.run import diagnose as diagnose
    from peftstate._diagnosis import Cause as Cause
    from peftstate._diagnosis import Diagnosis as Diagnosis
    from peftstate._diagnosis import Effect as Effect
    from peftstate._diff import Mismatch as Mismatch
    from peftstate._files import diff as diff
    from peftstate._files import read_manifest as read_manifest
    from peftstate._install import install as install
    from peftstate._install import installed as installed
    from peftstate._install import uninstall as uninstall
    from peftstate._keys import signing_key as signing_key
    from peftstate._models import PeftMixedModel as PeftMixedModel
    from peftstate._models import PeftModel as PeftModel
    from peftstate._models import PeftModelForCausalLM as PeftModelForCausalLM
    from peftstate._models import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from peftstate._models import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from peftstate._models import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from peftstate._models import (
        PeftModelForSequenceClassification as PeftModelForSequenceClassification,
    )
    from peftstate._models import PeftModelForTokenClassification as PeftModelForTokenClassification
    from peftstate._models import attach as attach
    from peftstate._models import get_peft_model as get_peft_model
    from peftstate._rebuilding import base_model_kwargs as base_model_kwargs
    from peftstate._report import Report as Report
    from peftstate._reproducible import reproducible as reproducible
    from peftstate._request_rng import request_rng as request_rng
    from peftstate._served import probe as probe
    from peftstate._signing import sign as sign
    from peftstate._signing import verify_signature as verify_signature
    from peftstate._verifying import verify_files as verify_files
    from peftstate.integrations.trainer import PeftStateCallback as PeftStateCallback
    from peftstate.manifest import Manifest as Manifest


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = module if name == "errors" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
