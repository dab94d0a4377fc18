"""Folders at random: good ones, of which JSON, headers, tensors and bytes are changed.

What is changed is mostly sealed again, and digests are made to fit, as an attacker would: else all
would end at the seal.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks._hostile.case import (
    CONFIG,
    MANIFEST,
    SIDECAR,
    WEIGHTS,
    header,
    manifest_of,
    sealed,
    with_config,
    with_file,
    with_tensor,
)
from benchmarks._hostile.scene import Scene, Watch
from peftstate.errors import PeftStateError
from peftstate.manifest import Manifest

HANG = 2.0
"""Seconds of processor time that no load may take."""

_WORDS = (
    *("", ".", "..", "../x", "/etc/passwd", "a/b/c", "C:x", "NUL", "a\0b", "\x1b[2J", "x" * 5000),
    *("__class__", "__import__('os')", "os.system", "evil_module", "evil/kernel", "default"),
    *("bfloat16", "int8", "float8_e4m3fn", "complex64", "sdpa", "fresh", "packed", "nf4", "left"),
    *("rng.numpy", "model.norm.weight", "base_model", "(a+)+$", "{{ x }}", "0" * 64, "\U0001f600"),
)
_NUMBERS = (0, 1, -1, 2, 3, 16, 255, 625, 4096, 2**31, -(2**31), 2**32, 2**63, 2**64, 10**30)
_SMALL = _NUMBERS[:9]
"""Of a PEFT config, since PEFT makes layers of whatever size it says."""
_FRACTIONS = (0.0, -0.0, 0.5, -1.5, 1e308, 5e-324, 2.0**53)


@attrs.frozen
class Mutator:
    """Changes at random.

    Attributes:
        random: Where the choices come from.
        numbers: The integers to choose from.
    """

    random: random.Random
    numbers: tuple[int, ...] = _NUMBERS

    def likely(self, percent: int) -> bool:
        """Whether something is to be done that is done so often."""
        return self.random.randrange(100) < percent

    def value(self, levels: int = 3) -> Any:
        """Any JSON value."""
        scalars = (
            *(None, True, False, self.random.choice(self.numbers), "text"),
            *(self.random.choice(_FRACTIONS), self.random.choice(_WORDS)),
        )
        if not levels or self.likely(75):
            return self.random.choice(scalars)
        inner = [self.value(levels - 1) for _ in range(self.random.randrange(4))]
        keys = self.random.sample(_WORDS, len(inner))
        return inner if self.likely(50) else dict(zip(keys, inner, strict=True))

    def json(self, value: Any) -> None:
        """Change a JSON object in place, at one place or a few."""
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            if places := list(_places(value)):
                self._change(*self.random.choice(places), places)

    def _change(self, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
        """Change what an object or a list holds under a key."""
        other, at = self.random.choice(places)
        changes: list[Callable[[], Any]] = [self.value, lambda: copy.deepcopy(other[at])]
        if isinstance(holder[key], list):
            changes.append(lambda: holder[key] * self.random.choice((0, 2, 1000)))
        if isinstance(holder[key], (int, float)):
            changes += [lambda: float(holder[key]), lambda: int(holder[key]) + 1]
        if self.likely(15):
            del holder[key]
        elif isinstance(holder, dict) and self.likely(20):
            holder[self.random.choice(_WORDS)] = holder.pop(key)
        elif isinstance(holder, dict) and self.likely(20):
            holder[self.random.choice(_WORDS)] = self.value()
        else:
            holder[key] = self.random.choice(changes)()

    def binary(self, data: bytes) -> bytes:
        """Change bytes at a few places."""
        changed = bytearray(data)
        for _ in range(self.random.choice((1, 1, 2, 8))):
            begin = self.random.randrange(len(changed) + 1)
            end = begin + self.random.choice((1, 8, 1000))
            others = (
                bytes(byte ^ 1 << self.random.randrange(8) for byte in changed[begin:end]),
                self.random.randbytes(end - begin),
                changed[begin:end] * 2,
                b"",
            )
            changed[begin:end] = self.random.choice(others)
        return bytes(changed)

    def header(self, data: bytes) -> bytes:
        """Change the header of a safetensors file, or its length."""
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        self.json(content)
        said = self.random.choice((None, None, None, 0, length + 1, 2**40))
        return header(said, content, data[8 + length :])

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Another tensor."""
        dtypes = (torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.int8)
        flat = tensor.reshape(-1)
        others = (
            flat[: self.random.randrange(flat.numel() + 1)].clone(),
            flat.repeat(2),
            tensor.to(self.random.choice(dtypes)),
            tensor[None].clone(),
            (tensor.float() * self.random.choice(_FRACTIONS)).to(tensor.dtype),
            torch.full_like(tensor, self.random.choice((0, 1, 127))),
            (tensor.double() + 2.0 ** self.random.randrange(62)).to(tensor.dtype),
            torch.zeros(0, dtype=tensor.dtype),
        )
        return self.random.choice(others)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each object or list in a JSON value, with each of its keys."""
    keys: Any = list(value) if isinstance(value, dict) else ()
    keys = range(len(value)) if isinstance(value, list) else keys
    for key in keys:
        yield value, key
        yield from _places(value[key])


def manifest(good: bytes, mutator: Mutator) -> bytes:
    """A manifest at random."""
    if mutator.likely(20):
        return mutator.binary(good)
    value = json.loads(good)
    parts = [*value["sections"].values(), value["sections"], value]
    mutator.json(mutator.random.choice(parts))
    return sealed(value) if mutator.likely(90) else json.dumps(value).encode()


def folder(scene: Scene, mutator: Mutator, name: str = "random") -> Path:
    """A folder at random."""
    place = scene.place / name / "adapter"
    shutil.rmtree(place.parent, ignore_errors=True)
    shutil.copytree(scene.good, place)
    mutator.random.choice((_any_manifest, _any_manifest, _any_config, _any_file, _any_tensor))(
        place, mutator
    )
    if mutator.likely(10):  # not recorded
        file = place / mutator.random.choice((SIDECAR, WEIGHTS, MANIFEST, CONFIG))
        file.write_bytes(mutator.binary(file.read_bytes()))
    return place


def _any_manifest(place: Path, mutator: Mutator) -> None:
    """Change the manifest."""
    (place / MANIFEST).write_bytes(manifest((place / MANIFEST).read_bytes(), mutator))


def _any_config(place: Path, mutator: Mutator) -> None:
    """Change one field of the PEFT config, on disk and in the manifest."""
    field = mutator.random.choice(_FIELDS)
    value = Mutator(mutator.random, _SMALL).value()
    with_config(lambda config: config.update({field: value}))(place)


_FIELDS = (
    *("alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_config"),
    *("megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules"),
    *("task_type", "use_dora", "use_rslora", "layer_replication", "loftq_config", "eva_config"),
    *("exclude_modules", "target_parameters", "trainable_token_indices", "corda_config"),
)


def _any_file(place: Path, mutator: Mutator) -> None:
    """Change the bytes of a file of tensors, and record it as it is."""
    file = mutator.random.choice((SIDECAR, WEIGHTS))
    with_file(file, mutator.header if mutator.likely(70) else mutator.binary)(place)


def _any_tensor(place: Path, mutator: Mutator) -> None:
    """Change a tensor of the sidecar, and record it as it is."""
    names = sorted(_sidecar_names(manifest_of(place)["sections"]))
    with_tensor(mutator.random.choice(names), mutator.tensor)(place)


def _sidecar_names(value: Any) -> Iterator[str]:
    """The names of the sidecar's tensors."""
    if isinstance(value, dict):
        if isinstance(value.get("tensor"), str):
            yield value["tensor"]
        for inner in value.values():
            yield from _sidecar_names(inner)


