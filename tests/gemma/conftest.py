"""A real model, trained once for all tests of this folder."""

from __future__ import annotations

import os

import attrs
import pytest
from gemma import gemma_checkpoint
from trl import SFTTrainer

from peftstate._demo import flow
from peftstate._demo.show import quiet


@attrs.frozen(kw_only=True)
class Trained:
    """Gemma after three steps of QLoRA, saved, and still in memory."""

    trainer: SFTTrainer
    saved: flow.Saved


@pytest.fixture(autouse=True)
def let_upstream_warn():
    """These tests are about what comes back, not about what upstream deprecates."""
    with quiet():
        yield


@pytest.fixture(scope="session")
def checkpoint(request):
    """A checkpoint of Gemma 3 270M, made once: in `$PEFTSTATE_GEMMA` or the cache of pytest."""
    kept = os.environ.get("PEFTSTATE_GEMMA") or request.config.cache.mkdir("gemma") / "checkpoint"
    with quiet():
        return str(gemma_checkpoint(kept))


@pytest.fixture(scope="session")
def trained(checkpoint, tmp_path_factory):
    """The flow of peft#1649: nf4 with double quantization, `SFTTrainer`, `save_model`."""
    output = tmp_path_factory.mktemp("gemma") / "adapter"
    with quiet():
        trainer = flow.train(checkpoint, output, steps=3)
        flow.set_generation(trainer.model)
        return Trained(trainer=trainer, saved=flow.save(trainer, checkpoint, output))


@pytest.fixture(
    scope="session",
    params=[how for how in flow.RELOADS if how.is_exact],
    ids=lambda how: how.load.__name__,
)
def comparison(request, trained):
    """A reload with peftstate, compared with the model that was saved."""
    with quiet():
        return flow.reload(request.param, trained.saved)
