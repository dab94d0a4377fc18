"""A good folder to begin with, what it is loaded onto, and a watch over what a load does."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import peft
import torch
import transformers

import peftstate
from benchmarks._hostile import manifests, places, sidecars, values
from benchmarks._hostile.case import Case

CASES: tuple[Case, ...] = (*manifests.CASES, *places.CASES, *sidecars.CASES, *values.CASES)
"""All hostile folders."""

_WATCHED = ("os.system", "os.exec", "os.posix_spawn", "pty.spawn", "socket.", "subprocess.")
"""Events of Python that no load may cause, but for sockets of its own (`multiprocessing`)."""


def _base() -> Any:
    """A tiny Llama with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _tokenizer() -> Any:
    """A tokenizer of words, with chat templates."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "user", "says", "hello", "world"]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(8), strict=True)), "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106 - no password
        bos_token="<bos>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        chat_template="{% for m in messages %}user says {{ m['content'] }}{% endfor %}",
    )


@attrs.frozen
class Scene:
    """What hostile folders are made of and loaded onto.

    Attributes:
        place: A folder of its own.
        base: The base model, of which loads get copies.
        tokenizer: The tokenizer, of which loads get copies.
    """

    place: Path
    base: Any
    tokenizer: Any

    @classmethod
    def at(cls, place: Path) -> Scene:
        """Make one in an empty folder."""
        base, tokenizer = _base(), _tokenizer()
        base.save_pretrained(place / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
        scene = cls(place, base, tokenizer)
        model = scene.with_adapter()
        with torch.no_grad():
            model.get_base_model().model.norm.weight.mul_(1.5)
        model.save_pretrained(place / "good", tokenizer=tokenizer, prediction_probe=True)
        for path in (place / "good").glob("*token*"):
            path.unlink()  # what lies beside it would be compared as well
        return scene

    def with_adapter(self) -> Any:
        """A copy of the base model with an adapter."""
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        return peftstate.get_peft_model(copy.deepcopy(self.base), config)

    @property
    def good(self) -> Path:
        """The good folder."""
        return self.place / "good"

    def make(self, case: Case, name: str = "bad") -> Path:
        """Make a hostile folder."""
        folder = self.place / name / "adapter"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(self.good, folder)
        case.make(folder)
        return folder

    def load(self, folder: Path, *, by_auto: bool = False) -> Any:
        """Load a folder, onto a copy of the base model or by an auto class."""
        tokenizer = copy.deepcopy(self.tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if by_auto:
                auto = peftstate.AutoPeftModelForCausalLM
                if '"task_type": null' in (folder / "adapter_config.json").read_text():
                    return peftstate.AutoPeftModel.from_pretrained(folder, tokenizer=tokenizer)
                return auto.from_pretrained(folder, tokenizer=tokenizer)
            return peftstate.PeftModel.from_pretrained(
                copy.deepcopy(self.base), folder, tokenizer=tokenizer
            )


class Watch:
    """A watch over what Python does: processes, sockets, imports, and files that are written."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._on = False
        self._allowed: tuple[str, ...] = ()
        sys.addaudithook(self._hear)

    @contextlib.contextmanager
    def over(self, *allowed: Path) -> Iterator[list[str]]:
        """Watch the body, which may write below some folders only.

        Yields:
            What it did that no load may do.
        """
        self.seen = []
        places = (*allowed, Path(tempfile.gettempdir()), Path(os.devnull))
        self._allowed = tuple(str(path) for path in places)
        self._on = True
        try:
            yield self.seen
        finally:
            self._on = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take note of an event."""
        if not self._on:
            return
        if event.startswith(_WATCHED):
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "import" and values.EVIL in str(arguments[0]):
            self.seen.append(f"import {arguments[0]}")
        elif event == "open":
            path, mode, _ = arguments
            writes = isinstance(mode, str) and set(mode) & set("wax+")
            if writes and isinstance(path, str) and not path.startswith(self._allowed):
                self.seen.append(f"open {path} {mode}")
