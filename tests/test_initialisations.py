"""Initialisations of LoRA come back exactly, above all those that rewrite the base model.

`INITIALISATIONS` has every value of `init_lora_weights`, and every field of the config that starts
an adapter in a way of its own. A value or a field that PEFT gets anew fails a test until it is
there. Each is run with PEFT's own preparation, trained, and loaded under another seed.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import config as lora_config
from peft.tuners.lora import layer as lora_layer
from peft.utils import loftq_utils

import peftstate
from peftstate.errors import (
    AdapterMismatchError,
    BaseModelMismatchError,
    RestoreError,
    UnverifiedWarning,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        ":peftstate.errors.TrainModeWarning",
        # of PEFT, when such an adapter is made
        "Specified to not (save|load):UserWarning",
        "PiSSA changes the base weights:UserWarning",
        "OLoRA changes the base weights:UserWarning",
        "CorDA changes the base weights:UserWarning",
        "LoRA-GA changes the base weights:UserWarning",
        # of PEFT, of tuners that draw from a seed
        "Sparse invariant checks are implicitly disabled:UserWarning",  # FRoD
        "lora with eva initialization used with low_cpu_mem_usage:UserWarning",
        # of PEFT, of a CorDA adapter that became a usual one
        "`corda_config` specified but will be ignored:UserWarning",
        # of torch's first backward pass through hooks
        "Full backward hook is firing:UserWarning",
    )
]

IDS = torch.arange(4, 16).reshape(2, 6)
FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}
TARGETS = ["q_proj", "down_proj"]


def predict(model: Any) -> None:
    """Run a model, as the preparations that look at activations want it."""
    with torch.no_grad():
        for _ in range(16):  # CorDA takes a text at a time
            model(input_ids=torch.randint(3, 64, (1, 16)))


# How each adapter is made


def plain(base: Any, config: LoraConfig) -> Any:
    """An adapter that needs no data."""
    return peftstate.get_peft_model(base, config)


def corda(base: Any, config: LoraConfig) -> Any:
    """CorDA decomposes the weights along the covariance of their inputs."""
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(base, config, run_model=lambda: predict(base))
    return peftstate.get_peft_model(base, config)


def eva(base: Any, config: LoraConfig) -> Any:
    """EVA decomposes the inputs of the layers, and spreads the ranks over these."""
    model = peftstate.get_peft_model(base, config)
    rows = [{"input_ids": torch.randint(3, 64, (4, 16))} for _ in range(16)]
    for row in rows:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    peft.initialize_lora_eva_weights(model, rows, show_progress_bar=False)
    return model


def lora_ga(base: Any, config: LoraConfig) -> Any:
    """LoRA-GA decomposes the gradient of the first batches."""
    from peft.tuners.lora.loraga import preprocess_loraga

    def step() -> None:
        base(input_ids=IDS, labels=IDS).loss.backward()

    preprocess_loraga(base, config, step)
    return peftstate.get_peft_model(base, config)


@attrs.frozen
class Initialisation:
    """A way to start an adapter.

    Attributes:
        init: The value of `init_lora_weights`.
        fields: What else the config has.
        make: How the adapter is made.
        rewrites: Whether the weights of the base model are others afterwards.
    """

    init: bool | str
    fields: Callable[[], dict[str, Any]] = dict
    make: Callable[[Any, LoraConfig], Any] = plain
    rewrites: bool = False

    def config(self, **fields: Any) -> LoraConfig:
        """A new config."""
        fields = {"r": 4, "target_modules": TARGETS, **self.fields(), **fields}
        fields["init_lora_weights"] = self.init
        return LoraConfig(task_type="CAUSAL_LM", **fields)

    @property
    def is_known(self) -> bool:
        """Whether the PEFT that is installed has it."""
        known = {*values_in_peft(), *named_in_config()}
        name = self.init.partition("_niter_")[0] if isinstance(self.init, str) else None
        return (name is None or name in known) and self.fields().keys() <= FIELDS


def upstream(name: str, **fields: Any) -> Any:
    """A part of a config that older releases of PEFT do not have."""
    return getattr(lora_config, name)(**fields) if hasattr(lora_config, name) else None


def loraga(direction: str, scale: str = "stable") -> Callable[[], dict[str, Any]]:
    """LoRA-GA in one of its forms."""
    return lambda: {"lora_ga_config": upstream("LoraGAConfig", direction=direction, scale=scale)}


INITIALISATIONS = {
    "default": Initialisation(init=True),
    "random": Initialisation(init=False),
    "gaussian": Initialisation("gaussian"),
    "orthogonal": Initialisation("orthogonal"),
    "mica": Initialisation("mica"),
    "pissa": Initialisation("pissa", rewrites=True),
    "pissa, randomised": Initialisation("pissa_niter_2", rewrites=True),
    "olora": Initialisation("olora", rewrites=True),
    "corda, instruction previewed": Initialisation(
        "corda",
        lambda: {"corda_config": lora_config.CordaConfig(corda_method="ipm")},
        corda,
        rewrites=True,
    ),
    "corda, knowledge preserved": Initialisation(
        "corda",
        lambda: {"corda_config": lora_config.CordaConfig(corda_method="kpm")},
        corda,
        rewrites=True,
    ),
    "eva": Initialisation("eva", lambda: {"eva_config": peft.EvaConfig(rho=2.0)}, eva),
    "loftq": Initialisation(
        "loftq", lambda: {"loftq_config": peft.LoftQConfig(loftq_bits=4)}, rewrites=True
    ),
    "lora_ga": Initialisation("lora_ga", loraga("ArB2r"), lora_ga, rewrites=True),
    "lora_ga, random": Initialisation("lora_ga", loraga("random", "gd"), lora_ga, rewrites=True),
    "kasa": Initialisation(
        init=True, fields=lambda: {"kasa_config": upstream("KasaConfig")}, rewrites=True
    ),
    "monteclora": Initialisation(
        init=True, fields=lambda: {"monteclora_config": upstream("MontecloraConfig")}
    ),
    "velora": Initialisation(
        init=True, fields=lambda: {"velora_config": upstream("VeloraConfig", num_groups=8)}
    ),
}


def values_in_peft() -> set[str]:
    """The values of `init_lora_weights` that PEFT's own code asks for."""
    folder = Path(inspect.getfile(lora_config)).parent
    found: set[str] = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            found |= _strings_asked_for(node)
    return found


