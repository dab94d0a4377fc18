"""The manifest of an adapter as the command line of vLLM."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from peftstate._files import consistently, manifest_of
from peftstate._signature import open_for_load
from peftstate._vllm import RANKS, needed

if TYPE_CHECKING:
    from peftstate._keys import TrustedKeys


@attrs.frozen(kw_only=True)
class EngineArguments:
    """The command line of an engine that serves an adapter.

    Attributes:
        model: The base model.
        options: The options by their names, those without a value with ``""``.
        notes: What is to be known beside them, in sentences.
    """

    model: str
    options: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """What follows ``vllm serve``."""
        pairs = (pair for option in self.options.items() for pair in option)
        return [self.model, *filter(None, pairs)]

    @property
    def command(self) -> str:
        """The command for a shell."""
        return shlex.join(["vllm", "serve", *self.arguments])


def engine_arguments(
    source: str | os.PathLike[str],
    *,
    base: str | None = None,
    name: str | None = None,
    has_bitsandbytes: bool = False,
    trusted_keys: TrustedKeys | None = None,
) -> EngineArguments:
    """Turn the manifest of an adapter into the arguments of vLLM.

    Args:
        source: The adapter's folder, or the id of a repo on the Hub.
        base: The base model, where it is not to be had by the recorded name.
        name: What requests will call the adapter; by default the last part of `source`.
        has_bitsandbytes: Whether vLLM has its plugin for bitsandbytes.
        trusted_keys: As in `PeftModel.from_pretrained`: a key of these must have signed it.

    Raises:
        NotServableError: vLLM cannot serve it.
        ManifestError: There is no manifest, or it cannot be used.
        IntegrityError: The manifest was changed after it was written.
        SignatureError: It was not signed with a key that is trusted.
    """
    folder = open_for_load(source, trusted_keys=trusted_keys)
    manifest = consistently(folder, manifest_of)
    engine = needed(manifest, str(source), has_bitsandbytes=has_bitsandbytes)
    path = str(source) if folder.repo is not None else str(folder.path)
    name = name or Path(path).name
    options = {
        "--dtype": engine.dtype,
        "--enable-lora": "",
        "--max-lora-rank": str(next(rank for rank in RANKS if rank >= engine.rank)),
        "--lora-dtype": engine.lora_dtype or "auto",
        "--lora-modules": _lora_module(name, path),
    }
    record = manifest.sections["base_model"]
    notes = list(engine.notes)
    revision = record.commit or record.revision
    if base is None and revision:
        options["--revision"] = revision
    if base is None and (record.name is None or "/" not in record.name):
        notes.append(
            "the manifest has no more than the base model's name; say with --base where it is"
        )
    if (
        engine.quantization == "bitsandbytes"
        and not manifest.sections["quantization"].pre_quantized
    ):
        options["--quantization"] = "bitsandbytes"
    if folder.exists("tokenizer_config.json"):
        options["--tokenizer"] = path
    elif "tokenizer" in manifest.sections:
        notes.append("the tokenizer is not beside the adapter; vLLM takes the base model's")
    return EngineArguments(
        model=base or record.name or "BASE_MODEL", options=options, notes=tuple(notes)
    )


def _lora_module(name: str, path: str) -> str:
    """An adapter as ``--lora-modules`` takes it, in JSON where the short form is ambiguous.

    See `vllm/entrypoints/launchers/cli_args.py::LoRAParserAction`.
    """
    if "=" in name or "," in name + path:
        return json.dumps({"name": name, "path": path})
    return f"{name}={path}"
