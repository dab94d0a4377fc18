"""LoRA in all its variants, on bases of every dtype and quantization, alone and among others."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, prepare_model_for_kbit_training
from peft.tuners.lora import config as lora_config
from peft.tuners.tuners_utils import BaseTuner

import peftstate
from peftstate.errors import SaveError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        ":peftstate.errors.TrainModeWarning",
        # of PEFT, on embeddings
        "Setting `save_embedding_layers` to `True`:UserWarning",
        "Model (has|with) `tie_word_embeddings=True`:UserWarning",
        "Input and output embeddings are no longer tied:UserWarning",
        # of PEFT, of layers that are not adapted
        "fan_in_fan_out is set to False:UserWarning",
        "Unsupported layer type:UserWarning",
        # of older releases of PEFT, of models that are no checkpoint's
        "Could not find a config file in:UserWarning",
    )
]

IDS = torch.arange(4, 16).reshape(2, 6)


def variant(**fields: Any) -> dict[str, Any]:
    """A LoRA config, less what all have in common."""
    return fields


def upstream(name: str, **fields: Any) -> Any:
    """A config for a variant that older releases of PEFT do not have."""
    return getattr(lora_config, name)(**fields) if hasattr(lora_config, name) else None


FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}
"""The fields that LoRA has in the PEFT that is installed."""
TELLS_ADAPTERS_APART = hasattr(BaseTuner, "_get_adapter_state_dict")
"""Whether PEFT knows which tensors are an adapter's by where they are, not by their names, in which
older releases take one adapter, or the name of a module, for another."""


def known(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The variants that the PEFT that is installed has."""
    return {name: fields for name, fields in variants.items() if fields.keys() <= FIELDS}


