"""Models that are none of transformers': of diffusers, of timm, and of no library at all."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import peft
import pytest
import torch
from torch import nn

import peftstate
from peftstate.errors import BaseModelMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


def random(*shape: int) -> torch.Tensor:
    """The same random numbers each time, without a trace in the global generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """A model with convolutions, batch norm, an embedding, attention and a persistent buffer."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 2, stride=2)
        self.embed = nn.Embedding(4, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> Any:
        """Classify images."""
        if self.training:
            self.calls.add_(1)
        x = self.down(torch.relu(self.norm(self.conv(x)))).flatten(2).transpose(1, 2)
        x = x + self.embed(torch.arange(x.shape[1]) % 4)
        x = x + self.attention(x, x, x)[0]
        return self.head(torch.relu(self.linear(x)).mean(1))


def unet() -> Any:
    """A small U-Net, as Stable Diffusion has one."""
    diffusers = importlib.import_module("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def run_unet(model: nn.Module) -> Any:
    """What it predicts of noise."""
    inputs = random(2, 4, 8, 8), torch.tensor([1, 500]), random(2, 3, 32)
    return model(*inputs).sample


def transformer() -> Any:
    """A small diffusion transformer, as Flux has one."""
    diffusers = importlib.import_module("diffusers")
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def run_transformer(model: nn.Module) -> Any:
    """What it predicts of noise."""
    return model(
        hidden_states=random(2, 6, 4),
        encoder_hidden_states=random(2, 3, 32),
        pooled_projections=random(2, 32),
        timestep=torch.tensor([0.1, 0.9]),
        img_ids=torch.zeros(6, 3),
        txt_ids=torch.zeros(3, 3),
    ).sample


def timm(name: str, **fields: Any) -> Any:
    """A model of timm, without a checkpoint."""
    models = import_timm()
    if models is None:
        pytest.skip("there is no timm in $PEFTSTATE_TIMM; `make test-wheel` installs it there")
    return models.create_model(name, pretrained=False, num_classes=5, **fields)


@functools.cache
def import_timm() -> Any:
    """Timm, which needs torchvision; or `None`.

    They come from a folder of their own, which no other library sees: the torchvision on PyPI is
    built for CUDA, and beside a torch without CUDA it fails to be imported, and so does all of
    transformers, which imports it if it is there. It only needs the schemas of two operators.
    """
    folder = Path(os.environ.get("PEFTSTATE_TIMM", ".demo/timm")).resolve()
    library = folder / "torchvision" / "_C.so"
    if not library.exists():
        return None
    try:
        torch.ops.load_library(str(library))
    except OSError:
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", schema)
    sys.path.append(str(folder))
    try:
        return importlib.import_module("timm")
    finally:
        sys.path.remove(str(folder))


def run_images(model: nn.Module) -> Any:
    """Scores of two images."""
    return model(random(2, 3, 32, 32))


@attrs.frozen
class Kind:
    """A kind of model.

    Attributes:
        make: Makes one, with random weights.
        run: Runs it on inputs that are always the same.
        targets: The modules that get adapters: of any kind, linear ones first.
        trained: Modules that are trained as a whole.
    """

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Any]
    targets: tuple[str, ...]
    trained: tuple[str, ...] = ()

    def base(self, seed: int = 0) -> nn.Module:
        """A base model: with the same seed the same."""
        torch.manual_seed(seed)
        return self.make().eval()


KINDS = {
    "plain": Kind(Plain, run_images, ("linear", "conv", "down"), ("head",)),
    "diffusers-unet": Kind(unet, run_unet, ("to_q", "to_v", "conv1", "conv_shortcut")),
    "diffusers-transformer": Kind(
        transformer, run_transformer, ("to_q", "proj_mlp"), ("proj_out",)
    ),
    "timm-resnet": Kind(lambda: timm("test_resnet"), run_images, ("fc", "conv2")),
    "timm-vit": Kind(
        lambda: timm("test_vit", img_size=32),
        run_images,
        ("qkv", "fc1", "patch_embed.proj"),
        ("head",),
    ),
}

CONFIGS: dict[str, Callable[[Kind], peft.PeftConfig]] = {
    "lora": lambda kind: peft.LoraConfig(r=2, lora_dropout=0.1, **common(kind)),
    "dora": lambda kind: peft.LoraConfig(r=2, use_dora=True, **common(kind)),
    "rslora-bias": lambda kind: peft.LoraConfig(
        r=2, use_rslora=True, bias="lora_only", **common(kind)
    ),
    "loha": lambda kind: peft.LoHaConfig(r=2, module_dropout=0.1, **common(kind)),
    "lokr": lambda kind: peft.LoKrConfig(r=2, **common(kind)),
    "ia3": lambda kind: peft.IA3Config(feedforward_modules=[], **common(kind)),
    "oft": lambda kind: peft.OFTConfig(r=0, oft_block_size=4, **common(kind, kind.targets[:1])),
    "adalora": lambda kind: peft.AdaLoraConfig(
        total_step=9, target_r=1, init_r=2, **common(kind, kind.targets[:1])
    ),
}


def common(kind: Kind, targets: tuple[str, ...] = ()) -> dict[str, Any]:
    """What all configs have."""
    return {
        "target_modules": list(targets or kind.targets),
        "modules_to_save": list(kind.trained) or None,
    }


def train(model: Any, kind: Kind, steps: int = 3) -> None:
    """Train a model, and leave it in eval mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    model.train()
    for _ in range(steps):
        kind.run(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def output(model: nn.Module, kind: Kind) -> Any:
    """What a model computes, without gradients."""
    with torch.no_grad():
        return kind.run(model)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("model", KINDS)
def test_a_trained_model_comes_back(tmp_path, model, name):
    """After training, a save leaves the model as it was, and a reload is equal to the last bit."""
    kind = KINDS[model]
    saved = peftstate.get_peft_model(kind.base(), CONFIGS[name](kind))
    train(saved, kind)
    expected = output(saved, kind)
    assert not torch.equal(output(kind.base(), kind), expected)

    saved.save_pretrained(tmp_path)
    assert torch.equal(output(saved, kind), expected)

    loaded = peftstate.PeftModel.from_pretrained(kind.base(), tmp_path)
    assert torch.equal(output(loaded, kind), expected)
    assert peftstate.verify(loaded, tmp_path).ok

    inference = peftstate.PeftModel.from_pretrained(kind.base(), tmp_path, is_trainable=False)
    assert not any(parameter.requires_grad for parameter in inference.parameters())
    # Of an input that is not contiguous, a product with a weight that requires a gradient is
    # computed in another way, without gradients, too (ATen's LinearAlgebra.cpp::should_fold).
    saved.requires_grad_(requires_grad=False)
    assert torch.equal(output(inference, kind), output(saved, kind))


@pytest.mark.parametrize("model", KINDS)
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path, model):
    """Trained further, the saved model and the loaded one stay the same, dropout included."""
    kind = KINDS[model]
    saved = peftstate.get_peft_model(kind.base(), CONFIGS["lora"](kind))
    train(saved, kind)
    saved.save_pretrained(tmp_path)
    train(saved, kind, steps=2)

    loaded = peftstate.PeftModel.from_pretrained(kind.base(), tmp_path, is_trainable=True)
    train(loaded, kind, steps=2)
    assert torch.equal(output(loaded, kind), output(saved, kind))


