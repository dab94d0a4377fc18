"""A LitServe server that generates text with seeded requests.

    pip install litserve
    python examples/serve_litserve.py --base BASE --adapter ADAPTER --port 8000

Each request has its own random stream. A base model that is not the saved one ends the program
with a typed error, in `setup`.
"""

from __future__ import annotations

import argparse
from typing import Any

import litserve
import torch
from transformers import AutoModelForCausalLM

import peftstate


class Generation(litserve.LitAPI):
    """The model, in a process of LitServe's."""

    def __init__(self, base: str, adapter: str) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def setup(self, device: str) -> None:
        """Load the model, verified."""
        kwargs = peftstate.base_model_kwargs(self.adapter)
        base: Any = AutoModelForCausalLM.from_pretrained(self.base, **kwargs)
        self.model: Any = peftstate.PeftModel.from_pretrained(
            base.to(device), self.adapter, is_trainable=False, require_manifest=True
        )

    def predict(self, request: dict[str, Any]) -> dict[str, list[int]]:
        """The new tokens of a request: ``input_ids``, ``seed``, ``max_new_tokens``."""
        ids = torch.tensor([request["input_ids"]], device=self.model.device)
        with peftstate.request_rng(int(request.get("seed", 0))):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                max_new_tokens=int(request.get("max_new_tokens", 32)),
            )
        return {"tokens": output[0, ids.shape[1] :].tolist()}


def main() -> None:
    """Serve until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", required=True, help="folder, or id on the Hub, of the base model")
    parser.add_argument("--adapter", required=True, help="folder, or id on the Hub")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    server = litserve.LitServer(Generation(args.base, args.adapter), accelerator="cpu")
    server.run(port=args.port, generate_client_file=False)


if __name__ == "__main__":
    main()