def _strings_asked_for(node: ast.AST) -> set[str]:
    """The strings that an expression compares `init_lora_weights` with."""
    if isinstance(node, ast.Compare):
        asked, against = node.left, node.comparators
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("startswith"):
        asked, against = node.func, node.args
    else:
        return set()
    if "init_lora_weights" not in ast.unparse(asked):
        return set()
    constants = [part for value in against for part in ast.walk(value)]
    return {
        part.value
        for part in constants
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }


def named_in_config() -> set[str]:
    """The values of `init_lora_weights` that the type of the field names."""
    hint = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    literals = [part for part in typing.get_args(hint) if typing.get_args(part)]
    return {value.partition("_niter_")[0] for part in literals for value in typing.get_args(part)}


PARTS_OF_CONFIG = {
    # start an adapter in a way of their own, and are in `INITIALISATIONS`
    "corda_config",
    "eva_config",
    "kasa_config",
    "loftq_config",
    "lora_ga_config",
    "monteclora_config",
    "velora_config",
    # change what a forward does with usual weights: `test_lora.py`
    "arrow_config",
    "megatron_config",
    "runtime_config",
}


def test_every_initialisation_of_peft_is_here():
    """A value, or a part of the config, that PEFT gets anew must be looked at."""
    tested = {str(case.init).partition("_niter_")[0] for case in INITIALISATIONS.values()}
    assert (values_in_peft() | named_in_config()) - tested - {"true"} == set()
    assert {name for name in FIELDS if name.endswith("_config")} - PARTS_OF_CONFIG == set()


INITIALISATIONS = {name: case for name, case in INITIALISATIONS.items() if case.is_known}
REWRITING = [name for name, case in INITIALISATIONS.items() if case.rewrites]


@pytest.fixture
def loftq_on_a_cpu(monkeypatch):
    """Have LoftQ, which asks for a CUDA device, work on the CPU: the same code, word for word.

    It also asks for scipy, which 4 bits do not take.
    """
    find_spec: Any = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: name == "scipy" or find_spec(name, *args),
    )
    for name in ("loftq_init", "_loftq_init_new"):
        source = inspect.getsource(inspect.unwrap(getattr(loftq_utils, name)))
        scope = dict(vars(loftq_utils))
        exec(source.replace('"cuda"', '"cpu"'), scope)  # noqa: S102 - PEFT's own source
        monkeypatch.setattr(loftq_utils, name, scope[name])
        if hasattr(lora_layer, name):
            monkeypatch.setattr(lora_layer, name, scope[name])


