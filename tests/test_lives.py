"""Random lives of a model: whatever is done to it, a reload gives what it had become.

Each life is a sequence of operations of PEFT, transformers and torch that users do, with saves and
reloads in between, and hypothesis shortens a sequence that fails. A description that knows nothing
of peftstate compares (`tests/_oracle.py`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

import peftstate
from peftstate.errors import MergedWeightsWarning, PeftStateError, SaveError
from tests._oracle import describe, differences, outputs
from tests.conftest import IDS

pytestmark = pytest.mark.filterwarnings("ignore")  # of all the libraries that are called

TARGETS = (["q_proj"], ["q_proj", "v_proj"], ["down_proj", "o_proj"], r".*_proj")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFUSED = re.compile("disabled in some of their layers|merged into some of its layers")
"""States that a save refuses, for no load can bring them about."""


@st.composite
def configs(draw: st.DrawFn, *, first: bool) -> LoraConfig:
    """A config of LoRA; what PEFT allows of one adapter only is the first one's."""
    fields: dict[str, Any] = {
        "r": draw(st.sampled_from([1, 2, 4])),
        "lora_alpha": draw(st.sampled_from([1, 4])),
        "lora_dropout": draw(st.sampled_from([0.0, 0.1])),
        "target_modules": draw(st.sampled_from(TARGETS)),
        "use_rslora": draw(st.booleans()),
        "task_type": "CAUSAL_LM",
    }
    if first:
        fields["bias"] = draw(st.sampled_from(["none", "none", "all"]))
        fields["modules_to_save"] = draw(
            st.sampled_from([None, None, ["lm_head"], ["lm_head", "embed_tokens"], ["norm"]])
        )
    else:
        fields["use_dora"] = draw(st.booleans())
    return LoraConfig(**fields)


