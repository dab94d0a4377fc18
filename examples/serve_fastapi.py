"""A server that generates text with seeded requests, and loads adapters while it runs.

    pip install fastapi uvicorn
    python examples/serve_fastapi.py --base BASE --adapter ADAPTER --port 8000

Each request has its own random stream, so that the same seed gives the same text whatever else the
server does. Every adapter is verified against the live base model before it answers anything; a
base model that is not the saved one ends the program with a typed error.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM

import peftstate
from peftstate.errors import PeftStateError


class Request(BaseModel):
    """What is asked of the model."""

    input_ids: list[int] = Field(min_length=1)
    adapter: str = "default"
    seed: int = 0
    max_new_tokens: int = Field(default=32, ge=1, le=1024)


class Adapter(BaseModel):
    """Where an adapter is."""

    path: Path


def make_app(model: Any) -> FastAPI:
    """The server around a `peftstate.PeftModel`.

    The endpoints are no coroutines, so FastAPI runs them in threads.
    """
    app = FastAPI()

    @app.post("/generate")
    def generate(request: Request) -> dict[str, list[int]]:
        """The new tokens."""
        if request.adapter not in model.peft_config:
            raise HTTPException(404, f"there is no adapter {request.adapter!r}")
        ids = torch.tensor([request.input_ids])
        # By name, PEFT adds an adapter's output in other roundings than that of the active one.
        by_name = {} if request.adapter == "default" else {"adapter_names": [request.adapter]}
        with peftstate.request_rng(request.seed):
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                max_new_tokens=request.max_new_tokens,
                **by_name,
            )
        return {"tokens": output[0, ids.shape[1] :].tolist()}

    @app.put("/adapters/{name}")
    def load(name: str, adapter: Adapter) -> dict[str, list[str]]:
        """Load an adapter, verified; one that does not fit leaves the model as it is."""
        try:
            model.load_adapter(adapter.path, name, require_manifest=True)
        except PeftStateError as error:
            raise HTTPException(409, f"{type(error).__name__}: {error}") from error
        return {"adapters": list(model.peft_config)}

    @app.delete("/adapters/{name}")
    def unload(name: str) -> dict[str, list[str]]:
        """Forget an adapter."""
        if name == "default" or name not in model.peft_config:
            raise HTTPException(404, f"there is no adapter {name!r} to unload")
        model.delete_adapter(name)
        return {"adapters": list(model.peft_config)}

    return app


def main() -> None:
    """Load the model, then serve it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", required=True, help="folder, or id on the Hub, of the base model")
    parser.add_argument("--adapter", required=True, help="folder, or id on the Hub")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    kwargs = peftstate.base_model_kwargs(args.adapter)
    base = AutoModelForCausalLM.from_pretrained(args.base, **kwargs)
    model = peftstate.PeftModel.from_pretrained(
        base, args.adapter, is_trainable=False, require_manifest=True
    )
    uvicorn.run(make_app(model), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
