"""The files of code that a checkpoint brought with it (``trust_remote_code=True``).

transformers copies them into a package of its own and imports them from there. What is recorded
says which code ran; nothing of it is ever handed back to an import.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from peftstate._digest import file_digest

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView

PACKAGE = "transformers_modules"
"""transformers' name of that package (`TRANSFORMERS_DYNAMIC_MODULE_NAME`)."""
_VERSION = re.compile("_?[0-9a-f]{16,64}")
"""A commit, or a digest of the files, which transformers puts between a repo's name and its files:
the same files at another commit are the same code."""


def remote_code(view: ModelView) -> dict[str, str | None]:
    """The SHA-256 of each file that the base model's classes came from, relative imports included.

    A file goes by its own name, since checkpoints are moved about; where two repos have one of the
    same name, by the repo's and its own. `None` stands for one that cannot be read any more.
    """
    digests: dict[tuple[str, str], str | None] = {}
    for module in _modules(view):
        repo = [part for part in module.split(".")[1:-1] if not _VERSION.fullmatch(part)]
        for file in _files(module):
            digests["/".join(repo), file.name] = _digest(file)
    repos = Counter(name for _, name in digests)
    return {
        f"{repo}/{name}" if repos[name] > 1 else name: digest
        for (repo, name), digest in sorted(digests.items())
    }


def _modules(view: ModelView) -> set[str]:
    """The names of the modules of remote code that the base model's classes are in."""
    objects = [module for _, module in view.base_modules()]
    classes = {cls for item in (*objects, getattr(view.base, "config", None)) for cls in _mro(item)}
    return {cls.__module__ for cls in classes if cls.__module__.startswith(f"{PACKAGE}.")}


def _mro(item: object) -> tuple[type, ...]:
    """The classes of an object."""
    return type(item).__mro__


def _files(module: str) -> list[Path]:
    """A module's file, and those of the modules that it imports from beside it."""
    from transformers.dynamic_module_utils import get_relative_import_files

    unknown = f"{module.rpartition('.')[2]}.py"
    file = Path(getattr(sys.modules.get(module), "__file__", None) or unknown)
    try:
        imported = get_relative_import_files(file)
    except OSError:  # the cache of modules was emptied meanwhile
        imported = []
    return [file, *map(Path, imported)]


def _digest(file: Path) -> str | None:
    """The SHA-256 of a file; `None` if it cannot be read."""
    try:
        return file_digest(file.read_bytes())
    except OSError:
        return None
