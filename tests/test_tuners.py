"""Every kind of adapter that PEFT has comes back, to the last bit.

`CASES` has each of `peft.PeftType` at least once, and some in more than one form; `UNTESTED` says
why a type is not there. A type that PEFT gets anew fails a test until it is in one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load, save

import peftstate
from peftstate import _loading
from peftstate.errors import SaveError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        ":peftstate.errors.TrainModeWarning",
        # of PEFT's tuners, when they are made
        "Failed to load the CUDA extension:UserWarning",  # BOFT
        "Setting boft_n_butterfly_factor:UserWarning",
        "Specified to not (save|load):UserWarning",  # VeRA and its like, without projections
        "Bone will be removed:UserWarning",
        "Sparse invariant checks are implicitly disabled:UserWarning",  # FRoD
        "Unsupported layer type '<class 'transformers.models.llama:UserWarning",  # LN tuning
        # of transformers, when prefix tuning and Shadow run
        "`past_key_values` is deprecated:FutureWarning",
    )
]

IDS = torch.arange(4, 16).reshape(2, 6)
TASKS = torch.tensor([0, 1])

TELLS_ADAPTERS_APART = hasattr(BaseTuner, "_get_adapter_state_dict")
"""Whether PEFT knows which tensors are an adapter's by where they are, not by their names, in which
older releases take one adapter for another."""

UNTESTED: dict[str, str] = {}
"""The types that are not tested, and why."""


@attrs.frozen
class Case:
    """A kind of adapter.

    Attributes:
        config: Name of the config's class in PEFT.
        fields: What makes it small, and what makes it a form of its own.
        inputs: What the model is run on beside ids.
        is_lossy: Whether PEFT's file has less than the model, so that PEFT alone is not exact.
    """

    config: str
    fields: dict[str, Any]
    inputs: dict[str, Any] = attrs.field(factory=dict)
    is_lossy: bool = False

    def make(self) -> peft.PeftConfig:
        """A new config."""
        fields = {"task_type": "CAUSAL_LM", **self.fields}
        config: peft.PeftConfig = getattr(peft, self.config)(**fields)
        return config


def layers(config: str, *, is_lossy: bool = False, **fields: Any) -> Case:
    """A tuner that puts layers into the attention."""
    return Case(config, {"target_modules": ["q_proj", "v_proj"], **fields}, is_lossy=is_lossy)


def prompt(config: str, *, is_lossy: bool = False, **fields: Any) -> Case:
    """A tuner that puts tokens before the inputs."""
    return Case(config, {"num_virtual_tokens": 4, **fields}, is_lossy=is_lossy)


CASES = {
    "ADALORA": layers("AdaLoraConfig", init_r=4, target_r=2, total_step=10),
    "ADAMSS": layers("AdamssConfig", r=16, num_subspaces=2, subspace_rank=2),
    "ADAPTION_PROMPT": Case("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1}),
    "BEFT": layers("BeftConfig"),
    "BOFT": layers("BOFTConfig", boft_block_size=4),
    "BONE": layers("BoneConfig", r=4),  # which became MISS
    "C3A": layers("C3AConfig", block_size=8),
    "CARTRIDGE": prompt("CartridgeConfig", num_frozen_tokens=1),
    "CPT": Case(
        "CPTConfig",
        {
            "cpt_token_ids": [1, 2, 3, 4],
            "cpt_mask": [1, 1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 3, 4],
            # else each forward pass scales the prompt once more, and no two give the same
            "opt_projection_epsilon": 100.0,
            "opt_projection_format_epsilon": 100.0,
        },
    ),
    "DEFT": layers("DeftConfig", r=4),
    "DEFT, para": layers("DeftConfig", r=4, para=True),
    "DELORA": layers("DeloraConfig", r=4),
    "FOURIERFT": layers("FourierFTConfig", n_frequency=20),
    "FROD": layers("FrodConfig", progressbar=False),
    "FROD, without projections": layers("FrodConfig", progressbar=False, save_projection=False),
    "GLORA": layers("GloraConfig", r=4),
    "GRALORA": layers("GraloraConfig", r=4),
    "HIRA": layers("HiraConfig", r=4),
    "HRA": layers("HRAConfig", r=4),
    "IA3": layers(
        "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LILY": layers("LilyConfig", r=4),
    "LN_TUNING": layers("LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    "LOHA": layers("LoHaConfig", r=4),
    "LOKR": layers("LoKrConfig", r=4),
    "LORA": layers("LoraConfig", r=4),
    "MISS": layers("MissConfig", r=4),
    "MISS, bat": layers("MissConfig", r=4, init_weights="bat"),
    "MISS, mini": layers("MissConfig", r=4, init_weights="mini", mini_r=4),
    "MULTITASK_PROMPT_TUNING": Case(
        "MultitaskPromptTuningConfig",
        {"num_virtual_tokens": 4, "num_tasks": 2, "num_ranks": 1},
        inputs={"task_ids": TASKS},
    ),
    "OFT": layers("OFTConfig", oft_block_size=4),
    "OSF": layers("OSFConfig", effective_rank=8),
    "PEANUT": layers("PeanutConfig", r=4),
    "PEANUT, deep": layers("PeanutConfig", r=4, depth=2),
    "POLY": Case(
        "PolyConfig",
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "n_tasks": 2, "n_skills": 2},
        inputs={"task_ids": TASKS},
    ),
    "PREFIX_TUNING": prompt("PrefixTuningConfig"),
    "PREFIX_TUNING, projected": prompt(
        "PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=16
    ),
    "PROMPT_TUNING": prompt("PromptTuningConfig"),
    "PSOFT": layers("PsoftConfig", r=4),
    "PVERA": layers("PveraConfig", r=4),
    "PVERA, without projections": layers("PveraConfig", r=4, save_projection=False),
    "P_TUNING": prompt("PromptEncoderConfig", encoder_hidden_size=16),
    "P_TUNING, LSTM": prompt(
        "PromptEncoderConfig",
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=2,
        encoder_dropout=0.5,
        is_lossy=True,
    ),
    "RANDLORA": layers("RandLoraConfig", r=4),
    "RANDLORA, without projections": layers("RandLoraConfig", r=4, save_projection=False),
    "ROAD": layers("RoadConfig", group_size=8),
    "SHADOW": Case("ShadowConfig", {"r": 4}),
    "SHIRA": layers("ShiraConfig", r=4),
    "SUPERTUNING": layers("SupertuningConfig"),
    "SUPERTUNING, with LoRA": layers("SupertuningConfig", r=4, lora_alpha=8),
    "TINYLORA": layers("TinyLoraConfig", r=2, u=8),
    "TINYLORA, without projections": layers("TinyLoraConfig", r=2, u=8, save_projection=False),
    "TRAINABLE_TOKENS": layers(
        "TrainableTokensConfig", target_modules=["embed_tokens"], token_indices=[9, 10]
    ),
    "UNILORA": layers("UniLoraConfig", r=4),
    "UNILORA, with indices": layers("UniLoraConfig", r=4, save_indices=True),
    "VBLORA": layers("VBLoRAConfig", r=4, num_vectors=8, vector_length=8),
    "VBLORA, top k only": layers(
        "VBLoRAConfig",
        r=4,
        num_vectors=8,
        vector_length=8,
        save_only_topk_weights=True,
        is_lossy=True,
    ),
    "VERA": layers("VeraConfig", r=4),
    "VERA, without projections": layers("VeraConfig", r=4, save_projection=False),
    "WAVEFT": layers("WaveFTConfig", n_frequency=20),
    # completed by `with_experts`: it mixes LoRA adapters that are on disk
    "XLORA": Case(
        "XLoraConfig", {"hidden_size": 64, "xlora_depth": 2, "xlora_size": 8}, is_lossy=True
    ),
}
CASES = {name: case for name, case in CASES.items() if hasattr(peft, case.config)}


ONE_OF_EACH = [name for name in CASES if "," not in name]
"""The first form of each type."""


def type_of(name: str) -> str:
    """The `peft.PeftType` of a case."""
    return name.partition(",")[0]


def with_experts(case: Case, load_base: Any, folder: Path) -> Case:
    """X-LoRA, after the LoRA adapters were saved that it mixes."""
    paths = {name: str(folder / f"expert-{name}") for name in ("0", "1")}
    for path in paths.values():
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False
        )
        peft.get_peft_model(load_base(), config).save_pretrained(path)
    fields = {**case.fields, "adapters": paths, "use_trainable_adapters": True}
    return attrs.evolve(case, fields=fields)


def run(model: Any, case: Case) -> torch.Tensor:
    """The logits of a model in eval mode, its flags left as they were."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    inputs = case.inputs if hasattr(model, "peft_config") else {}
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, **inputs).logits
    for module, training in before:
        module.training = training
    return logits[:, -IDS.shape[1] :]  # without those of a prompt


