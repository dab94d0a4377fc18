"""A real vLLM, on the CPU: what it loads with peftstate's plugin, what it refuses, and the probe.

vLLM needs an environment of its own, whose interpreter is told by ``--python`` or the variable
PEFTSTATE_VLLM_PYTHON; `make vllm` makes one. The models are made here, tiny and with random
weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import attrs
import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import peftstate
from benchmarks import _page

_PATIENCE = 600.0
"""Seconds that a server may take to start."""
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
_SMALL = ("--max-model-len", "64", "--max-num-seqs", "2", "--enforce-eager")
"""Options that have a server start sooner."""
_PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
print("PARSED", json.dumps({
    "model_tag": found.model_tag, "dtype": str(found.dtype), "enable_lora": found.enable_lora,
    "max_lora_rank": found.max_lora_rank, "lora_dtype": str(found.lora_dtype),
    "lora_modules": [[module.name, module.path] for module in found.lora_modules],
}))
"""
"""Has vLLM's own parser take arguments, and prints what it made of them."""


@attrs.frozen
class Workshop:
    """Models and adapters on disk.

    Attributes:
        folder: The folder with all of them.
    """

    folder: Path

    @property
    def adapters(self) -> Path:
        """The folder of the adapters."""
        return self.folder / "adapters"

    def base(self, name: str, seed: int, **fields: Any) -> Path:
        """Make a base model, with a tokenizer that takes words apart into letters."""
        path = self.folder / name
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **fields,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(path)
        backend = Tokenizer(models.WordLevel({chr(n): n for n in range(128)}, "?"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token=chr(0), bos_token=chr(1), eos_token=chr(2)
        ).save_pretrained(path)
        return path

    def adapter(self, name: str, base: Path, *, dtype: str = "float32", **fields: Any) -> Path:
        """Train nothing, but save an adapter that changes what the base model says."""
        path = self.adapters / name
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, dtype)
        )
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        torch.manual_seed(len(name))
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False, **{**options, **fields}
        )
        peftstate.get_peft_model(model, config).save_pretrained(path, prediction_probe=True)
        return path


@contextmanager
def served(
    python: str, log: Path, arguments: Sequence[str], **environment: str
) -> Iterator[str | None]:
    """A server in a process of its own: its URL, or `None` if it ended instead of serving."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *arguments, *_SMALL]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ENVIRONMENT, **environment},
            cwd=log.parent,
            start_new_session=True,
        )
        try:
            yield url if _is_up(process, url) else None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _is_up(process: subprocess.Popen[bytes], url: str) -> bool:
    """Wait until a server answers, or has ended.

    Raises:
        TimeoutError: Neither came.
    """
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310
                return True
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"the server did not start within {_PATIENCE:.0f} s")


def post(url: str, body: Mapping[str, Any]) -> tuple[int, str]:
    """What a server answers: the status and the text."""
    request = urllib.request.Request(  # noqa: S310
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@attrs.define
class Checks:
    """What was expected of vLLM and what came.

    Attributes:
        rows: The cells of the table.
        failed: What was not as expected.
    """

    rows: list[tuple[str, str, str]] = attrs.field(factory=list)
    failed: list[str] = attrs.field(factory=list)

    def add(self, what: str, how: str, found: str, *, holds: bool) -> None:
        """Note one check."""
        print(f"{'ok' if holds else 'FAILED':<7} {what} | {how} | {found}", flush=True)
        self.rows.append((what, how, found))
        if not holds:
            self.failed.append(what)


@attrs.frozen(kw_only=True)
class Refusal:
    """An adapter that vLLM is to refuse.

    Attributes:
        name: Its name, and that of its folder.
        what: What is wrong with it.
        message: What must be in the answer.
        resolves: Whether the resolver finds it for the server's base model.
    """

    name: str
    what: str
    message: str
    resolves: bool = True


REFUSALS = (
    Refusal(
        name="edited",
        what="a byte of its weights changed",
        message="The file changed after it was saved",
    ),
    Refusal(
        name="of-another-config",
        what="trained on a base model with another `rms_norm_eps`",
        message="base_model.config.rms_norm_eps: saved 0.1, found 1e-06",
        resolves=False,
    ),
    Refusal(
        name="half",
        what="trained in bfloat16, engine in float32",
        message="dtype.base.default: saved 'bfloat16', found 'float32'",
    ),
    Refusal(
        name="rank-16",
        what="rank 16, engine started with 8",
        message="adapters.rank: saved 16, found '--max-lora-rank 8'",
    ),
    Refusal(
        name="scaled",
        what="scaling set by hand",
        message="scaling: it was set by hand, and vLLM computes it from the config",
    ),
)


def make(folder: Path) -> Workshop:
    """Make all models and adapters."""
    shop = Workshop(folder)
    base = shop.base("base", seed=0)
    shop.base("other-base", seed=1)
    shop.adapter("poet", base)
    shop.adapter("rhymer", base)
    shop.adapter("half", base, dtype="bfloat16")
    shop.adapter("rank-16", base, r=16)
    shop.adapter("of-another-config", shop.base("eps-base", seed=0, rms_norm_eps=0.1))
    model = peftstate.AutoPeftModelForCausalLM.from_pretrained(
        shop.adapters / "poet", is_trainable=False
    )
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 0.5
    model.save_pretrained(shop.adapters / "scaled")
    edited, plain = (shop.adapters / name for name in ("edited", "plain"))
    shutil.copytree(shop.adapters / "poet", edited)
    shutil.copytree(shop.adapters / "poet", plain)
    weights = edited / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (plain / "peftstate.json").unlink()
    return shop


def plain_quotes(answer: str) -> str:
    """An answer without the escapes of JSON."""
    return answer.replace('\\"', '"')


def shown(answer: str, message: str) -> str:
    """An answer in a cell: what of it is peftstate's, or its beginning."""
    return f"`… {message} …`" if message in plain_quotes(answer) else f"`{answer[:160]}`"


