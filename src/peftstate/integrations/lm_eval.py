"""lm-evaluation-harness: the model ``peftstate`` is an adapter on its right base model.

    peftstate run -m lm_eval --model peftstate --model_args peft=ADAPTER --tasks …

lm-eval's own ``hf`` loads the base model by what its config says. Of an adapter that was trained on
a base model quantized while it was loaded, that is another model. Where tokenizer and model differ
in size it cuts the embeddings, too, so that every logit changes. Here the manifest says how the
base model is loaded, nothing is cut, and what the load cannot restore is an error.

Importing this module registers the model; lm-eval has no entry point for that, so `peftstate run`
imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from peft import PeftConfig

from peftstate._files import read_manifest
from peftstate._models import PeftModel
from peftstate._policy import OnMismatch
from peftstate._rebuilding import base_model_kwargs
from peftstate._tokenizer_files import CONFIG_NAME as TOKENIZER_CONFIG

NAME = "peftstate"
"""What ``--model`` calls it."""


@register_model(NAME)
class PeftStateLM(HFLM):
    """A saved adapter, verified, for inference: the random generators stand as lm-eval seeded them.

    What is not said here is as in `HFLM`, and wins over the manifest where it is passed.

    Args:
        peft: The adapter's folder, or the id of a repo on the Hub.
        pretrained: The base model, if it is not where the adapter's config says.
        peft_revision: Branch, tag or commit of the adapter's repo. `revision` is the base model's.
        tokenizer: The tokenizer, its folder, or its id; by default the one in the adapter's folder,
            or else the base model's. It is compared with what was recorded.
        on_mismatch: As in `PeftModel.from_pretrained`.
        **kwargs: As in `HFLM`.

    Raises:
        PeftStateError: As in `PeftModel.from_pretrained`; there must be a manifest.
    """

    _model: Any

    def __init__(
        self,
        peft: str,
        pretrained: str | None = None,
        *,
        peft_revision: str | None = None,
        tokenizer: Any = None,
        on_mismatch: OnMismatch | None = None,
        **kwargs: Any,
    ) -> None:
        self._peft_revision = peft_revision
        self._on_mismatch = on_mismatch
        self._manifest = read_manifest(peft, revision=peft_revision)
        if pretrained is None:
            config = PeftConfig.from_pretrained(peft, revision=peft_revision)
            pretrained = config.base_model_name_or_path
        recorded = base_model_kwargs(self._manifest)
        # `HFLM` passes one of its own, that of the base model's config.
        self._quantization_config = recorded.pop("quantization_config", None)
        if tokenizer is None and Path(peft, TOKENIZER_CONFIG).is_file():
            tokenizer = peft
        super().__init__(pretrained, peft=peft, tokenizer=tokenizer, **{**recorded, **kwargs})

    def _create_model(
        self, pretrained: str, *, peft: str, quantization_config: Any = None, **kwargs: Any
    ) -> None:
        """Load the base model as it was, then the adapter."""
        if self._quantization_config is not None:
            quantization_config = self._quantization_config
        super()._create_model(pretrained, quantization_config=quantization_config, **kwargs)
        self._model = PeftModel.from_pretrained(
            self._model,
            peft,
            is_trainable=False,
            require_manifest=True,
            tokenizer=self.tokenizer,
            on_mismatch=self._on_mismatch,
            revision=self._peft_revision,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the results file says of the model: which adapter it was, and on which base."""
        base = self._manifest.sections["base_model"]
        quantization = self._manifest.sections["quantization"]
        return {
            **super().get_model_info(),
            "peftstate": {
                "manifest_digest": self._manifest.digest,
                "base_model": base.name,
                "base_model_commit": base.commit,
                "quantization_config": quantization.config,
            },
        }
