"""MLflow: a pipeline on a quantized base model comes back on it, or with an error that says why."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers

import peftstate
from tests._tokenizers import llama_for_text, make_tokenizer

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
pytest.importorskip("mlflow", reason="MLflow is tested with the newest versions only")

with warnings.catch_warnings(action="ignore"):  # of its own type hints
    import mlflow.pyfunc
    import mlflow.transformers
    from mlflow.transformers import model_io

from peftstate.integrations.mlflow import register

PAGE = Path(__file__).parents[2] / "docs" / "mlflow.md"
PATCHED = (
    (mlflow.transformers, "save_model"),
    (mlflow.transformers, "_load_model"),
    (mlflow.transformers, "get_model_with_peft_adapter"),
    (model_io, "_load_model"),
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is in maintenance mode:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Saving transformers models:UserWarning"),
]


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path):
    """MLflow as it is without us, with a store of its own for each test."""
    for module, name in PATCHED:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path / "mlruns")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a base model with its tokenizer."""
    folder = tmp_path_factory.mktemp("mlflow-base")
    llama_for_text().save_pretrained(folder)
    names = ["input_ids", "attention_mask"]
    make_tokenizer(model_input_names=names).save_pretrained(folder)
    return folder


@pytest.fixture
def components(base, load_base):
    """Makes what is logged, as code does that never heard of peftstate: `components(kind)`."""

    def make(kind):
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(load_base(kind, base), config).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        return {"model": model, "tokenizer": tokenizer}

    return make


def save(components, path, base, **options):
    """Save an artifact that refers to a base model."""
    mlflow.transformers.save_model(
        components,
        path,
        task="text-generation",
        base_model_path=str(base),
        pip_requirements=["torch"],
        **options,
    )


def test_what_it_loses_by_itself(components, base, tmp_path):
    """Without us, the base model comes back in full precision, and nothing says so."""
    made = components("nf4")
    save(made, tmp_path / "artifact", base)
    loaded = mlflow.transformers.load_model(str(tmp_path / "artifact")).model
    assert getattr(loaded.config, "quantization_config", None) is None


def test_a_logged_pipeline_comes_back_as_it_was(components, base, logits):
    """`log_model` and `load_model`: 4-bit again, and the same logits to the last bit."""
    register()
    register()
    made = components("nf4")
    expected = logits(made["model"])
    with mlflow.start_run():
        logged = mlflow.transformers.log_model(
            made,
            name="adapter",
            task="text-generation",
            base_model_path=str(base),
            pip_requirements=["torch"],
        )
    loaded = mlflow.transformers.load_model(logged.model_uri)
    assert isinstance(loaded.model, peftstate.PeftModelForCausalLM)
    assert loaded.model.config.quantization_config.load_in_4bit
    assert torch.equal(logits(loaded.model), expected)


def test_pyfunc_comes_back_as_it_was(components, base, tmp_path):
    """The generic flavor, which servers load, goes through the same load."""
    register()
    made = components("nf4")
    options = {"max_new_tokens": 5, "do_sample": False}
    save(made, tmp_path / "artifact", base, model_config=options)
    served = mlflow.pyfunc.load_model(str(tmp_path / "artifact"))
    pipeline = transformers.pipeline("text-generation", **made)
    expected = pipeline("An old clock", **options)[0]["generated_text"]
    assert served.predict(["An old clock"]) == [expected]


@pytest.mark.parametrize("device", [-1, "cpu"])
def test_a_device_is_taken(device, components, base, tmp_path, logits):
    """With one, MLflow would try to load the base model with fewer arguments."""
    register()
    made = components("nf4")
    expected = logits(made["model"])
    save(made, tmp_path / "artifact", base)
    loaded = mlflow.transformers.load_model(str(tmp_path / "artifact"), device=device)
    assert torch.equal(logits(loaded.model), expected)


def test_another_base_model_is_refused(components, base, load_base, tmp_path):
    """Base models that changed since are an error, unless it was said to be none."""
    register()
    save(components("bf16"), tmp_path / "artifact", base)
    other = load_base("bf16", base)
    other.lm_head.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(peftstate.errors.BaseModelMismatchError):
        mlflow.transformers.load_model(
            str(tmp_path / "artifact"), base_model_path=str(tmp_path / "other")
        )


def test_weights_that_mlflow_wrote_itself_are_refused(components, tmp_path):
    """For a base model in a folder MLflow saves its weights, under the names of PEFT's layers.

    transformers does not find them again, and makes up new ones.
    """
    register()
    path = tmp_path / "artifact"
    made = components("bf16")
    mlflow.transformers.save_model(made, path, task="text-generation", pip_requirements=["torch"])
    with pytest.raises(peftstate.errors.BaseModelMismatchError):
        mlflow.transformers.load_model(str(path))
    recovered = peftstate.AutoPeftModelForCausalLM.from_pretrained(path / "peft")
    assert peftstate.verify(recovered, path / "peft").ok


def test_an_artifact_without_a_manifest_loads_with_a_warning(components, base, tmp_path):
    """As MLflow alone loads it."""
    save(components("bf16"), tmp_path / "artifact", base)
    register()
    with pytest.warns(peftstate.errors.MissingManifestWarning):
        mlflow.transformers.load_model(str(tmp_path / "artifact"))


def test_the_page(components, base, tmp_path, monkeypatch):
    """What docs/mlflow.md shows is what happens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names = components("nf4")
    exec(block, names)  # noqa: S102 - the page's own code
    assert isinstance(names["pipeline"].model, peftstate.PeftModel)


def test_options_are_checked():
    """What `on_mismatch` cannot mean is refused before anything is wrapped."""
    with pytest.raises(ValueError, match="there is no section 'weights'"):
        register(on_mismatch={"weights": "warn"})
    assert not hasattr(mlflow.transformers.save_model, "__wrapped__")
