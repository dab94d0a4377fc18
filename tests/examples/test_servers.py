"""The example servers, each a real process on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
import torch

import peftstate

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SEEDS = range(16)
IDS = [1, 5, 9]
NEW_TOKENS = 10
SERVERS = {"serve_fastapi.py": "/generate", "serve_litserve.py": "/predict"}


@attrs.frozen
class Server:
    """A running server.

    Attributes:
        url: Where it listens.
        generate: The path of its endpoint for text.
    """

    url: str
    generate: str

    def call(self, method, path, body=None):
        """The status and the JSON of an answer."""
        request = urllib.request.Request(  # noqa: S310 - loopback
            self.url + path,
            method=method,
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def tokens(self, seed, **fields):
        """What a seeded request is answered."""
        body = {"input_ids": IDS, "seed": seed, "max_new_tokens": NEW_TOKENS, **fields}
        status, answer = self.call("POST", self.generate, body)
        assert status == 200, answer
        return answer["tokens"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, load_base, with_lora):
    """Two adapters for one base model, and one for another base."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("first", "second")):
        torch.manual_seed(number)
        with_lora(load_base("bf16")).save_pretrained(folder / name)
    base = load_base("bf16")
    base.lm_head.weight.data += 1
    base.save_pretrained(folder / "other-base")
    with_lora(load_base("bf16", folder / "other-base")).save_pretrained(folder / "wrong")
    return folder


def start(script, base, adapter, port):
    """Start a server."""
    return subprocess.Popen(
        [
            *(sys.executable, EXAMPLES / script, "--base", base),
            *("--adapter", adapter, "--port", str(port)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=SERVERS)
def server(request, adapters, causal_lm):
    """A server of the first adapter, once it answers."""
    port = free_port()
    process = start(request.param, causal_lm, adapters / "first", port)
    with process:
        yield from answering(request.param, process, port)


def answering(script, process, port):
    """Give a server once it answers, and kill it afterwards."""
    running = Server(f"http://127.0.0.1:{port}", SERVERS[script])
    for _ in range(600):
        try:
            running.tokens(0)
            break
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.2)
    yield running
    os.killpg(process.pid, 9)


@pytest.fixture(scope="module")
def expected(adapters, load_base):
    """What each seed gives alone in a process, with each adapter."""
    found = {}
    for name in ("first", "second"):
        model = peftstate.PeftModel.from_pretrained(
            load_base("bf16"), adapters / name, is_trainable=False
        )
        for seed in SEEDS:
            by_name = {} if name == "first" else {"adapter_names": ["default"]}
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=torch.tensor([IDS]),
                attention_mask=torch.ones(1, len(IDS), dtype=torch.long),
                do_sample=True,
                max_new_tokens=NEW_TOKENS,
                **by_name,
            )
            found[name, seed] = output[0, len(IDS) :].tolist()
    return found


def test_concurrent_seeded_requests_are_as_if_alone(server, expected):
    """Sixteen clients at once, each with its seed: each gets the tokens of its seed alone."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(server.tokens, SEEDS))
    assert found == [expected["first", seed] for seed in SEEDS]
    assert len({tuple(tokens) for tokens in found}) > 8


@pytest.mark.parametrize("server", ["serve_fastapi.py"], indirect=True)
def test_adapters_are_loaded_and_verified_while_it_serves(server, adapters, expected):
    """A new adapter answers at once, one of another base is refused, and no answer is disturbed."""

    def change(number):
        wrong = server.call("PUT", "/adapters/wrong", {"path": str(adapters / "wrong")})
        right = server.call("PUT", f"/adapters/more{number}", {"path": str(adapters / "second")})
        return wrong, right

    with ThreadPoolExecutor(16) as pool:
        changes = pool.map(change, range(4))
        found = list(pool.map(server.tokens, SEEDS))
        for (status, answer), (right, _) in changes:
            assert (status, right) == (409, 200)
            assert answer["detail"].startswith("BaseModelMismatchError: ")
    assert found == [expected["first", seed] for seed in SEEDS]
    assert server.tokens(3, adapter="more0") == expected["second", 3]
    assert server.call("DELETE", "/adapters/more0")[0] == 200
    status, _ = server.call("POST", "/generate", {"input_ids": IDS, "adapter": "more0"})
    assert status == 404


@pytest.mark.parametrize("script", SERVERS)
def test_a_wrong_base_ends_the_program(script, adapters):
    """A server never answers with another base model than the saved one."""
    with start(script, adapters / "other-base", adapters / "first", free_port()) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "BaseModelMismatchError" in output
    assert "tensors[lm_head.weight].digest" in output


def test_without_it_requests_disturb_each_other(load_base):
    """What the servers prevent: threads that share a generator get each other's draws."""
    model = load_base("bf16").eval()
    ids = torch.tensor([IDS])

    def generate(seed):
        torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=20).tolist()

    alone = [generate(seed) for seed in SEEDS]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(generate, SEEDS))
    assert together != alone
