"""Whether a server computes what the saved model computed: the prediction probe, over HTTP.

A server that applies another adapter, or none, or to another base model, answers all the same. The
manifest holds inputs and the logits that the saved model had for them (``prediction_probe=`` of
`save_pretrained`), and a server with an API like OpenAI's tells the log-probabilities of a prompt.

The log-probability of a token is off by no more than twice what its logits are off by, so that is
the tolerance: twice that of the section `predictions`, which comes of the coarsest dtype that the
model computed in. In float32 it is 1e-4 or so, and another adapter is off by far more. In bfloat16
it is so wide that no adapter at all may pass; then the base model decides, if the server serves it,
too: the answers must be nearer to the saved ones than the base model's are.
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from peftstate._completions import LOWEST, Server
from peftstate._diff import Mismatch
from peftstate._report import Report
from peftstate._stored_probe import Prompt, read_probe
from peftstate.errors import PredictionMismatchError, ServerError

if TYPE_CHECKING:
    from peftstate._keys import TrustedKeys


class Verdict(enum.Enum):
    """What a server's answers say."""

    OK = "ok"
    DIFFERS = "differs"
    UNDECIDED = "undecided"


@attrs.frozen(kw_only=True)
class ServedReport:
    """How a server's answers compare with the saved model's.

    Attributes:
        verdict: What follows.
        reason: Why, in a sentence.
        model: What was asked, by the server's name for it.
        base_model: The base model that was asked, too; `None` if the server serves none.
        tokens: How many log-probabilities were compared.
        max_difference: The largest difference from the saved ones, in nats.
        mean_difference: The mean one.
        base_max_difference: The largest difference of the base model's answers from the saved ones.
        base_mean_difference: The mean one.
        tolerance: What `max_difference` may be.
    """

    verdict: Verdict
    reason: str
    model: str
    base_model: str | None
    tokens: int
    max_difference: float
    mean_difference: float
    base_max_difference: float | None
    base_mean_difference: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the server serves the saved model, as far as its answers tell."""
        return self.verdict is Verdict.OK

    def raise_for_mismatch(self) -> None:
        """Do nothing if the answers are the saved model's.

        Raises:
            PredictionMismatchError: They are not, or cannot be told from the base model's.
        """
        if not self.ok:
            found = Mismatch("predictions", "log_probabilities", 0.0, self.max_difference)
            error = PredictionMismatchError(Report((found,), ("predictions",)))
            error.add_note(f"{self.model}: {self.reason}")
            raise error


def probe(
    url: str,
    adapter: str | os.PathLike[str],
    *,
    model: str | None = None,
    base_model: str | None = None,
    tolerance: float | None = None,
    api_key: str | None = None,
    timeout: float = 60.0,
    trusted_keys: TrustedKeys | None = None,
) -> ServedReport:
    """Ask a server for what the saved model predicted, and compare.

    Args:
        url: The server, such as ``"http://localhost:8000"``, with or without ``/v1``.
        adapter: The adapter's folder, or the id of a repo on the Hub.
        model: What the server calls the adapter; by default the one that it serves.
        base_model: What it calls the base model; by default what it names as the adapter's parent.
        tolerance: The largest difference of a log-probability, in nats; by default what another
            environment may make in the dtype that was recorded.
        api_key: A key that the server wants.
        timeout: Seconds that an answer may take.
        trusted_keys: As in `PeftModel.from_pretrained`: a key of these must have signed it all.

    Raises:
        ServerError: The server gave no log-probabilities.
        ManifestError: There is no manifest, or it cannot be used.
        IntegrityError: The files are not those that were saved.
        SignatureError: They were not signed with a key that is trusted.
        ValueError: The manifest has no probe, or one that no prompt can hold.
    """
    stored = read_probe(adapter, trusted_keys=trusted_keys)
    server = Server(url, api_key=api_key, timeout=timeout)
    if model is None or base_model is None:
        served = server.models()
        model = model or _only(served, server.url)
        base_model = base_model or served.get(model)
    answers = _ask(server, model, stored.prompts)
    of_base = None
    if base_model is not None and base_model != model:
        of_base = _ask(server, base_model, stored.prompts)
    saved = [max(value, LOWEST) for prompt in stored.prompts for value in prompt.log_probabilities]
    allowed = stored.tolerance if tolerance is None else tolerance
    found = _Differences.of(saved, answers)
    base = None if of_base is None else _Differences.of(saved, of_base)
    verdict, reason = _judge(
        found, base, allowed, noise=min(stored.noise, allowed), same=answers == of_base
    )
    return ServedReport(
        verdict=verdict,
        reason=reason,
        model=model,
        base_model=None if base is None else base_model,
        tokens=len(saved),
        max_difference=found.largest,
        mean_difference=found.mean,
        base_max_difference=None if base is None else base.largest,
        base_mean_difference=None if base is None else base.mean,
        tolerance=allowed,
    )


def _only(served: Mapping[str, str | None], url: str) -> str:
    """The one adapter that a server serves, or else its one model.

    Raises:
        ServerError: There are several, or none.
    """
    adapters = [name for name, parent in served.items() if parent is not None]
    found = adapters or list(served)
    if len(found) != 1:
        names = ", ".join(sorted(found)) or "none"
        raise ServerError(url, f"it serves {names}; say which one is the adapter with model=")
    return found[0]


def _ask(server: Server, model: str, prompts: Sequence[Prompt]) -> list[float]:
    """What a model answers to all prompts."""
    return [
        value for prompt in prompts for value in server.log_probabilities(model, prompt.token_ids)
    ]


@attrs.frozen
class _Differences:
    """How far answers are from the saved ones.

    Attributes:
        largest: The largest difference.
        mean: The mean of all.
    """

    largest: float
    mean: float

    @classmethod
    def of(cls, saved: Sequence[float], found: Sequence[float]) -> _Differences:
        """Compare answers with the saved ones."""
        off = [abs(one - other) for one, other in zip(saved, found, strict=True)]
        return cls(max(off), math.fsum(off) / len(off))


def _judge(
    found: _Differences, base: _Differences | None, allowed: float, *, noise: float, same: bool
) -> tuple[Verdict, str]:
    """What differences say, and why.

    Args:
        found: Those of the adapter's answers.
        base: Those of the base model's, if it was asked.
        allowed: What the largest may be.
        noise: What it may be if there was no coarser dtype than float32.
        same: Whether adapter and base model gave the same answers.
    """
    is_alone = base is None
    base = base or _Differences(math.inf, math.inf)
    cases = (
        (
            same and found.largest > noise,
            Verdict.DIFFERS,
            "the answers are exactly the base model's: the adapter is not applied",
        ),
        (
            found.largest > allowed and base.mean < found.mean,
            Verdict.DIFFERS,
            "the base model alone is nearer to the saved answers",
        ),
        (found.largest > allowed, Verdict.DIFFERS, "the answers are not the saved model's"),
        (
            is_alone,
            Verdict.OK,
            "the answers are the saved model's; there is no base model to compare them with",
        ),
        (
            base.largest > allowed,
            Verdict.OK,
            "the answers are the saved model's, and not the base model's",
        ),
        (base.largest <= noise, Verdict.OK, "the adapter changes nothing in what was asked"),
        (
            found.mean < base.mean / 2,
            Verdict.OK,
            "the answers are nearer to the saved ones than the base model's",
        ),
    )
    undecided = (
        "the adapter changes less in what was asked than the dtype may round; save a longer "
        "prediction_probe"
    )
    decided = ((verdict, reason) for applies, verdict, reason in cases if applies)
    return next(decided, (Verdict.UNDECIDED, undecided))
