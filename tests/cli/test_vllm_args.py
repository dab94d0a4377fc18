"""``peftstate vllm-args``: a manifest as the arguments of vLLM, or the field it cannot serve."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import peft
import pytest
import torch
from typer.testing import CliRunner

import peftstate
from peftstate._vllm_args import engine_arguments
from peftstate.cli.app import app
from peftstate.errors import NotServableError
from tests._tokenizers import make_tokenizer


def run(*arguments):
    """Run the program in this process."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["vllm-args", *map(str, arguments)])


def save(model, folder, **options):
    """Save a model, and give the folder."""
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def adapter(load_base, with_lora, tmp_path):
    """An adapter of rank 4 on a base model in float32."""
    return save(with_lora(load_base()), tmp_path / "poet")


def test_command(adapter, causal_lm):
    """The command is one line that a shell takes apart as it was meant."""
    result = run(adapter, "--base", causal_lm)
    assert result.exit_code == 0, result.output
    assert shlex.split(result.stdout) == [
        *("vllm", "serve", str(causal_lm)),
        *("--dtype", "float32"),
        "--enable-lora",
        *("--max-lora-rank", "8"),
        *("--lora-dtype", "auto"),
        *("--lora-modules", f"poet={adapter}"),
    ]


def test_json(adapter, causal_lm):
    """For other programs, the arguments one by one, with what is to be known beside them."""
    found = json.loads(run(adapter, "--base", causal_lm, "--name", "p", "--json").stdout)
    assert found["arguments"][0] == str(causal_lm)
    assert found["arguments"][-1] == f"p={adapter}"
    assert shlex.split(found["command"]) == ["vllm", "serve", *found["arguments"]]
    assert found["notes"] == []


def test_base_that_has_a_name_only(adapter):
    """A base model that was loaded from a folder is asked for, since only its name is recorded."""
    assert engine_arguments(adapter).notes == (
        "the manifest has no more than the base model's name; say with --base where it is",
    )


def test_half_precision(load_base, with_lora, tmp_path):
    """Base model and adapter are computed in the dtypes that they were saved in."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peftstate.get_peft_model(load_base("bf16"), config, autocast_adapter_dtype=False)
    folder = save(model, tmp_path / "a")
    found = engine_arguments(folder, base="base")
    assert found.options["--dtype"] == found.options["--lora-dtype"] == "bfloat16"
    assert found.notes == ()


def test_adapter_in_a_dtype_that_vllm_lacks(load_base, with_lora, tmp_path):
    """PEFT keeps adapters in float32, which vLLM cannot: it is said that they are rounded."""
    folder = save(with_lora(load_base("bf16")), tmp_path / "a")
    found = engine_arguments(folder, base="base")
    assert found.options["--lora-dtype"] == "auto"
    assert found.notes == ("the adapter was in float32; vLLM rounds it to bfloat16",)


def test_highest_rank(load_base, with_lora, tmp_path):
    """The rank is that of the layer with the highest, rounded up to one that vLLM takes."""
    folder = save(with_lora(load_base(), rank_pattern={"q_proj": 33}), tmp_path / "a")
    assert engine_arguments(folder).options["--max-lora-rank"] == "64"


def test_tokenizer_beside_the_adapter(load_base, with_lora, tmp_path):
    """The tokenizer that lies beside the adapter is the one that vLLM is told to take."""
    folder = save(with_lora(load_base()), tmp_path / "a", tokenizer=make_tokenizer())
    assert engine_arguments(folder, base="base").options["--tokenizer"] == str(folder)
    (folder / "tokenizer_config.json").unlink()
    found = engine_arguments(folder, base="base")
    assert "--tokenizer" not in found.options
    assert found.notes == ("the tokenizer is not beside the adapter; vLLM takes the base model's",)


def test_names_that_the_short_form_cannot_hold(adapter):
    """An adapter's name with an equals sign in it is passed as JSON."""
    found = engine_arguments(adapter, name="a=b").options["--lora-modules"]
    assert json.loads(found) == {"name": "a=b", "path": str(adapter)}


