"""The prediction probe of a manifest as prompts and log-probabilities, read without torch."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from peftstate._digest import tensor_digest
from peftstate._files import consistently, manifest_of, read_recorded
from peftstate._safetensors import stored
from peftstate._signature import open_for_load
from peftstate._storage import SIDECAR_NAME
from peftstate.errors import IntegrityError
from peftstate.sections.predictions import SUMS

if TYPE_CHECKING:
    from peftstate._folder import AdapterFolder
    from peftstate._keys import TrustedKeys
    from peftstate._safetensors import Stored
    from peftstate.manifest import Manifest
    from peftstate.sections._tensors import SidecarTensor
    from peftstate.sections.predictions import PredictionsRecord

_SINGLE = 2.0**-23
"""The distance from 1 to the next number of float32."""
_FORMATS = {"float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i"}
"""dtypes → what `struct` calls them; bfloat16 is the upper half of float32."""
_DIMENSIONS = ("rows", "tokens", "vocabulary")
_ANSWERED = frozenset({"input_ids", "attention_mask", "labels"})
"""The inputs that a completion request stands for; labels decide the loss only."""


@attrs.frozen
class Prompt:
    """One prompt.

    Attributes:
        token_ids: Its tokens.
        log_probabilities: What the saved model gave each of them, but the first.
    """

    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]


@attrs.frozen(kw_only=True)
class StoredProbe:
    """A prediction probe.

    Attributes:
        prompts: The prompts.
        tolerance: What another environment may change in a log-probability.
        noise: What it may change where nothing is coarser than float32.
    """

    prompts: tuple[Prompt, ...]
    tolerance: float
    noise: float


def read_probe(
    source: str | os.PathLike[str], *, trusted_keys: TrustedKeys | None = None
) -> StoredProbe:
    """Read the prediction probe of an adapter.

    Args:
        source: The adapter's folder, or the id of a repo on the Hub.
        trusted_keys: As in `PeftModel.from_pretrained`.

    Raises:
        ManifestError: There is no manifest, or it cannot be used.
        IntegrityError: The files are not those that were saved.
        SignatureError: They were not signed with a key that is trusted.
        ValueError: The manifest has no probe, or one that no prompt can hold.
    """
    manifest, tensors = consistently(open_for_load(source, trusted_keys=trusted_keys), _read)
    record: PredictionsRecord = manifest.sections["predictions"]
    ids, logits = tensors["input_ids"], tensors["logits"]
    if len(logits.shape) != len(_DIMENSIONS) or logits.shape[:-1] != ids.shape:
        raise ValueError(
            f"the probe's logits have the shape {list(logits.shape)} for tokens of the shape "
            f"{list(ids.shape)}; only those of a causal language model can be asked of a server"
        )
    mask = tensors.get("attention_mask")
    found = [_prompt(row, ids, logits, mask) for row in range(ids.shape[0])]
    prompts = tuple(prompt for prompt, _ in found if prompt.log_probabilities)
    if not prompts:
        raise ValueError("the probe has no prompt of two tokens or more, so nothing can be asked")
    noise = 2 * SUMS * _SINGLE * max(largest for _, largest in found)
    return StoredProbe(prompts=prompts, tolerance=max(2 * record.tolerance, noise), noise=noise)


@attrs.frozen
class _Values:
    """A tensor as bytes, of which a row at a time becomes numbers.

    Attributes:
        dtype: Name of the dtype.
        shape: The shape.
        data: The elements, little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def row(self, number: int) -> tuple[float, ...]:
        """A row of the last dimension."""
        length = self.shape[-1]
        size = 2 if self.dtype == "bfloat16" else struct.calcsize(_FORMATS[self.dtype])
        data = self.data[number * length * size : (number + 1) * length * size]
        if self.dtype != "bfloat16":
            return struct.unpack(f"<{length}{_FORMATS[self.dtype]}", data)
        wide = bytearray(4 * length)
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return struct.unpack(f"<{length}f", wide)


def _read(folder: AdapterFolder) -> tuple[Manifest, dict[str, _Values]]:
    """Read a folder once: the manifest, and the tensors of the probe as they were saved."""
    manifest = manifest_of(folder)
    record: PredictionsRecord | None = manifest.sections.get("predictions")
    if record is None:
        raise ValueError(
            "the manifest has no prediction probe; save the model with prediction_probe= "
            "(True, or inputs of yours)"
        )
    if "input_ids" not in record.inputs or (others := record.inputs.keys() - _ANSWERED):
        names = ", ".join(sorted(others)) if "input_ids" in record.inputs else "no input_ids"
        raise ValueError(f"a prompt cannot hold the probe's inputs ({names})")
    data = read_recorded(folder, SIDECAR_NAME, manifest.files.get(SIDECAR_NAME))
    wanted = {**record.inputs, "logits": record.logits}
    path = str(folder.path / SIDECAR_NAME)
    try:
        held = stored(data)
    except ValueError as error:
        raise IntegrityError(path, "a file of tensors", f"something else ({error})") from error
    return manifest, {name: _tensor(path, held, tensor) for name, tensor in wanted.items()}


def _tensor(path: str, held: Mapping[str, Stored], record: SidecarTensor) -> _Values:
    """A tensor of the sidecar, compared with its record.

    Raises:
        IntegrityError: It is not there, or not as it was saved.
        ValueError: It is in a dtype that is not read without torch.
    """
    name = f"{path}[{record.tensor}]"
    if record.tensor not in held:
        raise IntegrityError(name, "a tensor", "none of that name")
    data = held[record.tensor].data
    digest = tensor_digest(record.dtype, record.shape, data)
    if digest != record.digest:
        raise IntegrityError(name, f"digest {record.digest}", f"digest {digest}")
    if record.dtype != "bfloat16" and record.dtype not in _FORMATS:
        raise ValueError(f"the probe holds {record.dtype}, which no server is asked with")
    return _Values(record.dtype, record.shape, data)


def _prompt(row: int, ids: _Values, logits: _Values, mask: _Values | None) -> tuple[Prompt, float]:
    """One row of the probe, and the largest logit in it."""
    width = ids.shape[1]
    length = width if mask is None else _length(mask.row(row))
    tokens = tuple(map(int, ids.row(row)[:length]))
    found, largest = [], 0.0
    for place, token in enumerate(tokens[1:]):
        values = logits.row(row * width + place)
        finite = [value for value in values if math.isfinite(value)]
        if not 0 <= token < len(values) or not finite:
            raise ValueError(f"the probe has no logit for token {token} of row {row}")
        top = max(finite)
        largest = max(largest, top, -min(finite))
        found.append(values[token] - top - math.log(math.fsum(math.exp(v - top) for v in finite)))
    return Prompt(tokens, tuple(found)), largest


def _length(mask: Sequence[float]) -> int:
    """How many tokens of a row are no padding, which must be on the right.

    Raises:
        ValueError: It is not.
    """
    length = sum(map(bool, mask))
    if not all(mask[:length]):
        raise ValueError(
            "the probe is padded on the left or has gaps; a server numbers the tokens of a prompt "
            "from its first. Save it with padding on the right, or without."
        )
    return length
