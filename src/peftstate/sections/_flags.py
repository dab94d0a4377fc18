"""The settings of torch that hold for a whole process: which there are, how each is read and set.

The table is closed. Nothing but its names and its values can be set from a manifest.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs

from peftstate._diff import Json
from peftstate.sections._tensors import dtype_name, dtype_named

DETERMINISTIC_ALGORITHMS = "deterministic_algorithms"
"""Name of the flag whose values are ``"off"``, ``"warn"`` and ``"error"``."""


@attrs.frozen
class Flag:
    """A setting.

    Attributes:
        read: Gives its value.
        write: Sets it, to a value that `read` gave or that is allowed.
        allowed: The values that a manifest may set.
        synonyms: Values that mean another one.
    """

    read: Callable[[], Json]
    write: Callable[[Any], object]
    allowed: tuple[Json, ...] = (True, False)
    synonyms: Mapping[str, str] = attrs.field(factory=dict)

    def allows(self, value: Json) -> bool:
        """Whether a manifest may set a value; 1 is not `True`."""
        return any(type(value) is type(known) and value == known for known in self.allowed)


@functools.cache
def flags() -> dict[str, Flag]:
    """The flags that this torch has, in the order they are set: TF32 by its old names first."""
    return {**_torch_flags(), **_tf32_flags(), **_cuda_flags(), **_cpu_flags()}


def _torch_flags() -> dict[str, Flag]:
    """The flags of torch itself."""
    import torch
    from torch.utils import deterministic

    return {
        "default_dtype": Flag(
            lambda: dtype_name(torch.get_default_dtype()),
            lambda name: torch.set_default_dtype(dtype_named(name)),
            ("float32", "bfloat16", "float16", "float64"),
        ),
        DETERMINISTIC_ALGORITHMS: Flag(
            _deterministic_algorithms, _set_deterministic_algorithms, ("off", "warn", "error")
        ),
        "fill_uninitialized_memory": _attribute(deterministic, "fill_uninitialized_memory"),
        "float32_matmul_precision": Flag(
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
            ("highest", "high", "medium"),
        ),
    }


def _deterministic_algorithms() -> str:
    """Whether operations must be deterministic, and what those do that cannot be."""
    import torch

    if not torch.are_deterministic_algorithms_enabled():
        return "off"
    return "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "error"


def _set_deterministic_algorithms(value: str) -> None:
    """Set what `_deterministic_algorithms` gives."""
    import torch

    torch.use_deterministic_algorithms(value != "off", warn_only=value == "warn")


def _tf32_flags() -> dict[str, Flag]:
    """How float32 is rounded on the way; torch 2.9 has a flag for each kind of operation."""
    import torch

    kinds = {
        "cuda.matmul": torch.backends.cuda.matmul,
        "cudnn.conv": getattr(torch.backends.cudnn, "conv", None),
        "cudnn.rnn": getattr(torch.backends.cudnn, "rnn", None),
        "mkldnn.matmul": getattr(torch.backends.mkldnn, "matmul", None),
        "mkldnn.conv": getattr(torch.backends.mkldnn, "conv", None),
        "mkldnn.rnn": getattr(torch.backends.mkldnn, "rnn", None),
    }
    return {
        "cudnn.allow_tf32": _attribute(torch.backends.cudnn, "allow_tf32"),
        **{
            f"{name}.fp32_precision": _precision(owner, name)
            for name, owner in kinds.items()
            if hasattr(owner, "fp32_precision")
        },
    }


def _precision(owner: Any, name: str) -> Flag:
    """The rounding of one kind of operation.

    ``"none"`` is the way to have what the whole backend has; what that is, `read` tells.
    """

    def write(value: str) -> None:
        owner.fp32_precision = "none"
        if owner.fp32_precision != value:
            owner.fp32_precision = value

    allowed = ("ieee", "tf32", "bf16") if name.startswith("mkldnn") else ("ieee", "tf32")
    return Flag(lambda: owner.fp32_precision, write, allowed, synonyms={"none": "ieee"})


def _cuda_flags() -> dict[str, Flag]:
    """Which kernels CUDA runs."""
    import torch

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    found = {
        "cudnn.enabled": _attribute(cudnn, "enabled"),
        "cudnn.benchmark": _attribute(cudnn, "benchmark"),
        "cudnn.deterministic": _attribute(cudnn, "deterministic"),
        "cuda.math_sdp": Flag(cuda.math_sdp_enabled, cuda.enable_math_sdp),
        "cuda.flash_sdp": Flag(cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        "cuda.cudnn_sdp": Flag(cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        "cuda.mem_efficient_sdp": Flag(
            cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp
        ),
        "cuda.fp16_bf16_reduction_math_sdp": Flag(
            cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp
        ),
    }
    for dtype in ("fp16", "bf16"):
        name = f"allow_{dtype}_reduced_precision_reduction"
        found[f"cuda.matmul.{name}"] = _reduction(cuda.matmul, name)
    if hasattr(cuda.matmul, "allow_fp16_accumulation"):  # torch 2.7
        found["cuda.matmul.allow_fp16_accumulation"] = _attribute(
            cuda.matmul, "allow_fp16_accumulation"
        )
    return found


def _reduction(matmul: Any, name: str) -> Flag:
    """Whether sums of a matrix product may be in half precision.

    Two settings of torch, of which not every pair is allowed: in half precision (``"reduced"``),
    or else in parts (``"split_k"``), or in one go (``"whole"``). Before torch 2.9 there is no
    ``"whole"``.
    """
    values = {"reduced": (True, True), "split_k": (False, True), "whole": (False, False)}
    has_split_k = hasattr(matmul, f"{name}_split_k")

    def read() -> str:
        pair = getattr(matmul, name), getattr(matmul, f"{name}_split_k", True)
        return next(text for text, known in values.items() if known == pair)

    def write(text: str) -> None:
        setattr(matmul, name, values[text] if has_split_k else values[text][0])

    return Flag(read, write, tuple(values) if has_split_k else ("reduced", "split_k"))


def _cpu_flags() -> dict[str, Flag]:
    """Which kernels run on the CPU, and the fast path of torch's own attention layer."""
    import torch

    mkldnn, mha = torch.backends.mkldnn, torch.backends.mha
    found = {
        "mha.fastpath": Flag(mha.get_fastpath_enabled, mha.set_fastpath_enabled),
        "mkldnn.enabled": _attribute(mkldnn, "enabled"),
    }
    if hasattr(mkldnn, "deterministic"):  # torch 2.6 has it in C++ only
        found["mkldnn.deterministic"] = _attribute(mkldnn, "deterministic")
    return found