LORA = "adapters.adapters.default."
REFUSED = {
    "config.use_dora": ({"use_dora": True}, "vLLM has no DoRA"),
    "config.bias": ({"bias": "lora_only"}, "vLLM takes no biases from an adapter"),
    "config.lora_bias": (
        {"lora_bias": True, "target_modules": ["q_proj"]},
        "vLLM has no biases in LoRA",
    ),
    "config.modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        "vLLM takes no whole layers from an adapter of a language model",
    ),
    "config.trainable_token_indices": (
        {"trainable_token_indices": [5]},
        "vLLM passes over trained tokens",
    ),
    "config.init_lora_weights": (
        {"init_lora_weights": "olora"},
        "'olora' rewrites the base model's weights",
    ),
    "config.r": ({"r": 513}, "vLLM takes ranks up to 512, and this is 513"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_refused(field, load_base, with_lora, tmp_path):
    """What vLLM lacks is an error that names the field, whether vLLM itself would notice or not."""
    config, reason = REFUSED[field]
    folder = save(with_lora(load_base(), **config), tmp_path / "a")
    with pytest.raises(NotServableError) as caught:
        engine_arguments(folder)
    assert caught.value.field == LORA + field
    assert str(caught.value) == (
        f"{folder}: {LORA}{field}: {reason}. To use it, merge the adapter into the base model and "
        "serve that, or serve it with transformers."
    )
    result = run(folder)
    assert result.exit_code == 1
    assert result.stdout == ""


def test_embeddings_saved_with_the_adapter(load_base, with_lora, tmp_path):
    """Embeddings in the adapter's file, which vLLM skips without a word, are an error."""
    model = with_lora(load_base(), target_modules=["q_proj"])
    folder = save(model, tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(NotServableError, match="embeddings_saved: vLLM passes over embeddings"):
        engine_arguments(folder)


def test_scaling_set_by_hand(load_base, with_lora, tmp_path):
    """A factor that does not follow from the config, which is all that vLLM reads, is an error."""
    model = with_lora(load_base(), alpha_pattern={"q_proj": 3}, rank_pattern={"q_proj": 2})
    assert engine_arguments(save(model, tmp_path / "a")).options["--max-lora-rank"] == "8"
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["default"] = 0.7
    with pytest.raises(NotServableError, match=r"default\.scaling: it was set by hand"):
        engine_arguments(save(model, tmp_path / "b"))


def test_changed_base_model(load_base, with_lora, tmp_path):
    """A base model that is not as its checkpoint has it is not the one that vLLM loads."""
    model = with_lora(load_base())
    with torch.no_grad():
        model.base_model.model.model.norm.weight.mul_(2)
    folder = save(model, tmp_path / "a")
    with pytest.raises(NotServableError, match=r"base_model.changed: model.norm.weight, one of 1"):
        engine_arguments(folder)


def test_other_adapters_than_lora(load_base, tmp_path):
    """vLLM serves LoRA only."""
    config = peft.IA3Config(
        target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    )
    folder = save(peftstate.get_peft_model(load_base(), config), tmp_path / "a")
    with pytest.raises(NotServableError, match="peft_type: vLLM serves LoRA only, and this is IA3"):
        engine_arguments(folder)


def test_bitsandbytes(load_base, with_lora, tmp_path):
    """bitsandbytes needs a package more, which the error names; with it vLLM is told the method."""
    folder = save(with_lora(load_base("nf4")), tmp_path / "a")
    result = run(folder)
    assert result.exit_code == 1
    assert "Install vllm-bnb-plugin where vLLM runs, and say so with --bitsandbytes-plugin." in (
        result.stderr
    )
    found = engine_arguments(folder, has_bitsandbytes=True)
    assert found.options["--quantization"] == "bitsandbytes"
    assert found.options["--dtype"] == "bfloat16"


def test_no_manifest(tmp_path):
    """A folder without a manifest has its own exit code."""
    assert run(tmp_path).exit_code == 3


def test_without_torch(adapter):
    """Neither torch nor vLLM is imported."""
    code = (
        "import sys; from peftstate._vllm_args import engine_arguments; "
        f"print(engine_arguments({str(adapter)!r}).command); "
        "assert not {'torch', 'numpy', 'vllm', 'peft'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("vllm serve ")