def disturb(model: Any, *, but: Sequence[torch.Tensor] = (), seed: int = 1) -> None:
    """Have every trainable weight, but some, matter, as after training."""
    generator = torch.Generator().manual_seed(seed)
    left = {id(tensor) for tensor in but}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in left:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise.to(parameter.dtype)


def trainable(model: Any) -> set[str]:
    """The names of the trainable parameters."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def flags(model: Any) -> dict[str, bool]:
    """The train flag of every module, mere containers left out."""
    containers = (torch.nn.ModuleDict, torch.nn.ModuleList)
    return {
        name: module.training
        for name, module in model.named_modules()
        if not isinstance(module, containers)
    }


def dtypes(model: Any) -> dict[str, torch.dtype]:
    """The dtype of every parameter."""
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def trace(model: Any) -> dict[str, Any]:
    """All that a load could leave behind on a base model."""
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "flags": flags(model),
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "forwards": {name for name, module in model.named_modules() if "forward" in vars(module)},
        "parameters": {
            name: (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad)
            for name, tensor in model.named_parameters(remove_duplicate=False)
        },
    }


@attrs.frozen
class Saved:
    """A model, and where it was saved.

    Attributes:
        case: What it is a case of.
        model: The model.
        logits: Its logits before the save.
        unadapted: The logits of its base model.
        folder: Where it was saved.
    """

    case: Case
    model: Any
    logits: torch.Tensor
    unadapted: torch.Tensor
    folder: Path


@pytest.fixture(scope="module")
def bases(load_base):
    """Loads the base model of a case: `bases(case, kind)`."""

    def load(case: Case, kind: str = "fp32") -> Any:
        base = load_base(kind)
        base.config.use_cache = case.config != "XLoraConfig"  # which refuses a cache
        return base

    return load


@pytest.fixture(scope="module")
def saved(request, bases, load_base, tmp_path_factory):
    """A case, wrapped, disturbed and saved."""
    folder = tmp_path_factory.mktemp("tuner")
    case = CASES[request.param]
    if case.config == "XLoraConfig":
        case = with_experts(case, load_base, folder)
    base = bases(case)
    unadapted = run(base, case)
    model = peftstate.get_peft_model(base, case.make())
    disturb(model)
    logits = run(model, case)
    model.save_pretrained(folder / "adapter")
    return Saved(case, model, logits, unadapted, folder / "adapter")


every_case = pytest.mark.parametrize("saved", CASES, indirect=True)
every_type = pytest.mark.parametrize("saved", ONE_OF_EACH, indirect=True)


def test_every_type_is_tested_or_listed():
    """No `PeftType` of the PEFT that is installed is missing here."""
    tested = {type_of(name) for name in CASES}
    assert {kind.name for kind in peft.PeftType} <= tested | UNTESTED.keys()
    assert not tested & UNTESTED.keys()
    assert all(UNTESTED.values())


@every_case
def test_a_reload_is_the_model_that_was_saved(saved, bases):
    """Logits, trainable set, train flags and dtypes are those of the saved model."""
    assert (saved.logits - saved.unadapted).abs().max() > 1e-3
    torch.manual_seed(7)
    loaded = peftstate.PeftModel.from_pretrained(bases(saved.case), saved.folder)
    assert peftstate.verify(loaded, saved.folder).ok
    assert trainable(loaded) == trainable(saved.model)
    assert flags(loaded) == flags(saved.model)
    assert dtypes(loaded) == dtypes(saved.model)
    configs = loaded.peft_config["default"], saved.model.peft_config["default"]
    assert configs[0].inference_mode is configs[1].inference_mode is False
    assert torch.equal(run(loaded, saved.case), saved.logits)


@pytest.fixture
def compared(monkeypatch):
    """Of each load, whether the modules that it met after the injection are those of its end."""
    compare, found = _loading.compare_restored, []

    def comparing(view, *arguments):
        found.append(view.sites() == view.now().sites())
        return compare(view, *arguments)

    monkeypatch.setattr(_loading, "compare_restored", comparing)
    return found


@every_type
def test_what_is_compared_is_in_the_model(saved, bases, compared):
    """What a section puts into the model or takes out, it tells."""
    peftstate.PeftModel.from_pretrained(bases(saved.case), saved.folder)
    assert compared == [True]


@pytest.mark.parametrize("is_applied", [True, False] if TELLS_ADAPTERS_APART else [True])
def test_adaption_prompts_that_change_places_are_compared(bases, tmp_path, compared, is_applied):
    """Only those of the active adapter are in the model, and none while they are disabled."""
    case = CASES["ADAPTION_PROMPT"]
    model = peftstate.get_peft_model(bases(case), case.make())
    model.add_adapter("second", case.make())
    model.set_adapter("second")
    disturb(model)
    if not is_applied:
        model.base_model.disable_adapter_layers()
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(bases(case), tmp_path)
    assert compared == [True]
    assert peftstate.verify(loaded, tmp_path).ok
    assert torch.equal(run(loaded, case), run(model, case))


@every_case
def test_a_save_leaves_the_model_as_it_was(saved):
    """The live model gives the logits of before the save."""
    assert torch.equal(run(saved.model, saved.case), saved.logits)


@every_case
def test_a_reload_for_inference_is_exact_and_so_is_the_next_one(saved, bases, tmp_path):
    """Frozen, in eval mode, under another name, no number drawn; saved again, still the same."""
    generator = torch.get_rng_state()
    loaded = peftstate.PeftModel.from_pretrained(
        bases(saved.case), saved.folder, adapter_name="other", is_trainable=False
    )
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(flags(loaded).values())
    assert trainable(loaded) == set()
    assert torch.equal(run(loaded, saved.case), saved.logits)
    if saved.case.config != "XLoraConfig":  # see test_xlora_has_its_experts_beside_it
        loaded.save_pretrained(tmp_path)
        again = peftstate.PeftModel.from_pretrained(bases(saved.case), tmp_path / "other")
        assert torch.equal(run(again, saved.case), saved.logits)


@every_case
def test_plain_peft_loads_the_folder(saved, bases):
    """What was written is an ordinary adapter, with all that PEFT alone keeps."""
    loaded = peft.PeftModel.from_pretrained(bases(saved.case), saved.folder)
    assert torch.equal(run(loaded, saved.case), saved.logits) != saved.case.is_lossy


@pytest.mark.parametrize("saved", ["XLORA"], indirect=True)
def test_xlora_has_its_experts_beside_it(saved, bases, tmp_path):
    """Under another name its folder would lack the experts that it trained, so that is refused."""
    loaded = peftstate.PeftModel.from_pretrained(
        bases(saved.case), saved.folder, adapter_name="other"
    )
    with pytest.raises(SaveError, match="default"):
        loaded.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    "change",
    [
        lambda tuner: tuner.set_topk_lora(1),
        lambda tuner: tuner.set_global_scaling_weight(2.0),
        lambda tuner: tuner.set_scaling_pass_value(0.3),
        lambda tuner: tuner.set_scaling_pass_value(None),
        lambda tuner: tuner.disable_adapter_layers(),
    ],
    ids=["top k", "weight", "pass value", "no pass value", "disabled"],
)
def test_what_was_set_on_xlora_comes_back(load_base, bases, tmp_path, change):
    """PEFT sets it in a copy of the config, and would write the config as it was before."""
    case = with_experts(CASES["XLORA"], load_base, tmp_path)
    model = peftstate.get_peft_model(bases(case), case.make())
    disturb(model)
    before, config = run(model, case), model.peft_config["default"]
    fields = config.to_dict()
    change(model.base_model)
    changed = run(model, case)
    assert not torch.equal(changed, before)
    model.save_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"] is config
    assert config.to_dict() == fields
    assert peftstate.verify(model, tmp_path / "adapter").ok
    for is_trainable in (None, False):
        loaded = peftstate.PeftModel.from_pretrained(
            bases(case), tmp_path / "adapter", is_trainable=is_trainable
        )
        assert torch.equal(run(loaded, case), changed)


@every_type
def test_a_load_that_fails_leaves_no_trace(saved, bases, monkeypatch):
    """Whatever the tuner did to the base model is undone, and a second try succeeds."""

    def fail(*_):
        raise RuntimeError("at the very end")

    base = bases(saved.case)
    before = trace(base)
    monkeypatch.setattr("peftstate._loading.compare_restored", fail)
    with pytest.raises(RuntimeError, match="at the very end"):
        peftstate.PeftModel.from_pretrained(base, saved.folder)
    monkeypatch.undo()
    assert trace(base) == before
    assert torch.equal(run(base, saved.case), saved.unadapted)
    loaded = peftstate.PeftModel.from_pretrained(base, saved.folder)
    assert torch.equal(run(loaded, saved.case), saved.logits)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name != "XLORA"])
def test_on_a_base_in_bf16(bases, tmp_path, name):
    """The dtypes that PEFT chose when it made the adapter are not those that it loads one in."""
    case = CASES[name]
    model = peftstate.get_peft_model(bases(case, "bf16"), case.make())
    disturb(model)
    logits = run(model, case)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(bases(case, "bf16"), tmp_path)
    assert dtypes(loaded) == dtypes(model)
    assert torch.equal(run(loaded, case), logits)


SEVERAL = ["CPT", "LORA", "PREFIX_TUNING", "P_TUNING"]
"""Types with a bank that layers share, or with names for their tensors that are unlike LoRA's."""
if TELLS_ADAPTERS_APART:
    SEVERAL += [
        "ADAPTION_PROMPT",  # of which only the active one is in the model
        "FROD",
        "PEANUT",
        "SHADOW",
        "SHIRA",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
    ]


