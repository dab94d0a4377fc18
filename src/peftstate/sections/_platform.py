"""Where a model runs: what decides the last bits of its results beside the model itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from peftstate._digest import json_digest
from peftstate.sections import _flags

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

VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DISABLE_ADDMM_CUDA_LT",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "FLASH_ATTENTION_DETERMINISTIC",
    "HIPBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_TUNABLEOP_ENABLED",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_BLAS_PREFER_HIPBLASLT",
)
"""Environment variables that decide which kernels run, or how they round. Libraries read them when
they start, so that setting them later is of no use."""


@cache
def versions() -> Mapping[str, str]:
    """The versions of what is installed of `PACKAGES`; to ask for them reads files."""
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
    lines = cpuinfo.read_text("utf-8", "replace").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def variables() -> dict[str, str]:
    """The environment variables of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def key(kinds: Collection[str]) -> str:
    """A digest that is the same where the same computation gives the same bits.

    Args:
        kinds: The kinds of device that it runs on.
    """
    import torch

    on_cpu = [processor(), torch.get_num_threads()] if "cpu" in kinds else None
    facts = [sorted(kinds), versions(), torch.version.cuda, accelerators(), on_cpu, variables()]
    return json_digest([*facts, _flags.read()])