UNTIED = {
    "plain": variant(),
    "DoRA": variant(use_dora=True),
    "DoRA on embeddings": variant(use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "rsLoRA": variant(use_rslora=True),
    "rsLoRA and DoRA on all layers": variant(
        use_rslora=True, use_dora=True, target_modules="all-linear", modules_to_save=["lm_head"]
    ),
    "biases of LoRA": variant(lora_bias=True),
    "all biases": variant(bias="all"),
    "biases of adapted layers": variant(bias="lora_only"),
    "patterns": variant(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
    "a regular expression": variant(target_modules=r".*\.1\..*q_proj"),
    "some layers": variant(layers_to_transform=[1]),
    "dropout": variant(lora_dropout=0.3),
    "parameters": variant(target_modules=None, target_parameters=["mlp.gate_proj.weight"]),
    "tokens": variant(trainable_token_indices=[8, 9]),
    "tokens of both embeddings": variant(
        trainable_token_indices={"embed_tokens": [8, 9], "lm_head": [9, 10]}
    ),
    "a copy of the embeddings": variant(modules_to_save=["embed_tokens"]),
    "a copy of the head": variant(modules_to_save=["lm_head"]),
    "copies of both": variant(modules_to_save=["embed_tokens", "lm_head"]),
    "a copy of the norm": variant(modules_to_save=["norm"]),
    "on embeddings": variant(target_modules=["embed_tokens", "q_proj"]),
    "on embeddings and head": variant(target_modules=["embed_tokens", "lm_head"]),
    "layers replicated": variant(layer_replication=[(0, 2), (1, 2)]),
    "layers in another order": variant(layer_replication=[(1, 2), (0, 2)]),
    "initialised at random": variant(init_lora_weights=False),
    "initialised from a normal distribution": variant(init_lora_weights="gaussian"),
    "initialised orthogonally": variant(init_lora_weights="orthogonal"),
    "MiCA": variant(init_lora_weights="mica"),
    "aLoRA": variant(alora_invocation_tokens=[10, 11]),
    "BD-LoRA": variant(
        use_bdlora=upstream(
            "BdLoraConfig",
            target_modules_bd_a=["q_proj"],
            target_modules_bd_b=["v_proj"],
            nblocks=2,
        )
    ),
    "KaSA": variant(kasa_config=upstream("KasaConfig")),
    "MonteCLoRA": variant(monteclora_config=upstream("MontecloraConfig")),
    "VeLoRA": variant(velora_config=upstream("VeloraConfig", num_groups=8)),
}
TIED = {
    "plain": variant(),
    "tokens": variant(trainable_token_indices=[8, 9]),
    "a copy of the embeddings": variant(modules_to_save=["embed_tokens"]),
    "a copy of the head": variant(modules_to_save=["lm_head"]),
    "copies of both": variant(modules_to_save=["embed_tokens", "lm_head"]),
    "one copy for both": variant(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "on embeddings": variant(target_modules=["embed_tokens", "q_proj"]),
    "on the head": variant(target_modules=["lm_head"]),
    "one adapter for both": variant(
        target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
    ),
}


UNTIED, TIED = known(UNTIED), known(TIED)
if not TELLS_ADAPTERS_APART:
    for name in ("MiCA", "tokens of both embeddings"):
        del UNTIED[name]


def disturb(model: Any, dtype: torch.dtype | None = None) -> None:
    """Have every trainable weight matter, as after training; in a dtype, if one is given."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data += noise.to(parameter.dtype)
            parameter.data = parameter.data.to(dtype or parameter.dtype)


@pytest.fixture
def exact(logits, tmp_path):
    """Saves a model and asserts that it comes back: `exact(model, base)` returns the loaded one."""

    def check(model: Any, base: Any, **keywords: Any) -> Any:
        before = model.eval(), logits(model)
        model.save_pretrained(tmp_path, **keywords)
        assert torch.equal(logits(model), before[1])
        torch.manual_seed(7)
        inference = peftstate.PeftModel.from_pretrained(base(), tmp_path, is_trainable=False)
        assert torch.equal(logits(inference), before[1])
        loaded = peftstate.PeftModel.from_pretrained(base(), tmp_path)
        assert peftstate.verify(loaded, tmp_path).ok
        assert {name: (p.dtype, p.requires_grad) for name, p in loaded.named_parameters()} == {
            name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()
        }
        assert torch.equal(logits(loaded), before[1])
        return loaded

    return check


def wrap(base: Any, **fields: Any) -> Any:
    """Wrap a base model in LoRA, in eval mode."""
    fields = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        **fields,
    }
    return peftstate.get_peft_model(base, LoraConfig(**fields))


@pytest.mark.parametrize("name", UNTIED)
def test_variants(load_base, exact, logits, name):
    """Each variant comes back, and merges into the same weights as before."""
    base = load_base()
    unadapted = logits(base)
    model = wrap(base, **UNTIED[name])
    disturb(model)
    assert (logits(model.eval()) - unadapted).abs().max() > 1e-3
    loaded = exact(model, load_base)
    if name != "aLoRA":  # which cannot be merged
        merged = loaded.merge_and_unload()
        assert torch.equal(logits(merged), logits(model.merge_and_unload()))


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(load_base, tied_lm, exact, logits, name):
    """Embeddings that are tied in the base model come back tied, or apart, as they were."""

    def base() -> Any:
        return load_base(path=tied_lm)

    model = wrap(base(), **TIED[name])
    disturb(model)
    loaded = exact(model, base)
    assert torch.equal(logits(loaded.merge_and_unload()), logits(model.merge_and_unload()))


if "one adapter for both" in TIED:

    def test_tied_adapters_share_their_memory_after_a_load(load_base, tied_lm, exact):
        """Where LoRA ties the adapters of tied embeddings, training one trains the other."""

        def base() -> Any:
            return load_base(path=tied_lm)

        model = wrap(base(), **TIED["one adapter for both"])
        disturb(model)
        loaded = exact(model, base)
        tensors = dict(loaded.named_parameters())
        head = tensors["base_model.model.lm_head.lora_A.default.weight"]
        embedding = tensors["base_model.model.model.embed_tokens.lora_embedding_B.default"]
        assert head.data_ptr() == embedding.data_ptr()


@pytest.mark.parametrize("adapter", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(load_base, exact, dtype, adapter):
    """An adapter in any dtype on a base in any dtype; `None` is the dtype that PEFT chooses."""

    def base() -> Any:
        return load_base(dtype=dtype)

    model = wrap(base(), use_dora=True, trainable_token_indices=[8, 9])
    disturb(model, adapter)
    exact(model, base)


@pytest.mark.parametrize("adapter", [None, torch.bfloat16])
@pytest.mark.parametrize("is_prepared", [False, True], ids=["as loaded", "prepared"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("nf4", variant()),
        ("int8", variant()),
        ("nf4", variant(use_dora=True)),
        ("nf4", variant(trainable_token_indices=[8, 9])),
        ("int8", variant(trainable_token_indices=[8, 9])),
        ("nf4", variant(target_modules="all-linear", bias="all")),
        ("int8", variant(target_modules="all-linear", bias="all")),
    ],
    ids=str,
)
def test_quantized_bases(  # noqa: PLR0917
    load_base, exact, logits, kind, fields, is_prepared, adapter
):
    """On 4-bit and 8-bit bases that have run, also after `prepare_model_for_kbit_training`."""
    base = load_base(kind)
    if is_prepared:
        base = prepare_model_for_kbit_training(base)
    model = wrap(base, **fields)
    disturb(model, adapter)
    logits(model.eval())  # packs the weights of 4-bit layers
    exact(model, lambda: load_base(kind))


def test_dora_on_8_bit(load_base, logits, tmp_path):
    """PEFT runs DoRA over 8-bit layers only once, which is enough to compare."""
    model = wrap(load_base("int8"), use_dora=True).eval()
    disturb(model)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base("int8"), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("is_prepared", [False, True], ids=["as loaded", "prepared"])
def test_a_head_in_fp32_over_a_quantized_base(load_base, exact, kind, is_prepared):
    """A copied head keeps its dtype; PEFT rounds it to that of the base (peft#1815)."""
    base = load_base(kind)
    if is_prepared:
        base = prepare_model_for_kbit_training(base)
    model = wrap(base, modules_to_save=["lm_head"])
    disturb(model)
    exact(model, lambda: load_base(kind))


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"], []])
def test_several_adapters(load_base, exact, logits, tmp_path, active):
    """All adapters come back, those active that were, and each can be loaded alone."""
    model = wrap(load_base(), use_dora=True)
    second = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_alpha=3)
    model.add_adapter("second", second)
    model.requires_grad_(requires_grad=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(requires_grad=True)
    disturb(model)
    model.base_model.set_adapter(active)
    loaded = exact(model, load_base)
    assert loaded.active_adapters == active
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        model.set_adapter(name)
        alone = peftstate.PeftModel.from_pretrained(load_base(), folder, adapters=[])
        alone.set_adapter("default")
        assert torch.equal(logits(alone.eval()), logits(model))


def test_adapters_of_which_none_is_called_default(load_base, logits, tmp_path):
    """Each lies in its own folder, which is complete."""
    model = peftstate.get_peft_model(
        load_base(), LoraConfig(target_modules=["q_proj"]), adapter_name="one"
    )
    model.add_adapter("two", LoraConfig(target_modules=["v_proj"]))
    model.set_adapter("two")
    disturb(model)
    model.eval()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "peftstate.json").exists()
    for name in ("one", "two"):
        model.set_adapter(name)
        loaded = peftstate.PeftModel.from_pretrained(
            load_base(), tmp_path / name, adapter_name=name
        )
        assert list(loaded.peft_config) == [name]
        assert torch.equal(logits(loaded.eval()), logits(model))


if TELLS_ADAPTERS_APART:
    # PEFT, of what it left out of its file
    @pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
    @pytest.mark.parametrize("name", ["mlp", "self_attn", "layers", "base_model", "lora_A", "0"])
    def test_adapter_names_that_are_names_of_modules(load_base, logits, tmp_path, name):
        """PEFT takes the tensors of one adapter for those of the other; nothing is lost here."""
        fields = {"modules_to_save": ["lm_head"], "init_lora_weights": False}
        model = wrap(load_base(), target_modules=["q_proj", "down_proj"], **fields)
        model.add_adapter(name, LoraConfig(target_modules=["q_proj", "down_proj"], **fields))
        model.eval()
        model.save_pretrained(tmp_path)
        torch.manual_seed(7)
        loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
        alone = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / name)
        for adapter in ("default", name):
            model.set_adapter(adapter)
            loaded.set_adapter(adapter)
            assert torch.equal(logits(loaded), logits(model))
        assert torch.equal(logits(alone), logits(model))

    def test_an_adapter_name_that_peft_cannot_save(load_base, tmp_path):
        """A copied layer whose parameters bear the adapter's name is refused with our own error."""
        model = wrap(load_base(), modules_to_save=["lm_head"])
        model.add_adapter("weight", LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(SaveError, match="weight"):
            model.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("embeddings", [True, "auto", False])
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_embeddings_in_the_file(load_base, exact, target, embeddings):
    """Whether or not PEFT writes the embeddings into the adapter's file, they come back."""
    model = wrap(load_base("bf16"), target_modules=[target])
    disturb(model)
    exact(model, lambda: load_base("bf16"), save_embedding_layers=embeddings)


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_resized_embeddings(load_base, exact, kind):
    """Rows that were added, and trained, come back on a base that lacks them."""
    base = load_base(kind)
    base.resize_token_embeddings(70, mean_resizing=False)
    model = wrap(base, modules_to_save=["embed_tokens", "lm_head"])
    disturb(model)
    exact(model, lambda: load_base(kind))


def has_fused_experts(model_class: str) -> bool:
    """Whether transformers holds the experts of a model in one parameter."""
    if not hasattr(transformers, model_class):
        return False
    module = importlib.import_module(getattr(transformers, model_class).__module__)
    return hasattr(module, model_class.replace("ForCausalLM", "Experts"))


@pytest.mark.parametrize(
    "model_class",
    [name for name in ("GptOssForCausalLM", "MixtralForCausalLM") if has_fused_experts(name)],
)
def test_experts_of_a_mixture(exact, model_class):
    """`target_parameters` on fused experts, whose layout PEFT converts when it loads."""
    config_class = getattr(transformers, model_class.replace("ForCausalLM", "Config"))

    def base() -> Any:
        torch.manual_seed(0)
        config = config_class(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            head_dim=16,
            initializer_range=0.2,
        )
        return getattr(transformers, model_class)(config).eval()

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = wrap(base(), target_modules=["q_proj"], target_parameters=targets)
    disturb(model)
    exact(model, base)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
    ],
    ids=["plain", "DoRA", "adaption prompt"],
)
def test_gpt2(exact, config):
    """Weights that are stored transposed, and attention layers of another kind."""

    def base() -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2
        )
        return transformers.GPT2LMHeadModel(config).eval()

    model = peftstate.get_peft_model(base(), config)
    disturb(model)
    exact(model, base)


def test_layers_of_other_kinds(logits, tmp_path):
    """Convolutions and norms of a model that is none of transformers."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, 8, 3)
            self.norm = torch.nn.BatchNorm2d(8)
            self.head = torch.nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
            return logits

    config = LoraConfig(target_modules=["conv"], modules_to_save=["head"], use_dora=True)
    model = peftstate.get_peft_model(Model(), config)
    disturb(model)
    images = torch.randn(4, 3, 8, 8)
    model.train()(images)  # BatchNorm counts
    expected = model.eval()(images)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(Model(), tmp_path)
    assert torch.equal(loaded(images), expected)
