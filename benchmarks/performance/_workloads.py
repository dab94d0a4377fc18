"""The models that are loaded and saved, made on the spot but for Gemma.

The weights of the synthetic ones repeat a block of random numbers: what they are does not matter
for how long it takes to read them, and 2 GB of new ones would take longer to make than to measure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import safetensors.torch
import torch
import transformers
from peft import LoraConfig

import peftstate
from benchmarks._generations import silently
from benchmarks._page import ROOT
from benchmarks.fidelity._libraries import Library
from benchmarks.performance._measure import Sample, timed
from peftstate.sections import _remembered

MEGABYTE = 10**6
_BLOCK = 2**24
"""Numbers that the weights of a synthetic model repeat."""


@attrs.frozen(kw_only=True)
class Workload:
    """A base model, and an adapter for it.

    Attributes:
        name: Its name on the command line.
        title: What it is, as a table calls it.
        make: Makes the base model; twice the same one.
        config: The adapter's config.
        repetitions: How many runs of each library count.
    """

    name: str
    title: str
    make: Callable[[], Any]
    config: LoraConfig
    repetitions: int


def lora(rank: int, **fields: Any) -> LoraConfig:
    """A LoRA on all linear layers, if nothing else is said."""
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    return LoraConfig(r=rank, **options)


def llama(*, hidden: int, layers: int, intermediate: int, vocab: int) -> Any:
    """A Llama in bf16 with random weights, in memory only."""
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not weights
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(_BLOCK, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            _fill(weight.view(-1), block, first=number)
    return model.eval()


def _fill(weight: torch.Tensor, block: torch.Tensor, *, first: int) -> None:
    """Fill a tensor with a block of numbers, over and over, from one of them on."""
    for start in range(0, weight.numel(), len(block) - first):
        piece = weight[start : start + len(block) - first]
        piece.copy_(block[first : first + len(piece)])


def gemma(**options: Any) -> Any:
    """The real Gemma 3 270M, which `make` puts into the folder that `PEFTSTATE_GEMMA` names."""
    folder = ROOT / os.environ.get("PEFTSTATE_GEMMA", ".demo/gemma-3-270m")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, **options
    )


def gemma_nf4() -> Any:
    """The same with its linear layers in 4 bits."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return gemma(quantization_config=quantization)


TINY = Workload(
    name="tiny",
    title="tiny Llama, r=8",
    make=partial(llama, hidden=256, layers=4, intermediate=512, vocab=1024),
    config=lora(8),
    repetitions=21,
)
MEDIUM = Workload(
    name="medium",
    title="Llama of 8 layers, r=96",
    make=partial(llama, hidden=1024, layers=8, intermediate=2816, vocab=4096),
    config=lora(96),
    repetitions=9,
)
DEEP = Workload(
    name="deep",
    title="Llama of TinyLlama's 22 layers, r=64",
    make=partial(llama, hidden=2048, layers=22, intermediate=5632, vocab=32000),
    config=lora(64),
    repetitions=7,
)
LARGE = Workload(
    name="large",
    title="Llama with layers of 8B's size, r=64",
    make=partial(llama, hidden=4096, layers=4, intermediate=14336, vocab=32000),
    config=lora(64),
    repetitions=7,
)
GEMMA_BF16 = Workload(
    name="gemma-bf16",
    title="Gemma 3 270M in bf16, r=64",
    make=gemma,
    config=lora(64),
    repetitions=11,
)
GEMMA_NF4 = Workload(
    name="gemma-nf4",
    title="Gemma 3 270M in nf4, r=64",
    make=gemma_nf4,
    config=lora(64),
    repetitions=11,
)
WORKLOADS: Mapping[str, Workload] = {
    each.name: each for each in (TINY, MEDIUM, DEEP, LARGE, GEMMA_BF16, GEMMA_NF4)
}


@attrs.define
class Bench:
    """A base model in memory, and its adapter on disk.

    Attributes:
        base: The base model, bare.
        adapter: The folder that its adapter was saved to.
    """

    base: Any
    adapter: Path

    @classmethod
    def make(cls, workload: Workload, folder: Path) -> Bench:
        """Make the base model, and an adapter as if it had been trained."""
        with silently():
            bench = cls(workload.make(), folder)
            save_adapter(bench.base, workload.config, folder)
        return bench

    @property
    def base_bytes(self) -> int:
        """Bytes of the base model in memory."""
        return sum(tensor.nbytes for tensor in self.base.parameters())

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter's file."""
        return (self.adapter / "adapter_model.safetensors").stat().st_size

    @contextmanager
    def loaded(self, library: Library, **options: Any) -> Iterator[tuple[Any, Sample]]:
        """Load the adapter for inference; afterwards the base model is bare again.

        Args:
            library: What loads it.
            **options: Options of its `from_pretrained`.

        Raises:
            RuntimeError: The weights in the model are not those of the file.
        """
        with silently():
            model, sample = timed(
                partial(library.load, self.base, self.adapter, is_trainable=False, **options)
            )
        check_loaded(model, self.adapter, "default")
        yield model, sample
        self.base = bare(model)

    def first_load(self, library: Library, **options: Any) -> Sample:
        """Load the adapter onto the base model as one that was never read."""
        _remembered.forget()
        return self.load(library, **options)

    def load(self, library: Library, **options: Any) -> Sample:
        """Load the adapter, and say how long it took."""
        with self.loaded(library, **options) as (_, sample):
            return sample


def save_adapter(base: Any, config: LoraConfig, folder: Path) -> None:
    """Save an adapter whose weights are random, B included, and leave the base model bare."""
    torch.manual_seed(0)
    model = peftstate.get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0, 0.02)
    model.eval().save_pretrained(folder)
    bare(model)


def bare(model: Any) -> Any:
    """The base model without its adapters, fit to be loaded onto again."""
    base = model.unload()
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(base).pop(name, None)
    return base


def check_loaded(model: Any, folder: Path, name: str) -> None:
    """Make sure that an adapter is in a model.

    Raises:
        RuntimeError: A weight is not as it is in the file.
    """
    live = dict(model.named_parameters())
    for key, saved in safetensors.torch.load_file(folder / "adapter_model.safetensors").items():
        path, _, leaf = key.rpartition(".")
        if not torch.equal(live[f"{path}.{name}.{leaf}"], saved):
            raise RuntimeError(f"{key} is not what was saved")
