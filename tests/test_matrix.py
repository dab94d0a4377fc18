"""One fidelity matrix: models, their dtypes and quantizations, dtypes of adapters, and tuners.

`test_tuners.py` has all tuners on a Llama in fp32 and bf16, `test_task_types.py` all tasks. Here
each tuner meets a Llama in fp16, nf4 and int8, and each kind of model each dtype and quantization.
There the dtype of the adapter and the tuner take turns, so that each two of the four dimensions
meet in each of their values, but not all four.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import attrs
import peft
import pytest
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn

import peftstate
from tests.test_tuners import CASES, ONE_OF_EACH, TELLS_ADAPTERS_APART, disturb, run
from tests.test_tuners import pytestmark as warnings_of_tuners

pytestmark = [
    *warnings_of_tuners,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # GPT-2
]

IDS = torch.arange(4, 16).reshape(2, 6)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = (*DTYPES, "nf4", "int8")


def quantization(kind: str, compute: torch.dtype) -> Any:
    """The quantization config of a kind."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=kind == "nf4",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["classifier", "lm_head"],  # which an adapter has a copy of
    )


# All tuners on one model

PEFT_CANNOT: dict[str, set[str]] = {
    "fp16": set(),
    "nf4": {
        *("ADAMSS", "DEFT", "DELORA", "FROD", "GLORA", "HRA", "LOHA", "LOKR", "OSF", "PEANUT"),
        *("PSOFT", "SUPERTUNING", "TINYLORA"),
    },
    "int8": {
        *("ADAMSS", "DELORA", "FROD", "GLORA", "OSF", "PSOFT", "SHIRA", "SUPERTUNING", "TINYLORA"),
    },
}
"""The tuners that PEFT itself does not put on such a model, or cannot run on it."""
if not TELLS_ADAPTERS_APART:  # older releases of PEFT, and transformers 4
    PEFT_CANNOT["nf4"] |= {"BOFT", "PREFIX_TUNING", "SHIRA"}
    PEFT_CANNOT["int8"] |= {"BOFT", "PREFIX_TUNING"}
ON_LLAMA = [
    (name, kind)
    for name in ONE_OF_EACH
    for kind in PEFT_CANNOT
    if name not in PEFT_CANNOT[kind] and name != "XLORA"  # which is made of LoRA
]


@pytest.mark.parametrize(("name", "kind"), ON_LLAMA)
def test_tuner_on_llama(load_base, tmp_path, name, kind):
    """Each comes back on a model in half precision, and on quantized ones with the rest in fp32."""
    case = CASES[name]

    def base() -> Any:
        dtype = DTYPES.get(kind, torch.float32)
        if kind in DTYPES:
            return load_base(dtype=dtype)
        return load_base(kind, dtype=dtype, quantization_config=quantization(kind, dtype))

    model = peftstate.get_peft_model(base(), case.make())
    disturb(model)
    logits = run(model, case)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(model, case), logits)
    loaded = peftstate.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(run(loaded, case), logits)


# All kinds of models


class Plain(nn.Module):
    """A module that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.second = nn.Linear(64, 64, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Two layers."""
        hidden = self.norm(self.first(inputs).relu())
        output: torch.Tensor = self.second(hidden.to(inputs.dtype))
        return output


def load_plain(_: Any, kind: str) -> Plain:
    """A plain module in a dtype, or with the layers of bitsandbytes in it."""
    model = Plain()
    if kind in DTYPES:
        return model.to(DTYPES[kind])
    for name in ("first", "second"):
        layer = getattr(model, name)
        if kind == "nf4":
            quantized: Any = Linear4bit(
                64, 64, bias=layer.bias is not None, quant_type="nf4", compute_dtype=torch.float32
            )
        else:
            quantized = Linear8bitLt(64, 64, bias=layer.bias is not None, has_fp16_weights=False)
        quantized.load_state_dict(layer.state_dict())
        setattr(model, name, quantized.to("cpu"))
    marked: Any = model.eval()  # as transformers marks what it quantized
    marked.is_loaded_in_4bit, marked.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    return model


@attrs.frozen
class Model:
    """A kind of model.

    Attributes:
        targets: The layers that are adapted: all that read the same number of features.
        config: Makes its config; `None` if it is no model of transformers.
        auto_class: The auto class that loads it.
        task: The `peft.TaskType`.
        inputs: What it is run on.
    """

    targets: list[str]
    config: Callable[[], Any] | None = None
    auto_class: str = "AutoModelForCausalLM"
    task: str | None = "CAUSAL_LM"
    inputs: dict[str, torch.Tensor] = attrs.field(factory=lambda: {"input_ids": IDS})


def decoder(config: str, **fields: Any) -> Callable[[], Any]:
    """The config of a decoder, of dimensions that bitsandbytes packs."""
    return lambda: getattr(transformers, config)(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        **fields,
    )


