"""`tokenizer`: what turns text into the model's inputs.

PEFT does not save it. Another vocabulary gives other inputs, another chat template other prompts,
and padding on the other side another answer to all but the longest prompt of a batch.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._digest import file_digest, json_digest
from peftstate.errors import TokenizerMismatchError
from peftstate.sections._base import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftstate.sections._view import ModelView

CANARIES = {
    "long": (
        "Ça coûte 1 234 567,89 € — naïve Œuvre, Ωμέγα, 漢字かな, שלום 🙂👩‍🚀\r\n\n"
        "\tif x_1 >= 0x1F and not done:\n        return  'don\\'t' + \"<b>\"  # HTTP/2  \n"
    ),
    "short": " Hello world",
}
"""Texts whose ids tell what no setting does: how text is normalised and cut up, and which special
tokens are put around it."""
RESTORED = frozenset(
    {"padding_side", "truncation_side", "model_max_length", "chat_templates", "template_ids"}
)
"""The fields that a load sets, and the one that follows from them."""
SIDES = ("left", "right")
_TEMPLATE_NAME = re.compile(r"\w[\w .-]*")
"""What chat templates may be called: a tokenizer that is saved writes each to a file of its name
(`transformers/tokenization_utils_base.py::save_chat_templates`)."""
NO_LIMIT = int(1e30)
"""What transformers takes as the maximum length of a tokenizer that has none."""


@attrs.frozen(kw_only=True)
class AddedToken:
    """A token that was added to a vocabulary.

    Attributes:
        id: Its id.
        special: Whether decoding can skip it.
        single_word: Whether it is found in whole words only.
        lstrip: Whether it takes the space before it.
        rstrip: Whether it takes the space after it.
        normalized: Whether it is looked for in normalised text.
    """

    id: int
    special: bool
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool


@attrs.frozen(kw_only=True)
class Canary:
    """What a tokenizer makes of a text.

    Attributes:
        ids: The ids, with spaces between them.
        decoded: What it makes of these, special tokens skipped.
    """

    ids: str
    decoded: str


@attrs.frozen(kw_only=True)
class TokenizerRecord:
    """A tokenizer.

    Attributes:
        kind: Its class. Another one that does the same is no difference.
        size: How many tokens it has.
        vocabulary: BLAKE3 over the tokens that it has by itself, their ids, and how they are found.
        added_tokens: Those that were added behind them.
        special_tokens: Ids of the special tokens by their roles, such as ``"eos_token"``.
        canaries: What it makes of two fixed texts, ``"long"`` and ``"short"``; empty if it takes no
            plain text.
        padding_side: Where a batch is padded: ``"left"`` or ``"right"``.
        truncation_side: Where a long text is cut: ``"left"`` or ``"right"``.
        model_max_length: The maximum length, or `None`.
        chat_templates: The chat templates by name; the usual one is ``"default"``.
        template_ids: BLAKE3 over the ids of the templates' own text: whether the marks in them are
            tokens. Nothing is rendered.
        files: The files that it writes when it is saved: name → SHA-256; `None` if that is not
            known (schema 1). Where they lie beside the adapter unchanged, a load need not look
            into them. Other files of the same tokenizer are no difference.
    """

    kind: str
    size: int
    vocabulary: str
    added_tokens: Mapping[str, AddedToken]
    special_tokens: Mapping[str, int]
    canaries: Mapping[str, Canary]
    padding_side: str
    truncation_side: str
    model_max_length: int | None
    chat_templates: Mapping[str, str]
    template_ids: str | None
    files: Mapping[str, str] | None


def tokenizer_of(given: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer in what was given: itself, or a processor's; an image processor has none."""
    if given is None:
        return None
    from transformers import PreTrainedTokenizerBase

    for candidate in (given, getattr(given, "tokenizer", None)):
        if isinstance(candidate, PreTrainedTokenizerBase):
            return candidate
    return None


def _is_given(view: ModelView) -> bool:
    """Whether there is a tokenizer to look at."""
    return tokenizer_of(view.tokenizer) is not None


def capture(view: ModelView) -> TokenizerRecord:
    """Describe the tokenizer."""
    return _describe(view, _files(view.tokenizer))


def _files(owner: Any) -> dict[str, str] | None:
    """What a tokenizer, or a processor, writes when it is saved; `None` if there is no place."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            owner.save_pretrained(folder)
            files = sorted(path for path in Path(folder).iterdir() if path.is_file())
            return {path.name: file_digest(path.read_bytes()) for path in files}
    except OSError:
        return None


def _describe(view: ModelView, files: Mapping[str, str] | None) -> TokenizerRecord:
    """The record of a tokenizer that writes certain files."""
    tokenizer: Any = tokenizer_of(view.tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    behind = {id_: token for id_, token in added.items() if id_ >= tokenizer.vocab_size}
    with _left_alone(tokenizer):
        return TokenizerRecord(
            kind=type(tokenizer).__name__,
            size=len(tokenizer),
            vocabulary=_vocabulary(tokenizer, added, behind),
            added_tokens={
                token.content: AddedToken(id=id_, **_flags(token))
                for id_, token in sorted(behind.items())
            },
            special_tokens=_special_tokens(tokenizer),
            canaries=_canaries(tokenizer),
            files=files,
            **_settings(view),
        )


def _vocabulary(tokenizer: Any, added: Mapping[int, Any], behind: Mapping[int, Any]) -> str:
    """The digest of the tokens that were not added behind the vocabulary."""
    ids = dict(tokenizer.get_vocab())
    for token in behind.values():
        ids.pop(token.content, None)
    flags = {id_: _flags(token) for id_, token in added.items() if id_ not in behind}
    return json_digest([ids, flags])


def _flags(token: Any) -> dict[str, bool]:
    """How an added token is looked for."""
    names = ("special", "single_word", "lstrip", "rstrip", "normalized")
    return {name: bool(getattr(token, name)) for name in names}


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of the special tokens that are set, by their roles."""
    found = {
        name: getattr(tokenizer, f"{name}_id", None)
        for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES
        if name.endswith("_token")  # beside them is a list of names that have none
    }
    return {name: value for name, value in found.items() if value is not None}


