"""lm-eval's model with an adapter on the Hub."""

from __future__ import annotations

import pytest
import torch

import peftstate
from tests._tokenizers import make_tokenizer
from tests.hub.test_adapters import REPO, logits, with_adapters

pytest.importorskip("lm_eval", reason="lm-eval is tested with the newest versions only")

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_a_revision_of_an_adapter(load_base, causal_lm, hub, client, tmp_path):
    """The adapter's revision is one thing, the base model's another."""
    from peftstate.integrations.lm_eval import PeftStateLM

    first = with_adapters(load_base("bf16"), "default", seed=1)
    first.push_to_hub(REPO, revision="next")
    with_adapters(load_base("bf16"), "default").push_to_hub(REPO)
    make_tokenizer().save_pretrained(tmp_path)
    model = PeftStateLM(
        peft=REPO,
        peft_revision="next",
        pretrained=str(causal_lm),
        tokenizer=str(tmp_path),
        device="cpu",
    )
    assert torch.equal(logits(model.model), logits(first))
    digest = model.get_model_info()["peftstate"]["manifest_digest"]
    assert digest == peftstate.read_manifest(REPO, revision="next").digest
