"""Further situations: trainers, ways to save and to load, and folders that were damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import peftstate
from benchmarks.fidelity._libraries import Library, load_auto, load_to_train, load_with
from benchmarks.fidelity._models import (
    IDS,
    NF4,
    Place,
    adapted,
    base,
    lora,
    train,
    trained_lora,
)
from benchmarks.fidelity._outcome import refused
from benchmarks.fidelity._situation import Situation
from benchmarks.fidelity._tokenizers import make_tokenizer
from peftstate.errors import AdapterMismatchError, IntegrityError

WEIGHTS = "adapter_model.safetensors"
SECOND = "second"


def sft_trained(place: Place, model: Any) -> Any:
    """What TRL's trainer leaves in memory."""
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(place.root / "trainer"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list([{"input_ids": row} for row in IDS.tolist()]),
        processing_class=make_tokenizer(),
        peft_config=lora(),
        callbacks=[peftstate.PeftStateCallback()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.model


def what_a_trainer_sets(model: Any) -> dict[str, Any]:
    """State that a trainer changes."""
    dtypes = {str(p.dtype) for name, p in model.named_parameters() if "lora_" in name}
    return {
        "adapter in": ", ".join(sorted(dtypes)),
        "modules in train mode": tuple(n for n, module in model.named_modules() if module.training),
        "use_cache": model.config.use_cache,
    }


def in_fp16_for_a_while(place: Place) -> Any:
    """A model that was cast to fp16 and back, which rounds RoPE's frequencies, too."""
    return trained_lora()(place).half().float()


def tied_and_unfrozen(place: Place) -> Any:
    """A model whose embeddings, which are its head, too, were trained with the adapter."""
    model = adapted(place.load(checkpoint="tied llama"))
    model.get_base_model().model.embed_tokens.requires_grad_(requires_grad=True)
    return train(model)


def without_dropout(place: Place) -> Any:
    """What `DPOTrainer` does to a model before it trains it."""
    from trl.trainer.utils import disable_dropout_in_model

    model = trained_lora()(place)
    disable_dropout_in_model(model)
    return model


def dropout(model: Any) -> dict[str, Any]:
    """The probabilities of the dropout layers."""
    found = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    return {"dropout": ", ".join(f"{probability:g}" for probability in sorted(found))}


def second_generation(place: Place) -> Any:
    """A model that was reloaded by peftstate, and trained further."""
    folder = place.root / "first-generation"
    trained_lora(base(NF4))(place).save_pretrained(folder)
    return train(peftstate.PeftModel.from_pretrained(place.load(NF4), folder))


def two_adapters(place: Place) -> Any:
    """A model with two adapters."""
    model = trained_lora()(place)
    model.add_adapter(SECOND, lora(target_modules=["v_proj"]))
    model.set_adapter(SECOND)
    return train(model)


def save_second_adapter(library: Library, model: Any, folder: Path) -> None:
    """Save one adapter of two."""
    library.save(model, folder, selected_adapters=[SECOND])


def load_second_adapter(library: Library, reload_base: Callable[[], Any], folder: Path) -> Any:
    """Load that adapter from its own folder, under its name."""
    return library.load(reload_base(), folder / SECOND, adapter_name=SECOND)


def edit_config(**fields: Any) -> Callable[[Path], None]:
    """Have fields of the adapter's config be others."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def flip_bit(folder: Path) -> None:
    """Have one bit of the weights be another one."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 0x40
    (folder / WEIGHTS).write_bytes(data)


def truncate(folder: Path) -> None:
    """Lose the end of the weights."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


SITUATIONS = (
    Situation(
        title="TRL's `SFTTrainer` on a model in nf4, loaded with the same `BitsAndBytesConfig`",
        build=lambda place: sft_trained(place, place.load(NF4)),
        base=base(NF4),
        state=what_a_trainer_sets,
    ),
    Situation(
        title="TRL's `SFTTrainer` on the name of a model, loaded with `AutoPeftModelForCausalLM`",
        build=lambda place: sft_trained(place, str(place.checkpoint())),
        load=load_auto,
        state=what_a_trainer_sets,
    ),
    Situation(
        title="loaded with `low_cpu_mem_usage=True`, in bf16",
        build=trained_lora(base("bf16")),
        base=base("bf16"),
        load=load_with(low_cpu_mem_usage=True),
    ),
    Situation(
        title="loaded with `autocast_adapter_dtype=False`, in bf16",
        build=trained_lora(base("bf16")),
        base=base("bf16"),
        load=load_with(autocast_adapter_dtype=False),
    ),
    Situation(
        title="in fp16 for a while, and in fp32 when it was saved",
        build=in_fp16_for_a_while,
    ),
    Situation(
        title="tied embeddings were unfrozen and trained",
        build=tied_and_unfrozen,
        base=base(checkpoint="tied llama"),
    ),
    Situation(
        title="dropout that TRL's `DPOTrainer` has switched off, loaded to go on with training",
        build=without_dropout,
        load=load_to_train,
        state=dropout,
    ),
    Situation(
        title="reloaded by peftstate, trained further, and saved again, in nf4",
        build=second_generation,
        base=base(NF4),
    ),
    Situation(
        title="one adapter of two is saved, and loaded by itself",
        build=two_adapters,
        save=save_second_adapter,
        load=load_second_adapter,
    ),
    Situation(
        title="one bit of the weights is another one",
        build=trained_lora(),
        after_save=flip_bit,
        ours=refused(IntegrityError, r"adapter_model\.safetensors"),
    ),
    Situation(
        title="the weights are cut off",
        build=trained_lora(),
        after_save=truncate,
        ours=refused(IntegrityError, r"adapter_model\.safetensors"),
    ),
    Situation(
        title="`lora_alpha` in the config was edited",
        build=trained_lora(),
        after_save=edit_config(lora_alpha=16),
        ours=refused(AdapterMismatchError, r"config\.lora_alpha: saved 8"),
    ),
    Situation(
        title="`target_modules` in the config was edited",
        build=trained_lora(),
        after_save=edit_config(target_modules=["q_proj"]),
        ours=refused(AdapterMismatchError, r"config\.target_modules"),
    ),
)
