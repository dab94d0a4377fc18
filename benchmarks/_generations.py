"""A small model that is saved over and over, each time in another state, and told by what loads.

A generation is what one save leaves: two adapters, the second in a sub-folder, with weights and a
scaling of their own. A load that gives anything but one generation for both is mixed.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import peft
import torch
import transformers
from torch import nn

import peftstate
from peftstate._folder import AdapterFolder
from peftstate._source import AdapterFiles, read_source
from peftstate.errors import PeftStateError

EXTRA = "extra"
"""The second adapter, and the sub-folder that it is saved to."""
IDS = torch.arange(4, 16).reshape(2, 6)
MIXED = "mixed"

Outputs = dict[str, torch.Tensor]


@attrs.frozen
class Library:
    """How a library saves a model and loads it again.

    Attributes:
        name: As a table calls it.
        save: Saves a model into a folder, with options of `save_pretrained`.
        load: Loads both adapters of a folder onto a base model.
    """

    name: str
    save: Callable[..., None]
    load: Callable[[nn.Module, Path], Any]


def _load_with_peft(base: nn.Module, folder: Path) -> Any:
    """Load both adapters with PEFT, which does not look for a second one by itself."""
    model = peft.PeftModel.from_pretrained(base, str(folder))
    if (folder / EXTRA).is_dir():
        model.load_adapter(str(folder / EXTRA), EXTRA)
    return model


def _load_with_peftstate(base: nn.Module, folder: Path) -> Any:
    """Load both adapters with peftstate."""
    return peftstate.PeftModel.from_pretrained(
        base, folder, is_trainable=False, require_manifest=True
    )


PEFT = Library(
    "plain PEFT",
    lambda model, folder, **options: peft.PeftModel.save_pretrained(model, str(folder), **options),
    _load_with_peft,
)
PEFTSTATE = Library(
    "peftstate",
    lambda model, folder, **options: model.save_pretrained(folder, **options),
    _load_with_peftstate,
)


def make_base(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Llama, as `from_pretrained` gives it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def make(base: nn.Module, number: int) -> Any:
    """The model as it is in a generation."""
    torch.manual_seed(number)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8 * (number + 1),
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peftstate.get_peft_model(copy.deepcopy(base), config)
    model.add_adapter(EXTRA, config)
    model.eval()
    return model


def outputs(model: Any) -> Outputs:
    """What each adapter of a model predicts."""
    found: Outputs = {}
    active = model.active_adapter
    for name in list(model.peft_config):
        model.set_adapter(name)
        with torch.no_grad():
            found[name] = model(input_ids=IDS).logits
    model.set_adapter(active)
    return found


@attrs.frozen
class Generations:
    """A base model, and the states of it that are saved.

    Attributes:
        base: The base model, which is never touched.
        models: The model of each generation.
        outputs: What each one predicts.
    """

    base: nn.Module
    models: tuple[Any, ...]
    outputs: tuple[Outputs, ...]

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Generations:
        """Make some generations."""
        base = make_base()
        models = tuple(make(base, number) for number in numbers)
        return cls(base, models, tuple(map(outputs, models)))

    def told(self, library: Library, folder: Path, *, adapters: int = 2) -> int | str:
        """What a folder loads as.

        Args:
            library: How it is loaded.
            folder: The folder.
            adapters: How many adapters of a generation were saved.

        Returns:
            The generation; `MIXED` if it is none; or the name of the error.
        """
        try:
            with silently():
                found = outputs(library.load(copy.deepcopy(self.base), folder))
        except PeftStateError as error:
            return type(error).__name__
        except Exception as error:  # noqa: BLE001 - what is raised is what is measured
            return f"untyped {type(error).__name__}"
        return self._number_of(found, adapters)

    def told_alone(self, library: Library, folder: Path) -> int | str:
        """What the sub-folder of the second adapter loads as, opened by itself."""
        alone = Generations(
            self.base, self.models, tuple({"default": each[EXTRA]} for each in self.outputs)
        )
        return alone.told(library, folder / EXTRA, adapters=1)

    def read(self, folder: Path, *, adapters: int = 2) -> int | str:
        """What the files of a folder are, read and checked by peftstate, as `told`."""
        try:
            source = read_source(AdapterFolder.at(folder))
        except PeftStateError as error:
            return type(error).__name__
        except Exception as error:  # noqa: BLE001 - what is raised is what is measured
            return f"untyped {type(error).__name__}"
        for number, model in enumerate(self.models):
            names = list(model.peft_config)[:adapters]
            if list(source.adapters) == names and all(
                _is_adapter(source.adapters[name], model, name) for name in names
            ):
                return number
        return MIXED

    def _number_of(self, found: Outputs, adapters: int) -> int | str:
        """The generation that predicts this, or `MIXED`."""
        for number, each in enumerate(self.outputs):
            expected = dict(list(each.items())[:adapters])
            if found.keys() == expected.keys() and all(
                torch.equal(found[name], expected[name]) for name in expected
            ):
                return number
        return MIXED


def _is_adapter(read: AdapterFiles, model: Any, name: str) -> bool:
    """Whether an adapter that was read is the one of a model."""
    expected = peft.get_peft_model_state_dict(model, adapter_name=name)
    return (
        read.config["lora_alpha"] == model.peft_config[name].lora_alpha
        and read.tensors.keys() == expected.keys()
        and all(torch.equal(read.tensors[key], expected[key]) for key in expected)
    )


@contextmanager
def silently() -> Iterator[None]:
    """Leave out the warnings of PEFT and transformers, of keys that are missing and the like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