def train(model: Any, steps: int = 3) -> None:
    """Train a few steps, in train mode."""
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture
def make(load_base, loftq_on_a_cpu, monkeypatch):
    """Makes an adapter as `INITIALISATIONS` says; afterwards LoftQ cannot run any more."""

    def run(name: str, kind: str = "fp32", **fields: Any) -> Any:
        case = INITIALISATIONS[name]
        model = case.make(load_base(kind), case.config(**fields))
        monkeypatch.undo()
        return model

    return run


@pytest.fixture
def reload(load_base, tmp_path):
    """Saves a model and loads it on a fresh base, under another seed."""

    def run(model: Any, kind: str = "fp32", **keywords: Any) -> Any:
        model.save_pretrained(tmp_path)
        torch.manual_seed(12345)
        return peftstate.PeftModel.from_pretrained(load_base(kind), tmp_path, **keywords)

    return run


Q_PROJ = "model.layers.0.self_attn.q_proj"


def is_rewritten(model: Any, pristine: Any) -> bool:
    """Whether a weight under an adapter is another one than in the bare base model."""
    weights = [found.get_submodule(Q_PROJ) for found in (model.get_base_model(), pristine)]
    return not torch.equal(weights[0].base_layer.weight, weights[1].weight)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("name", INITIALISATIONS)
def test_a_trained_adapter_comes_back(  # noqa: PLR0917 - fixtures
    make, load_base, reload, logits, name, kind
):
    """Whatever the adapter began as, the reload gives the same logits, and trains on alike."""
    case, model = INITIALISATIONS[name], make(name, kind)
    assert is_rewritten(model, load_base(kind)) == case.rewrites
    train(model)
    expected = logits(model)
    loaded = reload(model, kind)
    assert torch.equal(logits(loaded), expected)
    saved, found = model.peft_config["default"], loaded.peft_config["default"]
    assert (saved.init_lora_weights, saved.loftq_config) == (
        found.init_lora_weights,
        found.loftq_config,
    )
    if name == "monteclora":  # which holds random numbers that were drawn ahead
        with pytest.warns(UnverifiedWarning, match="MonteCLoRA draws its noise ahead"):
            peftstate.capture(model.train())
        return
    for each in (model, loaded):
        torch.manual_seed(3)
        train(each)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("fingerprint", ["sampled", "off"])
@pytest.mark.parametrize("name", REWRITING)
def test_without_digests(  # noqa: PLR0917 - fixtures
    make, load_base, logits, tmp_path, name, fingerprint
):
    """The rewritten weights are kept, also where no digest shows that they are others."""
    model = make(name)
    train(model)
    model.save_pretrained(tmp_path, fingerprint=fingerprint)
    torch.manual_seed(12345)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", REWRITING)
def test_a_model_that_was_attached_late(make, reload, logits, name):
    """A model that PEFT wrapped is known to be rewritten by its config."""
    model = make(name)
    model.__class__ = peft.PeftModelForCausalLM
    del model._peftstate_origin
    peftstate.attach(model)
    train(model)
    expected = logits(model)
    assert torch.equal(logits(reload(model)), expected)


@pytest.mark.parametrize("name", REWRITING)
def test_adapters_loaded_onto_the_meta_device(make, reload, logits, name):
    """`low_cpu_mem_usage`, with which PEFT cannot load PiSSA, and rewrites for KaSA only later."""
    model = make(name)
    train(model)
    expected = logits(model)
    loaded = reload(model, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("name", ["pissa", "pissa, randomised", "olora"])
def test_a_second_adapter_that_rewrote_the_base(make, reload, logits, name):
    """Of two adapters the second one, too, is loaded without beginning anew.

    The others are prepared on a bare base model only, or stand no other adapter beside them.
    """
    model = make("default")
    train(model)
    model.add_adapter("second", INITIALISATIONS[name].config())
    model.set_adapter("second")
    train(model)
    expected = {}
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        expected[adapter] = logits(model)
    loaded = reload(model)
    assert loaded.peft_config["second"].init_lora_weights == INITIALISATIONS[name].init
    for adapter, values in expected.items():
        loaded.set_adapter(adapter)
        assert torch.equal(logits(loaded.eval()), values)


@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize("name", REWRITING)
def test_loads_for_training_and_for_inference(make, reload, logits, name, is_trainable):
    """What the adapter is loaded for makes no difference to its weights."""
    model = make(name)
    train(model)
    expected = logits(model)
    assert torch.equal(logits(reload(model, is_trainable=is_trainable).eval()), expected)


@pytest.mark.parametrize("name", REWRITING)
def test_a_reload_can_be_saved_again(make, load_base, logits, tmp_path, name):
    """A second generation is as exact as the first."""
    model = make(name)
    train(model)
    model.save_pretrained(tmp_path / "first")
    first = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / "first")
    train(first)
    first.save_pretrained(tmp_path / "second")
    torch.manual_seed(12345)
    second = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / "second")
    assert torch.equal(logits(second), logits(first))


