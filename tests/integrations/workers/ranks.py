"""Saves and loads on several ranks, without a trainer; each leaves ``rank-<rank>.json``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig

import peftstate
from peftstate.errors import RankStateWarning, TrainModeWarning

IDS = torch.arange(4, 16).reshape(2, 6)


def load_base(path):
    """The base model."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def make_model(path):
    """The same model on every rank."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    return peftstate.get_peft_model(load_base(path), config)


def one_after_the_other(save):
    """Save on the last rank first, and on each only when the one before is done.

    A collective in a save would never return.
    """
    for rank in reversed(range(dist.get_world_size())):
        if rank == dist.get_rank():
            save()
        dist.barrier()


def ddp(base, folder):
    """Save what DDP trains, and load it again."""
    model = make_model(base)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    wrapped(input_ids=(IDS + dist.get_rank()) % 64, labels=IDS).loss.backward()
    optimizer.step()
    torch.manual_seed(100 + dist.get_rank())
    is_main = dist.get_rank() == 0
    one_after_the_other(lambda: model.save_pretrained(folder, is_main_process=is_main))
    drawn = torch.rand(()).item()
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RankStateWarning)
        warnings.simplefilter("ignore", TrainModeWarning)
        loaded = peftstate.PeftModel.from_pretrained(load_base(base), folder)
    again = torch.rand(()).item()
    with torch.no_grad():
        logits = [each.eval()(input_ids=IDS).logits for each in (model, loaded)]
    return {"drawn": drawn, "again": again, "equal": torch.equal(*logits)}


def fsdp(base, folder):
    """Save what FSDP2 shards: rank 0 alone calls `save_pretrained`, with the gathered tensors."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model(base)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(model, options=options)  # the only collective
    is_main = dist.get_rank() == 0
    refusal = ""
    if is_main:
        model.save_pretrained(folder, state_dict=gathered)
        try:
            model.save_pretrained(f"{folder}-ungathered")
        except peftstate.errors.SaveError as error:
            refusal = str(error)
    dist.barrier()
    if not is_main:
        model.save_pretrained(folder, is_main_process=False)
    dist.barrier()
    if is_main:
        adapter = {name: tensor for name, tensor in gathered.items() if "lora_" in name}
        torch.save(adapter, f"{folder}-0.pt")
    return {"class": type(model).__name__, "refusal": refusal}


def main():
    """Do what is asked for."""
    base, output, *tasks = sys.argv[1:]
    dist.init_process_group("gloo")
    found = {task: globals()[task](base, str(Path(output, task))) for task in tasks}
    Path(output, f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
