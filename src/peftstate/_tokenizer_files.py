"""The tokenizer that lies beside an adapter, as a trainer leaves it there.

Nobody hands it to the load, and yet it is the one that the prompts will go through. Loading a large
one takes longer than loading the adapter; where its files are those that the saved tokenizer
writes, their digests say so at once. Only others are loaded and compared.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from peftstate._diff import Mismatch, diff, steps
from peftstate._digest import file_digest
from peftstate._report import Report
from peftstate._warn import warn
from peftstate.errors import StateMismatchWarning
from peftstate.sections import tokenizer as section
from peftstate.sections._view import ModelView

if TYPE_CHECKING:
    from peftstate._folder import AdapterFolder
    from peftstate._policy import Policy
    from peftstate.manifest import Manifest
    from peftstate.sections.tokenizer import TokenizerRecord

CONFIG_NAME = "tokenizer_config.json"
"""The file that every tokenizer of transformers has."""
_FILES = re.compile(
    r"(added_tokens|special_tokens_map|tokenizer|tokenizer_config|vocab)\.json"
    r"|(vocab|merges)\.txt|chat_template\.(jinja|json)|[^.][^/]*\.(model|tiktoken)"
)
"""The names of the files that tokenizers of transformers are made of."""


def check_beside(folder: AdapterFolder, manifest: Manifest, policy: Policy) -> None:
    """Compare the tokenizer in an adapter's folder, if there is one, with the saved one.

    What a load would set on it, had it been handed over, is warned of; the rest is an error.

    Raises:
        TokenizerMismatchError: It is another one.
    """
    record: TokenizerRecord | None = manifest.sections.get("tokenizer")
    if record is None or not policy.handles("tokenizer"):
        return
    names = [name for name in folder.names() if _FILES.fullmatch(name)]
    if CONFIG_NAME not in names or _is_partial(folder, record):
        return
    if _is_as_saved(folder, names, record):
        return
    mismatches = _compare(folder, names, record)
    settings = tuple(item for item in mismatches if section.RESTORED & set(steps(item.field)))
    others = tuple(item for item in mismatches if item not in settings)
    policy.apply(Report(others, ("tokenizer",)))
    if settings:
        text = "\n".join(f"  {mismatch}" for mismatch in settings)
        warn(
            f"The tokenizer in {folder.path} is set otherwise than the saved one:\n{text}\n"
            "Pass tokenizer= to have it set as saved.",
            StateMismatchWarning,
        )


def _is_as_saved(folder: AdapterFolder, names: list[str], record: TokenizerRecord) -> bool:
    """Whether a folder has the files that the saved tokenizer writes, and no other of its own."""
    saved = record.files
    if not saved or not set(names) <= saved.keys():
        return False
    return all(_digest(folder, name) == digest for name, digest in saved.items())


def _is_partial(folder: AdapterFolder, record: TokenizerRecord) -> bool:
    """Whether a folder of the Hub's cache holds some of the files only, as they were asked for."""
    return folder.commit is not None and any(
        not folder.exists(name) for name in record.files or ("tokenizer.json",)
    )


def _digest(folder: AdapterFolder, name: str) -> str | None:
    """The SHA-256 of a file, if there is one."""
    return file_digest(folder.read(name)) if folder.exists(name) else None


def _compare(
    folder: AdapterFolder, names: list[str], record: TokenizerRecord
) -> tuple[Mismatch, ...]:
    """The differences of the tokenizer in a folder; of one that cannot be loaded, of its files."""
    try:
        tokenizer = _load(folder, names)
    except Exception as error:  # noqa: BLE001 - of a broken file, tokenizers raises just that
        if record.files is not None:
            found = {name: digest for name in record.files if (digest := _digest(folder, name))}
            return diff("tokenizer", {"files": dict(record.files)}, {"files": found})
        warn(
            f"The tokenizer in {folder.path} cannot be loaded, so it was not compared with the "
            f"saved one ({type(error).__name__}: {error}).",
            StateMismatchWarning,
        )
        return ()
    view = ModelView(model=None, tokenizer=tokenizer)
    return section.SECTION.compare(record, section.capture_like(view, record))


def _load(folder: AdapterFolder, names: list[str]) -> Any:
    """Load a tokenizer of transformers from a copy of its files, its own code not allowed."""
    from transformers import AutoTokenizer

    from peftstate._injection import temporary_folder  # imports peft, which vLLM can do without

    with temporary_folder() as place:
        for name in names:
            (place / name).write_bytes(folder.read(name))
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