@attrs.define
class Tally:
    """What came of many folders.

    Attributes:
        tried: How many there were.
        loaded: How many loaded, since nothing that counts was changed.
        refused: How many were refused, by the class of the error.
        broken: What broke a promise, in words.
        slowest: The most processor time that one took.
    """

    tried: int = 0
    loaded: int = 0
    refused: dict[str, int] = attrs.field(factory=dict)
    broken: list[str] = attrs.field(factory=list)
    slowest: float = 0.0

    def count(self, label: str, work: Callable[[], object]) -> None:
        """Do something that may fail with an error of peftstate's only, and soon."""
        self.tried += 1
        begin = time.process_time()
        try:
            work()
        except PeftStateError as error:
            name = type(error).__name__
            self.refused[name] = self.refused.get(name, 0) + 1
        except Exception as error:  # noqa: BLE001 - which is what is looked for
            self.broken.append(f"{label}: {type(error).__name__}: {error}"[:500])
        else:
            self.loaded += 1
        taken = time.process_time() - begin
        self.slowest = max(self.slowest, taken)
        if taken > HANG:
            self.broken.append(f"{label}: took {taken:.1f} s")


def read_one(good: bytes, mutator: Mutator, tally: Tally, label: str) -> None:
    """Read a manifest at random."""
    data = manifest(good, mutator)
    tally.count(label, lambda: Manifest.from_json(data, path=MANIFEST))


def load_one(scene: Scene, watch: Watch, mutator: Mutator, tally: Tally, label: str) -> None:
    """Load a folder at random."""
    place = folder(scene, mutator)
    with watch.over(scene.place) as seen:
        tally.count(label, lambda: scene.load(place))
    tally.broken += [f"{label}: {event}" for event in seen]
