"""What is said when an adapter is not to be had: in Python, and by the program."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from typer.testing import CliRunner

import peftstate
from peftstate import errors
from peftstate._hub import may_have
from peftstate.cli.app import app
from tests.hub.test_adapters import OWN, REPO, with_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning"),
]

CALLS = {
    "read_manifest": lambda name, _, **hub: peftstate.read_manifest(name, **hub),
    "verify_files": lambda name, _, **hub: peftstate.verify_files(name, **hub),
    "from_pretrained": lambda name, base, **hub: peftstate.PeftModel.from_pretrained(
        base("bf16"), name, **hub
    ),
    "auto": lambda name, _, **hub: peftstate.AutoPeftModelForCausalLM.from_pretrained(name, **hub),
}
FOLDER = "there is no such folder; the Hub's cache holds no repo of that name"


@pytest.mark.parametrize("call", CALLS)
def test_offline(load_base, client, call):
    """Offline, one error says that there is no such folder, nor such a repo in the cache."""
    client.go(online=False)
    with pytest.raises(errors.AdapterNotFoundError) as caught:
        CALLS[call]("user/nothing", load_base)
    how = "HF_HUB_OFFLINE is set"
    assert str(caught.value) == f"user/nothing: {FOLDER}; the Hub itself was not asked ({how})."
    assert isinstance(caught.value, ValueError)  # as in PEFT
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(errors.AdapterNotFoundError) as caught:
        CALLS[call]("user/nothing", load_base, revision="v1", local_files_only=True)
    assert str(caught.value) == (
        f"user/nothing at revision v1: {FOLDER}; "
        "the Hub itself was not asked (local_files_only=True)."
    )


@pytest.mark.parametrize("call", CALLS)
def test_no_network(load_base, client, call):
    """Without a network, the same error says what the connection failed of."""
    client.lose_network()
    with pytest.raises(errors.AdapterNotFoundError) as caught:
        CALLS[call]("nothing", load_base)
    assert re.fullmatch(
        rf"nothing: {re.escape(FOLDER)}, and the Hub cannot be reached \(Connect\w+: .+\)\.",
        str(caught.value),
    )
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("call", CALLS)
def test_refused(load_base, hub, client, call):
    """What the Hub refuses is the error of its own library."""
    with pytest.raises(RepositoryNotFoundError):
        CALLS[call]("user/nothing", load_base)
    hub.repo(REPO, {"adapter_config.json": b"{}"})
    with pytest.raises(RevisionNotFoundError):
        CALLS[call](REPO, load_base, revision="v1")
    hub.repo(REPO).is_gated = True
    with pytest.raises(GatedRepoError):
        CALLS[call](REPO, load_base)


def test_what_is_no_repo(client, tmp_path):
    """A path that cannot be the id of a repo is a folder without a manifest, as before."""
    with pytest.raises(errors.ManifestNotFoundError):
        peftstate.read_manifest(tmp_path / "nothing")


def run(*arguments: str) -> Any:
    """Run the program in this process."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, arguments)


@pytest.mark.parametrize("command", ["show", "verify", "base-args"])
@pytest.mark.parametrize("why", ["no network", "offline", "no repo", "gated", "no manifest"])
def test_program(hub, client, command, why):
    """The program says in one line what is wrong, and exits with 3: nothing was compared."""
    hub.repo(REPO, {"adapter_config.json": b"{}"}).is_gated = why == "gated"
    if why == "no network":
        client.lose_network()
    elif why == "offline":
        client.go(online=False)
    result = run(command, "user/nothing" if why == "no repo" else REPO)
    assert result.exit_code == 3
    text = result.output.strip().splitlines()
    if command == "verify":
        assert text.pop(0) == f"NOT VERIFIED {'user/nothing' if why == 'no repo' else REPO}"
    (line,) = text
    expected = {
        "no network": "AdapterNotFoundError: user/adapter: there is no such folder",
        "offline": "AdapterNotFoundError: user/adapter: there is no such folder",
        "no repo": "RepositoryNotFoundError: 404 Client Error",
        "gated": "GatedRepoError: 403 Client Error",
        "no manifest": "ManifestNotFoundError: ",
    }
    assert line.strip().startswith(expected[why])


@pytest.fixture
def on_the_hub(hub, client, load_base):
    """An adapter on the Hub, and a plain one."""
    with_adapters(load_base("bf16"), "default").push_to_hub(REPO)
    plain = {name: hub.repo(REPO).files()[name] for name in OWN[:2]}
    hub.repo("user/plain", plain)


def test_transformers_own_load(on_the_hub, client):
    """Of an adapter of the Hub that transformers loads by itself, it is told, and it is loaded."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    with peftstate.installed():
        with pytest.warns(errors.UnverifiedWarning, match="transformers loaded this adapter by"):
            model = load(REPO)
        assert any("lora_A" in name for name, _ in model.named_parameters())
        with warnings.catch_warnings():  # that it has none is seen
            warnings.simplefilter("error", errors.UnverifiedWarning)
            load("user/plain")
    for lose in (client.lose_network, lambda: client.go(online=False)):
        lose()  # whether it has one cannot be seen
        try:
            load("user/plain")
        except OSError:  # huggingface_hub 0 has PEFT ask the Hub for what is in the cache
            continue
        telling = pytest.warns(errors.UnverifiedWarning, match="transformers loaded this adapter")
        with peftstate.installed(), telling:
            load("user/plain")


def test_may_have(on_the_hub, hub, client):
    """Only the Hub's own word is taken for it that a file is missing."""
    assert may_have(REPO, "peftstate.json")
    assert not may_have("user/plain", "peftstate.json")
    assert may_have("user/nothing", "peftstate.json")
    assert may_have("no/repo/id", "peftstate.json")
    hub.is_down = True
    assert may_have("user/plain", "peftstate.tensors")
