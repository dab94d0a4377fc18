"""``peftstate base-args``: how the base model of an adapter is to be loaded."""

from __future__ import annotations

from typing import Any

from peftstate._diff import Json
from peftstate._files import read_manifest
from peftstate.cli._terminal import AsJson, Source, errors_end_the_program, out, print_json


def base_args(source: Source, *, as_json: AsJson = False) -> None:
    """Print the call that loads an adapter's base model as it was when the adapter was saved."""
    with errors_end_the_program():
        manifest = read_manifest(source)

        from peftstate._rebuilding import base_model_kwargs

        kwargs = base_model_kwargs(manifest)
    if as_json:
        print_json({name: _to_json(value) for name, value in kwargs.items()})
        return
    record = manifest.sections["base_model"]
    arguments = [repr(record.name or "BASE_MODEL")]
    arguments += [f"{name}={_to_code(value)}" for name, value in kwargs.items()]
    body = "".join(f"    {argument},\n" for argument in arguments)
    out.print(f"{record.model_class}.from_pretrained(\n{body})", markup=False)


def _to_json(value: Any) -> Json:
    """An argument as JSON: dtypes by their names, a quantization config by its fields."""
    from peftstate.sections._quantization_config import to_json

    return to_json(value)


def _to_code(value: Any) -> str:
    """An argument as Python code."""
    import torch
    from transformers import BitsAndBytesConfig

    if isinstance(value, BitsAndBytesConfig):
        fields = value.to_diff_dict()
        ignored = {"quant_method"} | {name for name in fields if name.startswith("_")}
        shown = {name: field for name, field in fields.items() if name not in ignored}
        inner = ", ".join(f"{name}={field!r}" for name, field in shown.items())
        return f"BitsAndBytesConfig({inner})"
    return str(value) if isinstance(value, torch.dtype) else repr(value)