@pytest.mark.parametrize("model", KINDS)
def test_another_base_model_is_refused(tmp_path, model):
    """An adapter does not load onto a model of other weights, which stays as it was."""
    kind = KINDS[model]
    peftstate.get_peft_model(kind.base(), CONFIGS["lora"](kind)).save_pretrained(tmp_path)
    other = kind.base(seed=1)
    expected = output(other, kind)
    with pytest.raises(BaseModelMismatchError):
        peftstate.PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(output(other, kind), expected)
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in other.modules())


@pytest.mark.parametrize("model", ["plain", "timm-resnet"])
def test_running_statistics_come_back(tmp_path, model):
    """Buffers of the base model that training moved are restored, though no adapter has them."""
    kind = KINDS[model]
    saved = peftstate.get_peft_model(kind.base(), CONFIGS["lora"](kind))
    train(saved, kind)
    saved.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(kind.base(), tmp_path)
    pristine = dict(kind.base().named_buffers())
    restored = dict(loaded.get_base_model().named_buffers())
    changed = 0
    for name, buffer in saved.get_base_model().named_buffers():
        assert torch.equal(restored[name], buffer), name
        changed += name in pristine and not torch.equal(buffer, pristine[name])
    assert changed >= 3  # mean, variance, batches


def test_attention_of_torch(tmp_path):
    """LoRA in `nn.MultiheadAttention`, whose projection is a bare parameter, comes back.

    Each forward pass merges the adapter and unmerges it, which rounds the base model's weights, and
    whoever asks for the modules gets new parameters.
    """
    kind = KINDS["plain"]
    config = peft.LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=["attention", "embed"],
        modules_to_save=["head"],
    )
    saved = peftstate.get_peft_model(kind.base(), config)
    train(saved, kind)
    expected = output(saved, kind)
    pristine = kind.base().attention.in_proj_weight
    rounded = saved.get_base_model().attention.get_base_layer().in_proj_weight
    assert not torch.equal(rounded, pristine)
    saved.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(kind.base(), tmp_path)
    assert torch.equal(output(loaded, kind), expected)


@pytest.mark.parametrize("model", KINDS)
def test_several_adapters(tmp_path, model):
    """Adapters of a model come back together, with the one that was active."""
    kind = KINDS[model]
    saved = peftstate.get_peft_model(kind.base(), CONFIGS["lora"](kind))
    saved.add_adapter("other", peft.LoraConfig(r=4, **common(kind)))
    train(saved, kind)
    saved.set_adapter("other")
    train(saved, kind)
    expected = output(saved, kind)
    saved.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(kind.base(), tmp_path)
    assert loaded.active_adapters == ["other"]
    assert torch.equal(output(loaded, kind), expected)
    saved.set_adapter("default")
    loaded.set_adapter("default")
    assert torch.equal(output(loaded, kind), output(saved, kind))
