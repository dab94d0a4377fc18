"""``peftstate probe``: a server that computes something else is told from one that does not.

The server here is a real one on loopback, which computes the log-probabilities with transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from typer.testing import CliRunner

import peftstate
from peftstate._stored_probe import read_probe
from peftstate.cli.app import app
from peftstate.errors import IntegrityError, PredictionMismatchError, ServerError
from tests.conftest import IDS


def run(*arguments):
    """Run the program in this process."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["probe", *map(str, arguments)])


def log_probabilities(model, ids):
    """What a server says of a prompt: nothing of the first token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    found = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    return [None, *found[:, 0].tolist(), -1.0]  # and one token that was generated


@contextmanager
def served(models, *, parents=(), key=None, answer=log_probabilities):
    """A server with models by their names; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            listed = [{"id": name, "parent": dict(parents).get(name)} for name in models]
            self.reply(200 if self.path == "/v1/models" else 404, {"data": listed})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if key is not None and self.headers["Authorization"] != f"Bearer {key}":
                self.reply(401, {"error": "no key"})
            elif body["model"] not in models:
                self.reply(404, {"error": f"there is no model {body['model']}"})
            else:
                assert body["echo"]
                found = answer(models[body["model"]], body["prompt"])
                self.reply(200, {"choices": [{"logprobs": {"token_logprobs": found}}]})

        def log_message(self, format, *arguments):  # noqa: A002 - the name is http.server's
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(params=["fp32", "bf16"])
def kind(request):
    """The dtype of the base model."""
    return request.param


@pytest.fixture
def model(kind, load_base, with_lora):
    """A model with an adapter."""
    return with_lora(load_base(kind)).eval()


@pytest.fixture
def adapter(model, tmp_path):
    """The folder that it was saved to, with a probe."""
    model.save_pretrained(tmp_path / "poet", prediction_probe=IDS)
    return tmp_path / "poet"


def test_right_adapter(model, adapter, kind, load_base):
    """A server that computes what the saved model computed is told to be right, and how near."""
    with served({"poet": model, "base": load_base(kind)}, parents={"poet": "base"}.items()) as url:
        report = peftstate.probe(url, adapter)
        result = run(adapter, "--url", f"{url}/v1/")
    assert report.ok
    assert (report.model, report.base_model, report.tokens) == ("poet", "base", 10)
    assert report.max_difference < 1e-5
    assert report.base_max_difference > 0.1
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ok           poet: the answers are ")
    assert "  10 log-probabilities; largest difference " in result.stdout
    assert "  base, without the adapter: largest difference " in result.stdout


def test_adapter_that_is_not_applied(model, adapter, kind, load_base):
    """A server that answers as its base model does not serve the adapter, whatever the dtype."""
    base = load_base(kind)
    with served({"poet": base, "base": base}, parents={"poet": "base"}.items()) as url:
        result = run(adapter, "--url", url, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["verdict"] == "differs"
    assert found["reason"] == (
        "the answers are exactly the base model's: the adapter is not applied"
    )
    assert found["max_difference"] == found["base_max_difference"] > 0.1


def test_adapter_that_is_not_applied_and_no_base_model(adapter, kind, load_base):
    """Without a base model to compare with, the tolerance decides; float32's is narrow."""
    with served({"poet": load_base(kind)}) as url:
        report = peftstate.probe(url, adapter)
    if kind == "fp32":
        assert report.reason == "the answers are not the saved model's"
        with pytest.raises(
            PredictionMismatchError, match=r"log_probabilities: saved 0\.0"
        ) as caught:
            report.raise_for_mismatch()
        assert caught.value.__notes__ == [f"poet: {report.reason}"]
    else:
        assert report.tolerance > 0.1


def test_other_adapter(adapter, kind, load_base, with_lora):
    """Another adapter of the same shapes is told from the right one."""
    torch.manual_seed(7)
    other = with_lora(load_base(kind), lora_alpha=64).eval()
    base = load_base(kind)
    with served({"poet": other, "base": base}, parents={"poet": "base"}.items()) as url:
        result = run(adapter, "--url", url)
    assert result.exit_code == 1
    assert result.stdout.startswith("DIFFERS      poet: the base model alone is nearer ")


def test_tolerance(model, adapter, load_base, kind):
    """A tolerance of the caller's own is taken in place of the recorded dtype's."""

    def shifted(model, ids):
        return [value and value - 0.01 for value in log_probabilities(model, ids)]

    with served({"poet": model}, answer=shifted) as url:
        assert run(adapter, "--url", url, "--tolerance", "0.001").exit_code == 1
        assert run(adapter, "--url", url, "--tolerance", "0.1").exit_code == 0


def test_effect_smaller_than_rounding(load_base, with_lora, tmp_path):
    """An adapter that changes less than the dtype may round is not said to be served."""
    model = with_lora(load_base("bf16"), lora_alpha=0.02).eval()
    model.save_pretrained(tmp_path, prediction_probe=IDS)

    def noisy(model, ids):
        noise = 0.02 if hasattr(model, "peft_config") else 0.0
        return [
            value if value is None else value + noise for value in log_probabilities(model, ids)
        ]

    base = load_base("bf16")
    models, parents = {"a": model, "b": base}, {"a": "b"}.items()
    with served(models, parents=parents, answer=noisy) as url:
        result = run(tmp_path, "--url", url)
    assert result.exit_code == 3
    assert "save a longer prediction_probe" in result.stdout


def test_padded_rows(load_base, with_lora, tmp_path):
    """Padding on the right is left out of the prompts; on the left it cannot be asked."""
    model = with_lora(load_base()).eval()
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask}
    model.save_pretrained(tmp_path / "a", prediction_probe=inputs)
    prompts = read_probe(tmp_path / "a").prompts
    assert [prompt.token_ids for prompt in prompts] == [(4, 5, 6, 7, 8, 9), (10, 11, 12, 13)]
    with served({"poet": model}) as url:
        assert peftstate.probe(url, tmp_path / "a").ok
    model.save_pretrained(
        tmp_path / "b", prediction_probe={**inputs, "attention_mask": mask.flip(1)}
    )
    result = run(tmp_path / "b", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 3
    assert "the probe is padded on the left or has gaps" in result.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_stored_log_probabilities(dtype, load_base, with_lora, tmp_path):
    """What is read without torch is what torch computes from the same logits."""
    model = with_lora(load_base(dtype=getattr(torch, dtype))).to(getattr(torch, dtype)).eval()
    model.save_pretrained(tmp_path, prediction_probe=IDS)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    assert str(logits.dtype) == f"torch.{dtype}"
    expected = logits.double().log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    found = [list(prompt.log_probabilities) for prompt in read_probe(tmp_path).prompts]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)


