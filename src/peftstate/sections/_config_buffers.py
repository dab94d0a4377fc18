"""Buffers of the base model that its config gives and no checkpoint holds, such as RoPE's.

They come out the same whenever the model is made, but for the last bits on another device, so they
are not compared. Something may have written to them all the same: a cast of the whole model to a
narrower dtype and back rounds them for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftstate.sections._tensors import is_lossless, is_readable

if TYPE_CHECKING:
    import torch

    from peftstate.sections._view import ModelView
    from peftstate.sections._walk import TensorSite


def config_buffers(view: ModelView) -> dict[str, TensorSite]:
    """The floating-point ones by name, but for those that running the model computes again."""
    return {
        site.name: site
        for site in view.tensors()
        if site.part == "base"
        and not site.persistent
        and site.tensor.is_floating_point()
        and is_readable(site.tensor)
        and not _is_computed_again(site.module)
    }


def _is_computed_again(module: Any) -> bool:
    """Whether a RoPE fits its frequencies to the length of what it is run on.

    What they are now and what they would be reset to is more than its buffers
    (`transformers/modeling_rope_utils.py::dynamic_rope_update`).
    """
    rope_type = getattr(module, "rope_type", None)
    types = rope_type.values() if isinstance(rope_type, Mapping) else [rope_type]
    return any("dynamic" in str(each) or each == "longrope" for each in types)


def is_rounded(tensor: torch.Tensor) -> bool:
    """Whether a tensor was in a narrower dtype before, as far as its values tell.

    Those of bf16 or fp16 hold them all, and there are others among them than integers and powers of
    two, which may well have been meant.
    """
    import torch

    if tensor.element_size() <= torch.float16.itemsize:
        return False
    values = tensor.detach()
    if not any(is_lossless(values, dtype) for dtype in ("bfloat16", "float16")):
        return False
    values = values[values.isfinite()]
    is_power = values.frexp().mantissa.abs() == 0.5  # noqa: PLR2004 - of a power of two
    return not bool((is_power | (values == values.round())).all())