def check_parser(checks: Checks, shop: Workshop, python: str) -> list[str]:
    """Have vLLM parse what `peftstate vllm-args` prints, and give the arguments of a server."""
    command = [sys.executable, "-m", "peftstate", "vllm-args", str(shop.adapters / "poet")]
    command += ["--base", str(shop.folder / "base"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    arguments: list[str] = json.loads(done.stdout)["arguments"]
    parsing = subprocess.run(  # noqa: S603
        [python, "-c", _PARSE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **_ENVIRONMENT},
    )
    lines = [line for line in parsing.stdout.splitlines() if line.startswith("PARSED ")]
    found = json.loads(lines[0].removeprefix("PARSED ")) if lines else {"error": parsing.stderr}
    expected = {
        "model_tag": str(shop.folder / "base"),
        "dtype": "float32",
        "enable_lora": True,
        "max_lora_rank": 8,
        "lora_dtype": "auto",
        "lora_modules": [["poet", str(shop.adapters / "poet")]],
    }
    cell = ", ".join(
        f"`{key}={value}`"
        for key, value in found.items()
        if key not in ("model_tag", "lora_modules")
    )
    what = "`peftstate vllm-args poet`"
    checks.add(what, "parsed by vLLM's own parser", cell, holds=found == expected)
    return ["--model", *arguments]


def check_loads(checks: Checks, shop: Workshop, url: str, log: Path) -> None:
    """Load adapters into a running server, good and bad."""
    for refusal in REFUSALS:
        status, answer = load(shop, url, refusal.name)
        found = f"{status}: {shown(answer, refusal.message)}"
        holds = status >= HTTPStatus.BAD_REQUEST and refusal.message in plain_quotes(answer)
        checks.add(refusal.what, "`POST /v1/load_lora_adapter`", found, holds=holds)
        if not refusal.resolves:
            continue
        before = logged(log).count(refusal.message)
        body = {"model": refusal.name, "prompt": [5, 6, 7], "max_tokens": 1}
        status, _ = post(f"{url}/v1/completions", body)
        is_logged = logged(log).count(refusal.message) > before
        where = "the same in the log" if is_logged else "nothing in the log"
        holds = status >= HTTPStatus.BAD_REQUEST and is_logged
        checks.add(
            refusal.what, "first request, by the resolver", f"{status}, {where}", holds=holds
        )
    for name, what in (("rhymer", "as it was saved"), ("plain", "no manifest")):
        status, _ = load(shop, url, name)
        loads = status == HTTPStatus.OK
        checks.add(what, "`POST /v1/load_lora_adapter`", f"{status}", holds=loads)
    warned = "there is no peftstate manifest; it is loaded unverified." in logged(log)
    checks.add("no manifest", "log", "a warning" if warned else "nothing", holds=warned)


def load(shop: Workshop, url: str, name: str) -> tuple[int, str]:
    """Have a running server load an adapter."""
    body = {"lora_name": name, "lora_path": str(shop.adapters / name)}
    return post(f"{url}/v1/load_lora_adapter", body)


def logged(log: Path) -> str:
    """What a server has logged so far."""
    return log.read_text(encoding="utf-8", errors="replace")


def check_probe(
    checks: Checks,
    shop: Workshop,
    url: str,
    what: str,
    *,
    model: str,
    base_model: str | None = None,
    fits: bool,
) -> None:
    """Probe a server, and note what it says."""
    report = peftstate.probe(url, shop.adapters / "poet", model=model, base_model=base_model)
    found = (
        f"{report.verdict.value}: off by {report.max_difference:.2g}, allowed "
        f"{report.tolerance:.2g}; {report.reason}"
    )
    checks.add(what, "`peftstate probe poet`", found, holds=report.ok is fits)


def check_all(shop: Workshop, python: str, logs: Path) -> Checks:
    """Have vLLM parse arguments, start real servers, and check all of it."""
    checks = Checks()
    arguments = check_parser(checks, shop, python)
    check_right(checks, shop, python, logs / "right.log", arguments)
    check_static(checks, shop, python, logs / "static.log", arguments)
    check_other_base(checks, shop, python, logs / "other.log", arguments)
    return checks


def check_right(
    checks: Checks, shop: Workshop, python: str, log: Path, arguments: Sequence[str]
) -> None:
    """A server that is started as the manifest says, on the right base model."""
    base = str(shop.folder / "base")
    names = ["--served-model-name", base, "without-adapter"]
    resolver = {"VLLM_LORA_RESOLVER_CACHE_DIR": str(shop.adapters)}
    with served(python, log, [*arguments, *names], **resolver) as url:
        found = "serves" if url else "ended"
        checks.add("as it was saved", "`--lora-modules`", found, holds=url is not None)
        if url is None:
            return
        check_loads(checks, shop, url, log)
        check_probe(checks, shop, url, "the right adapter", model="poet", fits=True)
        what = "the adapter is not applied"
        check_probe(checks, shop, url, what, model="without-adapter", base_model=base, fits=False)
        check_probe(checks, shop, url, "another adapter", model="rhymer", fits=False)


def check_static(
    checks: Checks, shop: Workshop, python: str, log: Path, arguments: Sequence[str]
) -> None:
    """A server that is started with an adapter that changed."""
    wrong = [*arguments, "--lora-modules", f"edited={shop.adapters / 'edited'}"]
    message = REFUSALS[0].message
    with served(python, log, wrong) as url:
        found = "serves" if url else f"does not start: {shown(logged(log), message)}"
        holds = url is None and message in logged(log)
        checks.add(REFUSALS[0].what, "`--lora-modules`", found, holds=holds)


def check_other_base(
    checks: Checks, shop: Workshop, python: str, log: Path, arguments: Sequence[str]
) -> None:
    """A server of another base model of the same config, which only the probe tells."""
    base, other = str(shop.folder / "base"), str(shop.folder / "other-base")
    replaced = [other if item == base else item for item in arguments]
    with served(python, log, replaced, PEFTSTATE_VLLM_REQUIRE_MANIFEST="1") as url:
        what = "another base model of the same config"
        found = "serves: the weights that vLLM holds cannot be compared" if url else "ended"
        checks.add(what, "`--lora-modules`", found, holds=url is not None)
        if url is None:
            return
        check_probe(checks, shop, url, what, model="poet", fits=False)
        status, answer = load(shop, url, "plain")
        message = "there is no peftstate manifest"
        holds = status >= HTTPStatus.BAD_REQUEST and message in answer
        what = "no manifest, `PEFTSTATE_VLLM_REQUIRE_MANIFEST=1`"
        found = f"{status}: {shown(answer, message)}"
        checks.add(what, "`POST /v1/load_lora_adapter`", found, holds=holds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, and print or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=os.environ.get("PEFTSTATE_VLLM_PYTHON"))
    parser.add_argument("--logs", type=Path, help="a folder to keep the servers' logs in")
    parser.add_argument("--write", action="store_true", help="put the table into docs/vllm.md")
    options = parser.parse_args(arguments)
    if not options.python:
        print("SKIPPED: there is no vLLM; `make vllm` installs one in an environment of its own.")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        checks = check_all(make(Path(folder, "models")), options.python, logs)
    table = _page.Table(
        name="vllm",
        command="make vllm",
        columns=("", "how", "what vLLM did"),
        rows=checks.rows,
        note=f"{len(checks.rows)} checks, {len(checks.failed)} not as promised.",
    )
    if options.write:
        _page.write(table, "vllm.md")
    return bool(checks.failed)


if __name__ == "__main__":
    raise SystemExit(main())