@pytest.mark.parametrize("name", REWRITING)
def test_merged(make, load_base, logits, tmp_path, name):
    """An adapter that is merged into weights that it rewrote comes back merged."""
    model = make(name)
    train(model)
    model.merge_adapter()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(12345)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    for each in (model, loaded):
        each.unmerge_adapter()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "name", ["pissa", "pissa, randomised", "olora", "corda, knowledge preserved"]
)
def test_converted_to_usual_lora(make, load_base, logits, tmp_path, name):
    """PEFT's conversion, after which the base model is as its checkpoint gives it.

    It is exact in exact arithmetic only; what the manifest holds is what was converted.
    """
    model = make(name)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation says
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = INITIALISATIONS[name].init
    train(model)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial"
    )
    torch.manual_seed(12345)
    base = load_base()
    pristine = base.get_submodule(Q_PROJ).weight.clone()
    loaded = peftstate.PeftModel.from_pretrained(base, tmp_path / "converted")
    kept = loaded.get_base_model().get_submodule(Q_PROJ).base_layer.weight
    assert torch.equal(kept, pristine)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_an_adapter_that_is_added_to_a_live_model(  # noqa: PLR0917 - fixtures
    make, load_base, with_lora, logits, tmp_path, name
):
    """`load_adapter` begins it anew, as PEFT does, and checks that it came out the same."""
    model = make(name)
    train(model)
    model.save_pretrained(tmp_path)
    other = with_lora(load_base())
    torch.manual_seed(12345)
    other.load_adapter(tmp_path, "second")
    other.set_adapter("second")
    assert torch.equal(logits(other.eval()), logits(model))


@pytest.mark.skipif("kasa" not in REWRITING, reason="this release of PEFT has no KaSA")
def test_kasa_is_added_to_a_live_model_that_has_it(make, load_base, logits, tmp_path):
    """The base model is cut off already, and stays as it is to the last bit."""
    model = make("kasa")
    train(model)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    loaded.load_adapter(tmp_path, "second")
    for adapter in ("default", "second"):
        loaded.set_adapter(adapter)
        assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.skipif("kasa" not in REWRITING, reason="this release of PEFT has no KaSA")
def test_kasa_is_not_added_to_a_live_model_of_another_rank(make, load_base, logits, tmp_path):
    """Its base model is cut off elsewhere: the error names the weights, and nothing changes."""
    make("kasa").save_pretrained(tmp_path / "first")
    make("kasa", r=2).save_pretrained(tmp_path / "second")
    model = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / "first").eval()
    before = logits(model)
    with pytest.raises(BaseModelMismatchError, match=r"extra_tensors\.base\["):
        model.load_adapter(tmp_path / "second", "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", [name for name in REWRITING if name not in {"pissa", "olora"}])