MODELS = {
    "Llama": Model(["q_proj", "v_proj"], decoder("LlamaConfig")),
    "Gemma": Model(["q_proj", "v_proj"], decoder("Gemma3TextConfig", sliding_window=4)),
    "Qwen": Model(["q_proj", "v_proj"], decoder("Qwen3Config")),
    "GPT-2": Model(
        ["c_attn"],
        lambda: transformers.GPT2Config(
            vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2
        ),
    ),
    "BERT": Model(
        ["query", "value"],
        lambda: transformers.BertConfig(
            vocab_size=64,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.2,
        ),
        auto_class="AutoModelForSequenceClassification",
        task="SEQ_CLS",
    ),
    "T5": Model(
        ["q", "v"],
        lambda: transformers.T5Config(
            vocab_size=64, d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2
        ),
        auto_class="AutoModelForSeq2SeqLM",
        task="SEQ_2_SEQ_LM",
        inputs={"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "ViT": Model(
        ["query", "value", "q_proj", "v_proj"],  # their names in transformers 4, and in 5
        lambda: transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=8,
            patch_size=4,
            initializer_range=0.2,
        ),
        auto_class="AutoModelForImageClassification",
        task=None,
        inputs={"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)},
    ),
    "plain": Model(
        ["first", "second"], task=None, inputs={"inputs": torch.linspace(-1, 1, 128).reshape(2, 64)}
    ),
}
TUNERS: dict[str, Callable[[Model], peft.PeftConfig]] = {
    "VeRA": lambda model: peft.VeraConfig(
        task_type=model.task, target_modules=model.targets, r=4, vera_dropout=0.1
    ),
    "LoRA": lambda model: peft.LoraConfig(
        task_type=model.task, target_modules=model.targets, r=4, lora_dropout=0.1
    ),
    "DoRA": lambda model: peft.LoraConfig(
        task_type=model.task, target_modules=model.targets, r=4, use_dora=True
    ),
    "IA3": lambda model: peft.IA3Config(
        task_type=model.task, target_modules=model.targets, feedforward_modules=[]
    ),
}
ADAPTER_DTYPES = ("PEFT's", *DTYPES)


def _can_run(tuner: str, kind: str, dtype: str) -> bool:
    """Whether PEFT can: VeRA casts nothing, and DoRA runs over 8-bit layers only once."""
    return (tuner != "VeRA" or dtype == "PEFT's") and (tuner, kind) != ("DoRA", "int8")


DIMENSIONS = MODELS, KINDS, ADAPTER_DTYPES, TUNERS
Case = tuple[str, ...]


def _pairs(case: Case) -> set[tuple[tuple[int, str], ...]]:
    """What meets what in a case."""
    return set(itertools.combinations(enumerate(case), 2))


def _matrix() -> list[Case]:
    """Each model in each kind, with the dtype and the tuner that it, or the kind, met least."""
    found: list[Case] = []
    met: set[tuple[tuple[int, str], ...]] = set()
    for kind, model in itertools.product(KINDS, MODELS):
        cases = [case for case in itertools.product(*DIMENSIONS) if case[:2] == (model, kind)]
        found.append(
            max(
                (case for case in cases if _can_run(case[3], case[1], case[2])),
                key=lambda case: len(_pairs(case) - met),
            )
        )
        met |= _pairs(found[-1])
    return found


def test_each_two_meet():
    """Of models, kinds, dtypes of adapters and tuners, where PEFT can."""
    possible = [case for case in itertools.product(*DIMENSIONS) if _can_run(case[3], *case[1:3])]
    wanted = set().union(*map(_pairs, possible))
    assert wanted == set().union(*map(_pairs, _matrix()))


@pytest.fixture(scope="module")
def load_model(tmp_path_factory):
    """Loads the base of a model in a kind: `load_model(name, kind)`."""
    folder = tmp_path_factory.mktemp("models")

    def load(name: str, kind: str) -> Any:
        model, path = MODELS[name], folder / name
        if model.config is None:
            return load_plain(path, kind)
        auto = getattr(transformers, model.auto_class)
        if not path.exists():
            torch.manual_seed(0)
            auto.from_config(model.config()).bfloat16().save_pretrained(path)
        dtype = DTYPES.get(kind, torch.float32)
        if kind in DTYPES:
            return auto.from_pretrained(path, dtype=dtype)
        return auto.from_pretrained(
            path, dtype=dtype, quantization_config=quantization(kind, dtype)
        )

    return load


def outputs(model: Any, name: str, kind: str) -> torch.Tensor:
    """What a model says in eval mode."""
    dtype = DTYPES.get(kind, torch.float32)
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in MODELS[name].inputs.items()
    }
    with torch.no_grad():
        found = model.eval()(**inputs)
    result: torch.Tensor = getattr(found, "logits", found)
    return result


@pytest.mark.parametrize(("name", "kind", "dtype", "tuner"), _matrix())
def test_model(load_model, tmp_path, name, kind, dtype, tuner):  # noqa: PLR0917
    """The maximum difference is zero, whatever the model, the kind and the adapter's dtype."""
    base = load_model(name, kind)
    unadapted = outputs(base, name, kind)
    model = peftstate.get_peft_model(base, TUNERS[tuner](MODELS[name]))
    disturb(model)
    for key, parameter in model.named_parameters():
        is_head = "modules_to_save" in key  # which is run as it is
        if parameter.requires_grad and dtype in DTYPES and not is_head:
            parameter.data = parameter.data.to(DTYPES[dtype])
    expected = outputs(model, name, kind)
    assert not torch.equal(expected, unadapted)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(model, name, kind), expected)
    torch.manual_seed(7)
    loaded = peftstate.PeftModel.from_pretrained(load_model(name, kind), tmp_path)
    assert torch.equal(outputs(loaded, name, kind), expected)
    assert {key: value.dtype for key, value in loaded.named_parameters()} == {
        key: value.dtype for key, value in model.named_parameters()
    }
