"""``peftstate adopt``: a manifest for an adapter that was made without peftstate."""

from __future__ import annotations

import warnings
from enum import StrEnum
from typing import Annotated, Any

import typer

from peftstate.cli._terminal import AsJson, errors_end_the_program, out, print_json


class Quantization(StrEnum):
    """How bitsandbytes quantizes a base model."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"
    NONE = "none"


class Dtype(StrEnum):
    """The dtypes that a base model is loaded in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


_QUANTIZATIONS = f"{{{','.join(Quantization)}}}"
_DTYPES = f"{{{','.join(Dtype)}}}"


def adopt(  # noqa: PLR0917 - typer passes options by their names
    adapter: Annotated[str, typer.Argument(metavar="PATH", help="The adapter's folder.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_ID", help="The base model; else what the adapter names."),
    ] = None,
    quantization: Annotated[
        Quantization,
        typer.Option(metavar=_QUANTIZATIONS, help="How bitsandbytes is to quantize it."),
    ] = Quantization.NONE,
    compute_dtype: Annotated[
        Dtype | None, typer.Option(metavar=_DTYPES, help="What 4-bit layers compute in.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(metavar=_DTYPES, help="What the rest of it is loaded in.")
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(metavar="NAME", help="How attention runs, such as eager.")
    ] = None,
    *,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="Have the scales of 4-bit layers quantized too.")
    ] = False,
    prediction_probe: Annotated[
        bool, typer.Option("--prediction-probe", help="Keep what it predicts on a row of ids.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Give an adapter that was made without peftstate a manifest, by loading it as PEFT does.

    State the base model, and how it was loaded for the training: that is what a load will verify.
    The adapter's files stay as they are. What only the training process knew is not made up.

    Exits with 1 if there is a manifest already, or if the adapter cannot be loaded.
    """
    config = _quantization_config(quantization, compute_dtype, double_quant=double_quant)
    with errors_end_the_program():
        from peftstate._adopting import adopt as adopt_folder

        given = {"dtype": dtype and dtype.value, "attn_implementation": attn_implementation}
        kwargs: dict[str, Any] = {name: value for name, value in given.items() if value}
        if config is not None:
            kwargs["quantization_config"] = config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what libraries will rename
            manifest = adopt_folder(
                adapter, base=base, prediction_probe=prediction_probe or None, **kwargs
            )
    if as_json:
        print_json({"source": adapter, "digest": manifest.digest, "unknown": [*manifest.unknown]})
        return
    record = manifest.sections["base_model"]
    quantized = "" if config is None else f" in {quantization.value}"
    out.print(
        f"{adapter}: adopted, on {record.name or record.model_class}{quantized}", markup=False
    )
    out.print(f"  not known any more: {', '.join(manifest.unknown)}", markup=False)


def _quantization_config(
    quantization: Quantization, compute_dtype: Dtype | None, *, double_quant: bool
) -> Any:
    """What transformers is handed; `None` for a base model that is loaded as its checkpoint is."""
    in_4_bits = quantization in {Quantization.NF4, Quantization.FP4}
    if not in_4_bits and (double_quant or compute_dtype is not None):
        raise typer.BadParameter("--double-quant and --compute-dtype are for nf4 and fp4")
    if quantization is Quantization.NONE:
        return None
    from transformers import BitsAndBytesConfig

    if quantization is Quantization.INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.value,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype and compute_dtype.value,
    )
