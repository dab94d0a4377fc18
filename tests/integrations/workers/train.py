"""A training script that knows nothing of peftstate, unless it is told to use the callback.

Started by a launcher, in each of several processes. Each leaves what it draws next after the final
save in ``drawn-<rank>.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import peft
import torch
import transformers


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """A few rows of token ids."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = [(index * 7 + place) % 60 + 4 for place in range(6)]
        return {"input_ids": ids, "labels": ids}


def main():
    """Train four steps, from a checkpoint if one is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("output", type=Path)
    parser.add_argument("--resume")
    parser.add_argument("--callback", action="store_true")
    options = parser.parse_args()
    arguments = transformers.TrainingArguments(
        output_dir=str(options.output),
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        seed=1 if options.resume is None else 2,  # what is resumed does not depend on it
        data_seed=1,
    )
    transformers.set_seed(arguments.seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3)
    callbacks = []
    if options.callback:
        from peftstate import PeftStateCallback

        callbacks.append(PeftStateCallback())
    trainer = transformers.Trainer(
        model=peft.get_peft_model(base, config),
        args=arguments,
        train_dataset=Rows(),
        callbacks=callbacks,
    )
    torch.manual_seed(arguments.seed + arguments.process_index)  # the trainer seeds all alike
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(str(options.output / "final"))
    drawn = torch.rand(()).item()
    (options.output / f"drawn-{arguments.process_index}.json").write_text(json.dumps(drawn))


if __name__ == "__main__":
    main()