def _attribute(owner: Any, name: str) -> Flag:
    """A flag that is an attribute of a module."""
    return Flag(lambda: getattr(owner, name), functools.partial(setattr, owner, name))


def read() -> dict[str, Json]:
    """The values of all flags, synonyms resolved. Nothing is changed, CUDA is not started."""
    table = flags()
    return {name: table[name].synonyms.get(value, value) for name, value in _read().items()}


def _read() -> dict[str, Json]:
    """The values of all flags, as torch has them.

    torch refuses to tell an old setting of TF32 where it disagrees with a new one, which is then
    the one that counts. Some old settings warn when they are read.
    """
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, flag in flags().items():
            try:
                found[name] = flag.read()
            except RuntimeError:
                continue
    return found


@contextmanager
def set_to(values: Mapping[str, Json]) -> Iterator[None]:
    """Set flags in the body, as far as they are in the table; then put all flags back."""
    before = _read()
    try:
        now = read()
        for name, flag in flags().items():
            wanted = values.get(name)
            if name in now and flag.allows(wanted) and wanted != now[name]:
                _write(flag, wanted)
                now = read()
        yield
    finally:
        for name, flag in flags().items():
            if name in before and _read().get(name) != before[name]:
                _write(flag, before[name])


def _write(flag: Flag, value: Json) -> None:
    """Set a flag; some old settings warn when they are set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flag.write(value)