def _canaries(tokenizer: Any) -> dict[str, Canary]:
    """What a tokenizer makes of fixed texts."""
    found = {}
    for name, text in CANARIES.items():
        ids = _ids(tokenizer, text)
        if ids is not None:
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            found[name] = Canary(ids=" ".join(map(str, ids)), decoded=decoded)
    return found


def _ids(tokenizer: Any, text: str) -> list[int] | None:
    """The ids of a text; `None` if the tokenizer wants words and boxes, or tables, or the like."""
    try:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    except (AttributeError, TypeError, ValueError):
        return None
    return ids


@contextmanager
def _left_alone(tokenizer: Any) -> Iterator[None]:
    """Put back the padding and the truncation that calling a tokenizer sets in its back end."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    padding, truncation = backend.padding, backend.truncation
    special = backend.encode_special_tokens
    try:
        yield
    finally:
        backend.encode_special_tokens = special
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def _settings(view: ModelView) -> dict[str, Any]:
    """The fields that are restored, and what follows from them."""
    tokenizer: Any = tokenizer_of(view.tokenizer)
    templates = _templates(view)
    ids = [_ids(tokenizer, text) for _, text in sorted(templates.items())]
    return {
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "model_max_length": _limit(tokenizer),
        "chat_templates": templates,
        "template_ids": json_digest(ids) if templates else None,
    }


def _limit(tokenizer: Any) -> int | None:
    """The maximum length, if there is one."""
    limit = tokenizer.model_max_length
    return None if limit is None or limit >= NO_LIMIT else int(limit)


def _template_owners(view: ModelView) -> list[Any]:
    """What holds chat templates: a processor before its tokenizer."""
    owners = [view.tokenizer, tokenizer_of(view.tokenizer)]
    return [owner for owner in owners[: 1 + (owners[0] is not owners[1])] if owner is not None]


def _templates(view: ModelView) -> dict[str, str]:
    """The chat templates that are in effect."""
    found = (getattr(owner, "chat_template", None) for owner in _template_owners(view))
    templates: Any = next((value for value in found if value), {})
    return {"default": templates} if isinstance(templates, str) else dict(templates)


def capture_like(view: ModelView, record: TokenizerRecord) -> TokenizerRecord:
    """Capture for a comparison. The class has other names in other releases; it decides nothing."""
    found = _describe(view, record.files)
    restored = {name: getattr(record, name) for name in RESTORED}
    does_the_same = attrs.evolve(found, kind=record.kind, **restored) == record
    return attrs.evolve(found, kind=record.kind) if does_the_same else found


def capture_restored(view: ModelView, record: TokenizerRecord) -> TokenizerRecord:
    """Look at what was restored; the rest was compared before the base model was touched."""
    with _left_alone(tokenizer_of(view.tokenizer)):
        return attrs.evolve(record, **_settings(view))


def restore(record: TokenizerRecord, view: ModelView) -> None:
    """Set the sides, the maximum length and the chat templates on the tokenizer that was given.

    A template is a program of the prompt's author, here as in the tokenizer's own files; it is
    not run here, and transformers runs it in a sandbox
    (`transformers/utils/chat_template_utils.py`).
    """
    tokenizer: Any = tokenizer_of(view.tokenizer)
    for name in ("padding_side", "truncation_side"):
        side = getattr(record, name)
        if side in SIDES and getattr(tokenizer, name) != side:
            setattr(tokenizer, name, side)
    if _limit(tokenizer) != record.model_max_length:
        limit = record.model_max_length
        tokenizer.model_max_length = NO_LIMIT if limit is None else limit
    if _templates(view) != record.chat_templates:
        for name in record.chat_templates:
            if not _TEMPLATE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be the name of a chat template")
        _set_templates(view, record.chat_templates)


def _set_templates(view: ModelView, templates: Mapping[str, str]) -> None:
    """Set the chat templates of the first that can hold any, and of the others that hold some."""
    alone = list(templates) == ["default"]
    value = templates["default"] if alone else dict(templates) or None
    for number, owner in enumerate(_template_owners(view)):
        if number == 0 or getattr(owner, "chat_template", None):
            owner.chat_template = value


@contextmanager
def put_back_on_failure(view: ModelView) -> Iterator[None]:
    """Leave the tokenizer as it was if the body fails."""
    owners = [*_template_owners(view), tokenizer_of(view.tokenizer)]
    names = ("padding_side", "truncation_side", "model_max_length", "chat_template")
    before = [
        (owner, {name: vars(owner)[name] for name in names if name in vars(owner)})
        for owner in owners
        if owner is not None
    ]
    try:
        yield
    except BaseException:
        for owner, values in before:
            vars(owner).update(values)
        raise


SECTION = Section(
    name="tokenizer",
    record=TokenizerRecord,
    capture=capture,
    capture_like=capture_like,
    capture_restored=capture_restored,
    restore=restore,
    restored=RESTORED,
    checked_on_base=True,
    is_captured=_is_given,
    error=TokenizerMismatchError,
)