class Life(RuleBasedStateMachine):
    """The life of one model."""

    def __init__(self, make: Callable[[], Any], folder: Path) -> None:
        super().__init__()
        self._make = make
        self._folder = folder
        self._saves = 0
        self._merged = False

    @initialize(config=configs(first=True), seed=st.integers(0, 99))
    def begin(self, config: LoraConfig, seed: int) -> None:
        """Wrap the base model."""
        torch.manual_seed(seed)
        self.model = peftstate.get_peft_model(self._make(), config)
        self._randomise("default")

    def _randomise(self, adapter: str) -> None:
        """Give an adapter weights as if it had been trained."""
        for name, parameter in self.model.named_parameters():
            if f"lora_B.{adapter}" in name:
                parameter.data.normal_(0, 0.1)

    # What is done with adapters

    @rule(config=configs(first=False))
    @precondition(lambda self: not self._merged)
    def add(self, config: LoraConfig) -> None:
        """Add an adapter; PEFT unmerges those that are merged."""
        name = f"further-{len(self.model.peft_config)}"
        if name not in self.model.peft_config:
            self.model.add_adapter(name, config)
            self._randomise(name)

    @rule(data=st.data())
    @precondition(lambda self: not self._merged)
    def activate(self, data: st.DataObject) -> None:
        """Activate one adapter, or several."""
        names = data.draw(
            st.lists(st.sampled_from(sorted(self.model.peft_config)), min_size=1, unique=True)
        )
        if len(names) == 1:
            self.model.set_adapter(names[0])
        else:
            self.model.base_model.set_adapter(names)

    @rule(safe=st.booleans())
    def merge_and_unmerge(self, *, safe: bool) -> None:
        """Merge the active adapters and take them out again, which rounds."""
        self.model.merge_adapter(safe_merge=safe)
        self.model.unmerge_adapter()

    @rule(safe=st.booleans())
    def merge(self, *, safe: bool) -> None:
        """Merge the active adapters."""
        self.model.merge_adapter(safe_merge=safe)
        self._merged = True

    @rule(on=st.booleans())
    def enable(self, *, on: bool) -> None:
        """Switch all adapters on or off."""
        tuner = self.model.base_model
        tuner.enable_adapter_layers() if on else tuner.disable_adapter_layers()

    @rule(scale=st.sampled_from([0.5, 2.0]))
    def scale(self, scale: float) -> None:
        """Scale what the active adapters give."""
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(scale)

    # What is done with the model

    @rule(on=st.booleans(), data=st.data())
    def train(self, *, on: bool, data: st.DataObject) -> None:
        """Set the train flag of one module and all below it."""
        names = sorted(name for name, _ in self.model.named_modules())
        self.model.get_submodule(data.draw(st.sampled_from(names))).train(on)

    @rule(on=st.booleans(), data=st.data())
    def freeze(self, *, on: bool, data: st.DataObject) -> None:
        """Freeze a parameter, or make it trainable."""
        parameters = dict(self.model.named_parameters())
        floating = sorted(name for name, each in parameters.items() if each.is_floating_point())
        parameters[data.draw(st.sampled_from(floating))].requires_grad_(on)

    @rule(probability=st.sampled_from([0.0, 0.5]))
    def drop(self, probability: float) -> None:
        """Set the probability of all dropout layers."""
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = probability

    @rule()
    def step(self) -> None:
        """Train what is trainable, all of it in train mode meanwhile."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        trained = [each for each in self.model.parameters() if each.requires_grad]
        try:
            loss = self.model(input_ids=IDS, labels=IDS).loss
        except RuntimeError:  # of dtypes that do not go together
            loss = torch.zeros(())
        if trained and loss.requires_grad:
            loss.backward()
            torch.optim.SGD(trained, lr=0.1).step()
            self.model.zero_grad()
        for module, mode in modes:
            module.training = mode

    @rule()
    def run(self) -> None:
        """Run it, by which layers of bitsandbytes change."""
        outputs(self.model)

    @rule(dtype=st.sampled_from(DTYPES), data=st.data())
    def cast_adapter(self, dtype: torch.dtype, data: st.DataObject) -> None:
        """Cast the weights of an adapter."""
        adapter = data.draw(st.sampled_from(sorted(self.model.peft_config)))
        for name, parameter in self.model.named_parameters():
            if f".{adapter}." in name:
                parameter.data = parameter.data.to(dtype)

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """Change a norm or an embedding of the base model."""
        names = [
            name
            for name, _ in self.model.named_parameters()
            if "norm.weight" in name or name.endswith(("embed_tokens.weight", "lm_head.weight"))
        ]
        parameter = self.model.get_parameter(data.draw(st.sampled_from(sorted(names))))
        parameter.data = parameter.data + 0.25

    @rule(
        setting=st.sampled_from([("do_sample", True), ("temperature", 0.3), ("max_new_tokens", 7)])
    )
    def generation(self, setting: tuple[str, Any]) -> None:
        """Edit the generation config."""
        setattr(self.model.get_base_model().generation_config, *setting)

    @rule(implementation=st.sampled_from(["eager", "sdpa"]))
    def attention(self, implementation: str) -> None:
        """Choose another implementation of attention."""
        self.model.get_base_model().set_attn_implementation(implementation)

    @rule(on=st.booleans())
    def checkpointing(self, *, on: bool) -> None:
        """Switch gradient checkpointing on or off."""
        model = self.model
        model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()

    @rule(number=st.integers(1, 9))
    def draw(self, number: int) -> None:
        """Draw random numbers."""
        torch.rand(number)

    @rule()
    def ask_for_state(self) -> None:
        """Ask for the state dict, which unpacks 4-bit layers."""
        self.model.state_dict()

    # What is promised

    @rule(is_trainable=st.sampled_from([None, False]))
    def reload(self, *, is_trainable: bool | None) -> None:
        """Save it and load it onto a fresh base model, and live on as what was loaded."""
        folder, may_differ = self._saved()
        if folder is None:
            return
        base = self._make()
        bare, live = describe(base), describe(self.model)
        loaded = refused = None
        try:
            loaded = peftstate.PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
        except PeftStateError as error:
            refused = error
        if refused is not None:
            assert may_differ, refused
            assert not differences(bare, describe(base), for_inference=False)
            return
        assert not differences(live, describe(loaded), for_inference=is_trainable is False)
        self._compare_outputs(loaded)
        self.model = loaded

    def _saved(self) -> tuple[Path | None, bool]:
        """Save the model.

        Returns:
            The folder; `None` if the state is one that is refused. And whether the save said that a
            load may not be able to bring it about.
        """
        self._saves += 1
        folder = self._folder / str(self._saves)
        before, refused = describe(self.model), None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.model.save_pretrained(folder)
            except SaveError as error:
                refused = error
        assert not differences(before, describe(self.model), for_inference=False)
        if refused is not None:
            assert REFUSED.search(str(refused)), refused
            return None, False
        return folder, any(warning.category is MergedWeightsWarning for warning in caught)

    def _compare_outputs(self, loaded: Any) -> None:
        """Run both models, in eval mode for no dropout to be drawn."""
        found = []
        for model in (self.model, loaded):
            modes = [(module, module.training) for module in model.modules()]
            found.append(outputs(model.eval()))
            for module, mode in modes:
                module.training = mode
        if isinstance(found[0], torch.Tensor):
            torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)
        else:
            assert found[0] == found[1]

    def teardown(self) -> None:
        """End as every life does."""
        if hasattr(self, "model"):
            self.reload(is_trainable=None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_lives(  # noqa: PLR0917 - fixtures
    load_base, causal_lm, tied_lm, tmp_path_factory, kind, tied
):
    """What users do to a model in any order comes back, or an error or a warning says what not."""
    make = partial(load_base, kind, tied_lm if tied else causal_lm)
    run_state_machine_as_test(
        lambda: Life(make, tmp_path_factory.mktemp("life")),
        settings=settings(
            max_examples=15, stateful_step_count=8, derandomize=True, report_multiple_bugs=False
        ),
    )