@pytest.mark.parametrize("name", [name for name in SEVERAL if name in CASES])
def test_several_adapters_of_a_type(bases, tmp_path, name):
    """Each of two is exact, the active one is active again, and each can be loaded alone."""
    case = CASES[name]
    model = peftstate.get_peft_model(bases(case), case.make())
    disturb(model)
    first = run(model, case)
    old = list(model.parameters())
    model.add_adapter("second", case.make())
    model.set_adapter("second")
    disturb(model, but=old, seed=2)
    second = run(model, case)
    assert not torch.equal(first, second)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(bases(case), tmp_path)
    assert loaded.active_adapters == ["second"]
    assert torch.equal(run(loaded, case), second)
    loaded.set_adapter("default")
    assert torch.equal(run(loaded, case), first)
    alone = peftstate.PeftModel.from_pretrained(bases(case), tmp_path / "second")
    assert torch.equal(run(alone, case), second)
    alone.load_adapter(tmp_path, "first")
    alone.set_adapter("first")
    assert torch.equal(run(alone, case), first)


def reads_empty_tensors() -> bool:
    """Whether safetensors reads what it writes of the layers that AdaLoRA leaves no rank."""
    try:
        load(save({"lora_A": torch.empty(0, 64)}))
    except ValueError:
        return False
    return True


# PEFT, of a rank pattern that AdaLoRA itself made
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("ranks", [3, 2] if reads_empty_tensors() else [3])
def test_adalora_after_it_cut_its_ranks(bases, tmp_path, ranks):
    """PEFT saves the ranks that are left; here all come back, to be trained as before."""
    case = layers(
        "AdaLoraConfig", init_r=4, target_r=ranks, tinit=1, tfinal=2, deltaT=1, total_step=6
    )
    model = peftstate.get_peft_model(bases(case), case.make())
    disturb(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 6):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    logits = run(model, case)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(bases(case), tmp_path)
    pattern = loaded.peft_config["default"].rank_pattern.values()
    assert any(not all(kept) for kept in pattern)
    assert any(not any(kept) for kept in pattern) == (ranks == 2)  # a layer without any
    assert {name: tensor.shape for name, tensor in loaded.named_parameters()} == shapes
    assert torch.equal(run(loaded, case), logits)
    assert peftstate.verify(loaded, tmp_path).ok