def test_key(adapter, model, monkeypatch):
    """A key is sent if one is given, as an option or in the environment."""
    with served({"poet": model}, key="secret") as url:
        with pytest.raises(
            ServerError, match=r"completions: it answers 401 Unauthorized: .*no key"
        ):
            peftstate.probe(url, adapter)
        assert peftstate.probe(url, adapter, api_key="secret").ok
        monkeypatch.setenv("PEFTSTATE_API_KEY", "secret")
        assert run(adapter, "--url", url).exit_code == 0


def test_several_models(adapter, model, load_base):
    """With several adapters to choose from, one must be named; so must one that is served."""
    with served({"one": model, "two": model}) as url:
        with pytest.raises(ServerError, match="it serves one, two; say which one"):
            peftstate.probe(url, adapter)
        assert peftstate.probe(url, adapter, model="one").base_model is None
        result = run(adapter, "--url", url, "--model", "three")
    assert result.exit_code == 3
    assert "it answers 404 Not Found" in result.stderr


ANSWERS = {
    "no log-probabilities": (None, "without the log-probabilities"),
    "too few": ([None, -1.0], "without the log-probabilities"),
    "no numbers": ([None] * 6, "without the log-probabilities"),
    "too many": ([None, *[-1.0] * 9], "it put others in front of the prompt"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_servers_that_cannot_be_probed(case, adapter, model):
    """A server that gives something else than asked for is no evidence, for or against."""
    answer, message = ANSWERS[case]
    with served({"poet": model}, answer=lambda *_: answer) as url:
        result = run(adapter, "--url", url)
    assert result.exit_code == 3
    assert message in result.stderr


def test_no_server(adapter):
    """A server that is not there, or no server at all, ends with a message and no traceback."""
    result = run(adapter, "--url", "http://127.0.0.1:9")
    assert result.exit_code == 3
    assert "http://127.0.0.1:9/v1/models: it cannot be reached" in result.stderr
    result = run(adapter, "--url", "file:///etc/passwd")
    assert result.exit_code == 3
    assert "it must begin with http:// or https://" in result.stderr


def test_no_probe(load_base, with_lora, tmp_path):
    """A manifest without a probe says how to get one."""
    with_lora(load_base()).save_pretrained(tmp_path)
    result = run(tmp_path, "--url", "http://127.0.0.1:9")
    assert result.exit_code == 3
    assert "the manifest has no prediction probe; save the model with prediction_probe=" in (
        result.stderr
    )


def test_damaged_sidecar(adapter):
    """A sidecar that changed is an error before any server is asked."""
    path = adapter / "peftstate.tensors"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + header["predictions.logits"]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"peftstate.tensors\[predictions.logits\]"):
        peftstate.probe("http://127.0.0.1:9", adapter)
    assert run(adapter, "--url", "http://127.0.0.1:9").exit_code == 1


def test_without_torch(adapter, model):
    """The program needs no torch and no numpy."""
    with served({"poet": model}) as url:
        code = (
            "import sys, peftstate; "
            f"assert peftstate.probe({url!r}, {str(adapter)!r}).ok; "
            "assert not {'torch', 'numpy', 'peft', 'transformers'} & sys.modules.keys()"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