def test_an_adapter_that_cannot_be_added_to_a_live_model(  # noqa: PLR0917 - fixtures
    make, load_base, with_lora, logits, tmp_path, name
):
    """What cannot begin anew is refused with the way out, and the model is as it was."""
    model = make(name)
    train(model)
    model.save_pretrained(tmp_path)
    other = with_lora(load_base()).eval()
    before = logits(other)
    torch.manual_seed(12345)
    init = INITIALISATIONS[name].init
    message = (
        f"extra_tensors: the adapter began with rewriting weights of the base model ({init!r}), "
        "which load_adapter cannot repeat; load it with PeftModel.from_pretrained onto a base "
        "model of its own, or save it with path_initial_model_for_weight_conversion="
    )
    if name == "kasa":  # in PEFT's own words
        with pytest.raises(ValueError, match="KaSA cannot be combined"):
            other.load_adapter(tmp_path, "second")
    else:
        with pytest.raises(RestoreError) as caught:
            other.load_adapter(tmp_path, "second")
        assert str(caught.value) == message
    assert list(other.peft_config) == ["default"]
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_olora_on_a_quantized_base(make, load_base, reload, logits, kind):
    """OLoRA quantizes the weights that it rewrote again; they are kept as they are."""
    model = make("olora", kind)
    train(model)
    expected = logits(model)
    assert torch.equal(logits(reload(model, kind)), expected)


def test_loftq_on_a_quantized_base(  # noqa: PLR0917 - fixtures
    load_base, causal_lm, loftq_on_a_cpu, monkeypatch, reload, logits
):
    """`replace_lora_weights_loftq`, which only sets the adapter."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS)
    model = peftstate.get_peft_model(load_base("nf4"), config)
    before = model.base_model.model.get_submodule(Q_PROJ).lora_B["default"].weight.clone()
    peft.replace_lora_weights_loftq(model, str(causal_lm))
    after = model.base_model.model.get_submodule(Q_PROJ).lora_B["default"].weight
    assert not torch.equal(before, after)
    monkeypatch.undo()
    train(model)
    expected = logits(model)
    assert torch.equal(logits(reload(model, "nf4")), expected)


def test_eva_spreads_ranks(make, reload):
    """The ranks that EVA gave to each layer, and the layers that it left out, come back."""
    model = make("eva")
    assert len({len(weight) for name, weight in model.named_parameters() if "lora_A" in name}) > 1
    loaded = reload(model)
    assert {name: tuple(value.shape) for name, value in loaded.named_parameters()} == {
        name: tuple(value.shape) for name, value in model.named_parameters()
    }


# Tuners whose frozen parts come from a seed

SEEDED = {
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=TARGETS),
    "frod": lambda: peft.FrodConfig(
        target_modules=["q_proj"], progressbar=False, save_projection=False
    ),
    "pvera": lambda: peft.PveraConfig(r=4, target_modules=["q_proj"], save_projection=False),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj"], save_projection=False),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=["q_proj"], random_seed=7),
    "tinylora": lambda: peft.TinyLoraConfig(
        r=2, u=8, target_modules=["q_proj"], save_projection=False
    ),
    "unilora": lambda: peft.UniLoraConfig(r=4, target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=20, target_modules=["q_proj"]),
}
SEEDED = {
    name: make
    for name, make in SEEDED.items()
    if make.__code__.co_names[1] in vars(peft)  # the config's class
}


@pytest.mark.parametrize("name", SEEDED)
def test_frozen_parts_that_come_from_a_seed(load_base, reload, logits, name):
    """What the file has not is drawn again from the config's seed, whatever the global one is."""
    model = peftstate.get_peft_model(load_base(), SEEDED[name]())
    train(model)
    expected = logits(model)
    assert torch.equal(logits(reload(model)), expected)


@pytest.mark.parametrize("name", SEEDED)
def test_frozen_parts_that_come_out_otherwise(load_base, logits, tmp_path, monkeypatch, name):
    """Where another version, or another machine, draws other numbers, the load raises.

    Or it is exact all the same, since the tensors are in a file.
    """
    model = peftstate.get_peft_model(load_base(), SEEDED[name]())
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: MANUAL_SEED(seed + 1))
    monkeypatch.setattr(torch, "Generator", OtherGenerator)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: DEFAULT_RNG(seed + 1))
    if name in SAVED_WHOLE:
        loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
        assert torch.equal(logits(loaded), expected)
        return
    with pytest.raises(AdapterMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert all("unsaved" in mismatch.field for mismatch in caught.value.mismatches)


SAVED_WHOLE = {"shira"}
"""The tuners of which all that is drawn is in a file, whatever is asked for."""
MANUAL_SEED, DEFAULT_RNG = torch.manual_seed, np.random.default_rng


class OtherGenerator(torch.Generator):
    """A generator of a library that draws other numbers from the same seed."""

    def manual_seed(self, seed: int) -> torch.Generator:
        """Seed it."""
        return super().manual_seed(seed + 1)
