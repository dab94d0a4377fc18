"""`save_state` and `load_state` of accelerate; each process leaves ``state-<rank>.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig

import peftstate
from peftstate.integrations import accelerate

IDS = torch.arange(4, 16).reshape(2, 6)


def main():
    """Train, save, train on; then load, train on again, and compare."""
    base, output = sys.argv[1], Path(sys.argv[2])
    accelerator = Accelerator()
    set_seed(0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3)
    model = peftstate.get_peft_model(loaded, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerate.register(accelerator)
    model.train()

    def step():
        ids = torch.randint(4, 60, (2, 6))
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()

    def state():
        weights = accelerator.unwrap_model(model).state_dict()
        return {name: weight.clone() for name, weight in weights.items() if "lora_" in name}

    set_seed(accelerator.process_index)
    step()
    accelerator.save_state(str(output / "state"))
    step()
    expected, drawn = state(), torch.rand(()).item()
    step()
    accelerator.wait_for_everyone()
    accelerator.load_state(str(output / "state"))
    step()
    found, again = state(), torch.rand(()).item()
    equal = all(torch.equal(expected[name], found[name]) for name in expected)
    result = {"equal": equal, "drawn": drawn, "again": again, "count": accelerator.num_processes}
    (output / f"state-{accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
