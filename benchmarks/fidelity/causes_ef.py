"""E: the tokenizer and the inputs; F: the environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.fidelity import _elsewhere
from benchmarks.fidelity._libraries import PEFTSTATE, Library, Load
from benchmarks.fidelity._models import V4, Make, Place, base, logits, trained_lora
from benchmarks.fidelity._outcome import exact_but, refused, told
from benchmarks.fidelity._remote import remote_model
from benchmarks.fidelity._situation import Situation
from benchmarks.fidelity._tokenizers import TEXT, make_tokenizer
from peftstate.errors import AdapterLoadError, BaseModelMismatchError, TokenizerMismatchError

PADDED = torch.tensor([[5, 6, 7], [8, 9, 0]])
BATCH = {"input_ids": PADDED, "attention_mask": (PADDED != 0).long()}
TEMPLATE = "{% for message in messages %}<bos>{{ message['content'] }}<eos>{% endfor %}"


ON_DISK = r"environment\.devices\[meta\]"
"""What a warning says if a part of the model is on the disk."""
HEAD_IS_MISSING = r"not compared: lm_head\.weight$"
NOT_LOADED = refused(AdapterLoadError, "lm_head")
"""With the oldest versions, where PEFT itself cannot load onto a head that is on the disk."""
lora_model = trained_lora()


class WithTokenizer:
    """A model and its tokenizer, which users load beside each other.

    Attributes:
        model: The model.
        tokenizer: The tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer


def with_tokenizer(**fields: Any) -> Callable[[Place], WithTokenizer]:
    """A model that was trained with a tokenizer."""
    return lambda place: WithTokenizer(lora_model(place), make_tokenizer(**fields))


def save_both(library: Library, both: WithTokenizer, folder: Path) -> None:
    """Save a model with its tokenizer, which PEFT leaves to the user."""
    options = {"tokenizer": both.tokenizer} if library is PEFTSTATE else {}
    library.save(both.model, folder, **options)


def load_beside(**fields: Any) -> Load:
    """A load beside which the tokenizer comes from the base model's repository, as it is now."""

    def load_both(library: Library, base: Callable[[], Any], folder: Path) -> WithTokenizer:
        tokenizer = make_tokenizer(**fields)
        options = {"tokenizer": tokenizer} if library is PEFTSTATE else {}
        return WithTokenizer(library.load(base(), folder, **options), tokenizer)

    return load_both


def tokenizer_state(both: WithTokenizer) -> dict[str, Any]:
    """What a tokenizer makes of texts."""
    tokenizer = both.tokenizer
    return {
        "padding side": tokenizer.padding_side,
        "chat template": tokenizer.chat_template,
        "tokens": tuple(map(str, tokenizer.tokenize(TEXT))),
    }


def model_of(both: WithTokenizer) -> dict[str, torch.Tensor]:
    """What the model itself computes."""
    return logits(both.model)


def _tokenizer(title: str, **fields: Any) -> Situation:
    """A situation with a tokenizer."""
    return Situation(
        cause="E1", title=title, save=save_both, state=tokenizer_state, answers=model_of, **fields
    )


def save_with_probe(library: Library, model: Any, folder: Path) -> None:
    """Save a model with inputs to predict on after the load."""
    options = {"prediction_probe": BATCH} if library is PEFTSTATE else {}
    library.save(model, folder, **options)


@contextmanager
def deterministic() -> Iterator[None]:
    """Have torch choose deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def determinism(_: Any) -> dict[str, bool]:
    """Whether torch chooses deterministic algorithms."""
    return {"deterministic": torch.are_deterministic_algorithms_enabled()}


def offloaded(checkpoint: str = "llama") -> Make:
    """A base model whose head is on the disk."""
    return lambda place: place.load(
        checkpoint=checkpoint,
        device_map={"model": "cpu", "lm_head": "disk"},
        offload_folder=place.root / "offload",
    )


def load_offloaded(library: Library, base: Callable[[], Any], folder: Path) -> Any:
    """Load the adapter, saying where each part goes, as PEFT asks for."""
    return library.load(
        base(),
        folder,
        device_map={"base_model.model.model": "cpu", "base_model.model.lm_head": "disk"},
        offload_dir=str(folder / "offload"),
    )


class LlamaForMine(transformers.LlamaForCausalLM):
    """Another class of the same parameters, with another forward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the logits, and cap them."""
        output = super().forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output


def of_other_class(place: Place) -> Any:
    """A base model whose class is another one."""
    model = place.load()
    model.__class__ = LlamaForMine
    return model


SITUATIONS = (
    _tokenizer(
        "trained with padding on the left; the base model's tokenizer pads on the right",
        build=with_tokenizer(padding_side="left"),
        load=load_beside(padding_side="right"),
    ),
    _tokenizer(
        "the chat template was set for the training",
        build=with_tokenizer(chat_template=TEMPLATE),
        load=load_beside(),
    ),
    _tokenizer(
        "the base model's tokenizer has another vocabulary now",
        build=with_tokenizer(),
        load=load_beside(size=280),
        ours=refused(TokenizerMismatchError, r"tokenizer\."),
    ),
    Situation(
        cause="E2",
        title="a padded batch in bf16, after the reload the same batch",
        build=trained_lora(base("bf16")),
        base=base("bf16"),
        save=save_with_probe,
        answers=lambda model: logits(model, **BATCH),
    ),
    Situation(
        cause="F1",
        title="saved with another version of transformers",
        build=lora_model,
        state=_elsewhere.versions("transformers"),
        saving=_elsewhere.with_version("transformers", "4.57.0"),
        ours=told(r"environment\.packages\.transformers: saved '4\.57\.0'"),
    ),
    Situation(
        cause="F2",
        title="saved on a machine with another device",
        build=lora_model,
        state=_elsewhere.accelerators,
        saving=_elsewhere.on_another_machine,
        ours=told(r"environment\.accelerators"),
    ),
    Situation(
        cause="F3",
        title="deterministic algorithms are on, and were not at the save",
        build=lora_model,
        state=determinism,
        loading=deterministic,
        ours=told(r"runtime\..*deterministic"),
    ),
    Situation(
        cause="F4",
        title="the head of the base model is on the disk",
        build=lora_model,
        base=offloaded(),
        load=load_offloaded,
        ours=NOT_LOADED if V4 else exact_but(rf"{HEAD_IS_MISSING}|{ON_DISK}"),
    ),
    Situation(
        cause="F4",
        title="the head of the base model is on the disk, and is another one",
        build=lora_model,
        base=offloaded("llama with another head"),
        load=load_offloaded,
        ours=NOT_LOADED if V4 else told(HEAD_IS_MISSING, beside=ON_DISK),
    ),
    Situation(
        cause="F5",
        title="the base model is of another class, which computes in another way",
        build=lora_model,
        base=of_other_class,
        ours=refused(BaseModelMismatchError, "model_class: saved 'LlamaForCausalLM'"),
    ),
    Situation(
        cause="F5",
        title="the code in the base model's repository is another one (`trust_remote_code`)",
        build=trained_lora(remote_model(cap=50)),
        base=remote_model(cap=5),
        ours=refused(BaseModelMismatchError, r"remote_code\[modeling_capped\.py\]"),
    ),
)
