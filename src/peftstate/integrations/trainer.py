"""transformers' `Trainer`, and the trainers of TRL, which build on it."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import peft
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftstate._api import restore
from peftstate._files import read_manifest
from peftstate._folder import AdapterFolder
from peftstate._keys import signing_key
from peftstate._models import PeftModel, attach
from peftstate._rank_files import rank_files, rank_of_name
from peftstate._ranks import save_rank
from peftstate._signing import sign
from peftstate._storage import ADAPTER_CONFIG_NAME, MANIFEST_NAME
from peftstate.sections import SECTIONS
from peftstate.sections._view import ModelView

if TYPE_CHECKING:
    from peftstate._keys import SigningKey

logger = logging.getLogger("peftstate")


class PeftStateCallback(TrainerCallback):
    """Makes all that a trainer saves carry a manifest: checkpoints, the final model, Hub pushes.

    Pass it to the trainer: ``SFTTrainer(…, callbacks=[PeftStateCallback()])``. It attaches to the
    model as soon as the trainer is built, which is after TRL has wrapped it and before anything
    else does. For the pushes, for the random generators of further ranks and for what a resumed
    training has to get back it wraps methods of `Trainer`.

    Args:
        sign_with: The private key to sign each checkpoint with when it is complete, as `sign` takes
            it. A push by the trainer comes before. What `save_model` writes, and what is pushed, is
            for `sign` to sign; so are checkpoints of several processes, of which a slower one may
            write its file later.
    """

    def __init__(self, *, sign_with: SigningKey | None = None) -> None:
        self.sign_with = None if sign_with is None else signing_key(sign_with)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach to the trainer's model, and have its saves record the trainer's tokenizer."""
        del args, state, control, kwargs
        if isinstance(model, peft.PeftModel):
            attach(model, tokenizer=processing_class)
            push_manifests()
            save_ranks()
            restore_on_resume()
        else:
            logger.warning(
                "PeftStateCallback: the model is a %s, not a PEFT model; "
                "its saves carry no manifest.",
                type(model).__name__,
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sign the checkpoint, if there is a key."""
        del control, kwargs
        if self.sign_with is not None and state.is_world_process_zero:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            sign(Path(str(args.output_dir), folder), self.sign_with)


def with_tokenizer(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Trainer.__init__` so that what the trainer saves records its tokenizer."""

    @functools.wraps(original)
    def __init__(self: Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if isinstance(self.model, PeftModel):
            attach(self.model, tokenizer=self.processing_class)

    return __init__


def push_manifests() -> None:
    """Have every `Trainer` of this process push the state with the adapters."""
    if not hasattr(Trainer._push_from_checkpoint, _COPIES_STATE):
        original = Trainer._push_from_checkpoint
        Trainer._push_from_checkpoint = with_state(original)  # type: ignore[method-assign]


def save_ranks() -> None:
    """Have every `Trainer` of this process save its random generators when another one saves."""
    if not hasattr(Trainer.save_model, _SAVES_RANK):
        Trainer.save_model = with_rank(Trainer.save_model)  # type: ignore[method-assign]


def with_rank(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the save of a model so that each further rank saves its random generators.

    Every rank calls it, for checkpoints and for the final model, but only the main process goes on
    to call `save_pretrained` (`transformers/trainer.py::Trainer.save_model`).
    """
    if hasattr(original, _SAVES_RANK):
        return original

    @functools.wraps(original)
    def save_model(self: Trainer, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.model, PeftModel) and not self.args.should_save:
            directory = self.args.output_dir if output_dir is None else output_dir
            save_rank(ModelView.of(self.model), Path(str(directory)))
        original(self, output_dir, *args, **kwargs)

    setattr(save_model, _SAVES_RANK, True)
    return save_model


_SAVES_RANK = "_peftstate_saves_rank"


def restore_on_resume() -> None:
    """Have every `Trainer` of this process get all trained tensors back from a checkpoint."""
    for name, wrap in (
        ("_load_from_checkpoint", with_resume),
        ("_load_best_model", with_best_model),
    ):
        original = getattr(Trainer, name)
        if not hasattr(original, _RESTORES):
            setattr(Trainer, name, wrap(original))


def with_resume(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap what `Trainer` loads to resume, so that it is all that was trained.

    It loads adapters one by one, and knows nothing of tensors that PEFT does not save; these must
    be back before, since each adapter is verified against the base model. Of several adapters
    transformers 4.56 leaves out the one in the checkpoint's own folder.
    """
    if hasattr(original, _RESTORES):
        return original

    @functools.wraps(original)
    def _load_from_checkpoint(
        self: Trainer, resume_from_checkpoint: str, *args: Any, **kwargs: Any
    ) -> None:
        _restore_trained(self, resume_from_checkpoint)
        original(self, resume_from_checkpoint, *args, **kwargs)

    setattr(_load_from_checkpoint, _RESTORES, True)
    return _load_from_checkpoint


def with_best_model(original: Callable[..., None]) -> Callable[..., None]:
    """The same for ``load_best_model_at_end``."""
    if hasattr(original, _RESTORES):
        return original

    @functools.wraps(original)
    def _load_best_model(self: Trainer) -> None:
        if self.state.best_model_checkpoint is not None:
            _restore_trained(self, self.state.best_model_checkpoint)
        original(self)

    setattr(_load_best_model, _RESTORES, True)
    return _load_best_model


_RESTORES = "_peftstate_restores"
_TRAINED = frozenset({"adapters", "base_model", "dtype", "extra_tensors", "quantization"})
"""The sections that a training changes, or depends on; the rest is as the script has set it up."""


def _restore_trained(trainer: Trainer, checkpoint: str) -> None:
    """Set what was trained as it is in a checkpoint, and verify it.

    Raises:
        StateMismatchError: The model is not the one that was trained.
    """
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not isinstance(trainer.model, PeftModel) or is_sharded:
        return
    if AdapterFolder.at(Path(checkpoint)).exists(MANIFEST_NAME):
        untouched = {section.name for section in SECTIONS} - _TRAINED
        restore(trainer.model, checkpoint, on_mismatch=dict.fromkeys(untouched, "ignore"))


def with_state(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the push of a checkpoint so that it carries what the checkpoint's manifests name.

    `Trainer` copies a fixed list of files from the checkpoint into the folder that it uploads
    (`transformers/trainer.py::Trainer._push_from_checkpoint`).
    """

    @functools.wraps(original)
    def _push_from_checkpoint(self: Trainer, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            _copy_state(Path(checkpoint_folder), Path(str(self.args.output_dir)))
        original(self, checkpoint_folder)

    setattr(_push_from_checkpoint, _COPIES_STATE, True)
    return _push_from_checkpoint


_COPIES_STATE = "_peftstate_copies_state"


def _copy_state(checkpoint: Path, directory: Path) -> None:
    """Copy a checkpoint's adapter with its state, and those in its sub-folders; the manifest last.

    The sub-folder of an extra adapter has a manifest of its own.
    """
    if not (checkpoint / MANIFEST_NAME).is_file():
        return
    manifest = read_manifest(checkpoint)
    names = {PurePosixPath(name) for name in manifest.files}
    for folder in sorted({str(name.parent) for name in names} - {"."}):
        _copy_state(checkpoint / folder, directory / folder)
    directory.mkdir(parents=True, exist_ok=True)
    own = sorted(name.name for name in names if str(name.parent) == ".")
    ranks = rank_files(AdapterFolder.at(checkpoint), manifest).belonging
    for name in AdapterFolder.at(directory).names():
        if rank_of_name(name) is not None and name not in ranks:
            (directory / name).unlink(missing_ok=True)
    for name in (*ranks, *own, ADAPTER_CONFIG_NAME, MANIFEST_NAME):
        shutil.copyfile(checkpoint / name, directory / name)
