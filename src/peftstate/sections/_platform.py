"""Where a model runs: what decides the last bits of its results beside the model itself."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "flash-attn",
    "kernels",
    "liger-kernel",
    "peft",
    "safetensors",
    "torch",
    "transformers",
    "trl",
    "unsloth",
)
"""Distributions whose version is recorded if they are installed."""


def versions() -> dict[str, str]:
    """The versions of what is installed of `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def accelerators() -> tuple[str, ...]:
    """The names of the accelerators, in the order of their indices."""
    import torch

    for backend in (torch.cuda, torch.xpu):
        if backend.is_available():
            return tuple(
                f"{index}: {backend.get_device_name(index)}"
                for index in range(backend.device_count())
            )
    return ()


def processor() -> str:
    """The processor and the instructions of it that torch uses: ``"AMD EPYC 9R14, AVX512"``."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
