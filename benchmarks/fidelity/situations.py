"""All situations, and the numbers of the causes."""

from __future__ import annotations

from benchmarks.fidelity import (
    causes_a,
    causes_b,
    causes_c,
    causes_d,
    causes_ef,
    further_models,
    further_tuners,
    further_ways,
)
from benchmarks.fidelity._situation import Situation

CAUSES: dict[str, str] = {
    "A1": "keys that match nothing",
    "A2": "an adapter with the name of a module",
    "A3": "parameters trained outside the adapter",
    "A4": "a head that was initialised at random",
    "A5": "resized embeddings",
    "A6": "tied weights that come apart",
    "A7": "shards that were not gathered",
    "A8": "several adapters",
    "A9": "another file is picked",
    "B1": "the base model is quantized otherwise",
    "B2": "a checkpoint overrides the quantization config",
    "B3": "k-bit preparation is not repeated",
    "B4": "the base model is loaded in another dtype",
    "B5": "another revision of the base model",
    "B6": "initialisations that rewrite the base model",
    "B7": "edits of the base model's config",
    "B8": "another attention implementation",
    "B9": "buffers that training changes",
    "B10": "merged adapters",
    "C1": "train flags",
    "C2": "random numbers",
    "C3": "the generation config",
    "C4": "the autocast wrapper",
    "C5": "gradient checkpointing and the cache",
    "C6": "hooks that are left behind",
    "C7": "disabled and scaled adapters",
    "C8": "trainable parameters",
    "C9": "another checkpoint than the best",
    "D1": "the adapter's dtype",
    "D2": "heads that are rounded",
    "D3": "fields of the config that are dropped",
    "D4": "frozen parts that come from a seed",
    "D5": "prompts saved for inference only",
    "D6": "layers that running them changes",
    "D7": "the layout of experts",
    "E1": "the tokenizer and its template",
    "E2": "another batch or padding",
    "F1": "other versions of the libraries",
    "F2": "another device",
    "F3": "determinism and precision",
    "F4": "tensors that are not here",
    "F5": "the code of the model itself",
}
"""The known causes of a changed reload, by number."""

OF_CAUSES: tuple[Situation, ...] = (
    *causes_a.SITUATIONS,
    *causes_b.SITUATIONS,
    *causes_c.SITUATIONS,
    *causes_d.SITUATIONS,
    *causes_ef.SITUATIONS,
)
FURTHER: tuple[Situation, ...] = (
    *further_tuners.SITUATIONS,
    *further_models.SITUATIONS,
    *further_ways.SITUATIONS,
)
