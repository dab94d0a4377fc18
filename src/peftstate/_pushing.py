"""Pushing to the Hub: what transformers pushes in place of a model, and what its method takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from transformers.utils.hub import PushToHubMixin

F = TypeVar("F", bound=Callable[..., Any])


class PushedModel(PushToHubMixin):
    """What is pushed in place of a model, so that it is saved with further arguments.

    transformers names the commit by the class.

    Args:
        save: Saves the model into a folder.
    """

    def __init__(self, save: Callable[..., None]) -> None:
        self._save = save

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model, as transformers asks for before it uploads."""
        self._save(*args, **kwargs)


def with_parameters_of_push(method: F) -> F:
    """Have a method show the parameters of transformers' `push_to_hub` in place of ``**kwargs``.

    They differ between transformers 4 and 5, and Unsloth makes a function of the signature's text.
    """
    theirs = list(inspect.signature(PushToHubMixin.push_to_hub).parameters.values())
    rest = [theirs.pop()] if theirs[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    signature = inspect.signature(method)
    added = [it for it in signature.parameters.values() if it.kind is it.KEYWORD_ONLY]
    shown: Any = method
    shown.__signature__ = signature.replace(parameters=[*theirs, *added, *rest])
    return method
