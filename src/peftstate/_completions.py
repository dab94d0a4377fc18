"""A client of OpenAI's completions API, for log-probabilities of a prompt and nothing else."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from peftstate._diff import Json, printable
from peftstate.errors import ServerError

LOWEST = -9999.0
"""What servers say for minus infinity, which JSON has no number for
(`vllm/entrypoints/openai/completion/serving.py::OpenAIServingCompletion._create_completion_logprobs`)."""

_MAX_BYTES = 64 * 1024 * 1024
_SHOWN = 300
"""Characters of a server's message that an error shows."""


class Server:
    """A server with an API like OpenAI's.

    Attributes:
        url: Where its API is, ``/v1`` included.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout: float) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ServerError(url, "it must begin with http:// or https://.")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout

    def models(self) -> dict[str, str | None]:
        """The models that it serves, and of an adapter the base model's name, as far as it says so.

        Raises:
            ServerError: It does not tell.
        """
        answer = self._get("models")
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list):
            raise ServerError(f"{self.url}/models", "it lists no models.")
        named = [entry for entry in entries if isinstance(entry, dict) and _text(entry.get("id"))]
        return {entry["id"]: _text(entry.get("parent")) for entry in named}

    def log_probabilities(self, model: str, token_ids: Sequence[int]) -> list[float]:
        """The log-probability of each token of a prompt but the first, which has none.

        Args:
            model: The model, by the server's name for it.
            token_ids: The prompt.

        Raises:
            ServerError: It gives none, or not one for each token.
        """
        answer = self._get(
            "completions",
            {
                "model": model,
                "prompt": list(token_ids),
                "echo": True,
                "logprobs": 1,
                "max_tokens": 1,  # some servers want to generate something
                "temperature": 0,
            },
        )
        try:
            values = answer["choices"][0]["logprobs"]["token_logprobs"]
            found = values[1 : len(token_ids)]
        except (KeyError, IndexError, TypeError):
            raise self._no_echo() from None
        if len(found) != len(token_ids) - 1 or not all(map(_is_number, found)):
            raise self._no_echo()
        if len(values) > len(token_ids) + 1:
            raise ServerError(
                f"{self.url}/completions",
                f"it answers with {len(values)} log-probabilities to {len(token_ids)} tokens and "
                "one more, so it put others in front of the prompt.",
            )
        return [float(value) for value in found]

    def _no_echo(self) -> ServerError:
        """The error for an answer without what was asked for."""
        return ServerError(
            f"{self.url}/completions",
            "it answers without the log-probabilities of the prompt's tokens (echo, logprobs), "
            "so it cannot be probed.",
        )

    def _get(self, path: str, body: Json = None) -> Any:
        """What the server answers, to a POST if there is a body."""
        url = f"{self.url}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, self._headers)  # noqa: S310 - http, see above
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:  # noqa: S310
                text = response.read(_MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = error.read(4 * _SHOWN).decode(errors="replace")
            reason = f"it answers {error.code} {error.reason}: {printable(said)[:_SHOWN]}"
            raise ServerError(url, reason) from error
        except (OSError, HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            raise ServerError(url, f"it cannot be reached ({cause}).") from error
        try:
            if len(text) > _MAX_BYTES:
                raise ValueError("too long")
            return json.loads(text)
        except ValueError as error:
            raise ServerError(url, f"its answer is no JSON ({error}).") from error


def _text(value: Json) -> str | None:
    """A string that is not empty."""
    return value if isinstance(value, str) and value else None


def _is_number(value: Json) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)
