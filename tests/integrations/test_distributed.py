"""Several real processes over gloo: what they save is one state, and each gets its own back."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import peftstate
from peftstate._rank_files import rank_file_name, read_rank_file
from peftstate.errors import RankStateWarning

WORKERS = Path(__file__).parent / "workers"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


def launch(*command):
    """Start processes by a launcher, and wait for them."""
    source = str(Path(peftstate.__file__).parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def told(folder, name, count):
    """What each process left."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(count)]


def rank_names(count):
    """The names of the files of further ranks."""
    return [rank_file_name(rank, count) for rank in range(1, count)]


@pytest.fixture(scope="module")
def trained(causal_lm, tmp_path_factory):
    """A training by two processes, with the callback: the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    launch(*TORCHRUN, 2, WORKERS / "train.py", causal_lm, folder, "--callback")
    return folder


def test_a_trainer_of_two_processes(trained):
    """Checkpoints and the final save have one manifest and a file of the further rank."""
    for name in ("checkpoint-2", "checkpoint-4", "final"):
        folder = trained / name
        found = sorted(path.name for path in folder.glob("*peftstate*"))
        assert found == ["peftstate.json", *rank_names(2), "peftstate.tensors"]
        report = peftstate.verify_files(folder)
        assert report.ok
        assert not any("rank" in note.replace("rng_state", "") for note in report.notes)
        process = peftstate.read_manifest(folder).sections["rng"].process
        assert (process.rank, process.world_size) == (0, 2)
    assert len(set(told(trained, "drawn", 2))) == 2


@pytest.mark.skipif(
    transformers.__version__ < "5",
    reason="transformers 4.56 looks for the optimizer's state on cpu:0, which torch does not know",
)
def test_resuming_behind_the_launchers_goes_on_bit_for_bit(trained, causal_lm, tmp_path):
    """`torchrun -m peftstate run` resumes an unedited script as if it had not been interrupted."""
    resumed = tmp_path / "resumed"
    script = ("-m", "peftstate", "run", WORKERS / "train.py")
    resume = ("--resume", trained / "checkpoint-2")
    launch(*TORCHRUN, 2, *script, causal_lm, resumed, *resume)
    for name in ("adapter_model.safetensors", "peftstate.tensors"):
        expected, found = (
            safetensors.torch.load_file(run / "checkpoint-4" / name) for run in (trained, resumed)
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    (name,) = rank_names(2)
    files = [run / "checkpoint-4" / name for run in (trained, resumed)]
    records = [read_rank_file(file.read_bytes(), path=str(file)) for file in files]
    assert records[0] == records[1]
    assert told(trained, "drawn", 2) == told(resumed, "drawn", 2)


def test_one_process_loads_what_two_saved(trained, causal_lm):
    """The random generators are those of rank 0, and a warning says so."""
    base = transformers.AutoModelForCausalLM.from_pretrained(causal_lm, dtype=torch.float32)
    with pytest.warns(RankStateWarning, match="saved by 2 processes and is loaded by 1"):
        peftstate.PeftModel.from_pretrained(base, trained / "final")
    assert torch.rand(()).item() == told(trained, "drawn", 2)[0]


@pytest.fixture(scope="module")
def four_ranks(causal_lm, tmp_path_factory):
    """What four ranks saved without a trainer, and what each of them told."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(*TORCHRUN, 4, WORKERS / "ranks.py", causal_lm, folder, "ddp", "fsdp")
    return folder, told(folder, "rank", 4)


def test_saves_wait_for_no_other_rank(four_ranks):
    """Four ranks save one after the other, the main one last; each gets its own state back."""
    folder, results = four_ranks
    found = [result["ddp"] for result in results]
    assert [result["drawn"] for result in found] == [result["again"] for result in found]
    assert len({result["drawn"] for result in found}) == 4
    assert all(result["equal"] for result in found)
    names = sorted(path.name for path in (folder / "ddp").glob("peftstate.rank*"))
    assert names == rank_names(4)


def test_what_fsdp_shards_is_never_gathered_by_us(four_ranks, causal_lm):
    """One rank saves the tensors that were gathered; the base's shards are not checkable."""
    folder, results = four_ranks
    found = results[0]["fsdp"]
    assert found["class"] == "FSDPPeftModelForCausalLM"
    assert re.match(
        r"The state of the model cannot be saved: the adapter's tensor '\S+lora_A\S*' is a shard "
        r"of FSDP's; gather the tensors on all ranks with \S+get_model_state_dict, and pass them "
        r"as state_dict=\. No old file was replaced\.",
        found["refusal"],
    )
    manifest = peftstate.read_manifest(folder / "fsdp")
    assert {record.digest for record in manifest.sections["base_model"].tensors.values()} == {None}
    base = transformers.AutoModelForCausalLM.from_pretrained(causal_lm, dtype=torch.float32)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        loaded = peftstate.PeftModel.from_pretrained(base, folder / "fsdp")
    gathered = torch.load(folder / "fsdp-0.pt", weights_only=True)
    live = loaded.state_dict()
    assert gathered
    assert all(torch.equal(live[name], tensor) for name, tensor in gathered.items())
    names = sorted(path.name for path in (folder / "fsdp").glob("peftstate.rank*"))
    assert names == rank_names(4)
    report = peftstate.verify_files(folder / "fsdp")
    assert report.ok
    assert not any("rank" in note for note in report.notes)


def test_accelerate_states_of_two_processes(causal_lm, tmp_path):
    """`load_state` goes on with the numbers and the weights of `save_state`, on each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch(
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2),
        *("--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", port, WORKERS / "accelerated.py", causal_lm, tmp_path),
    )
    found = told(tmp_path, "state", 2)
    assert [result["count"] for result in found] == [2, 2]
    assert all(result["equal"] for result in found)
    assert [result["drawn"] for result in found] == [result["again"] for result in found]
    adapter = tmp_path / "state" / "adapter"
    assert [path.name for path in adapter.glob("*rank*")] == rank_names(2)
    assert peftstate.verify_files(adapter).ok
    assert not list((tmp_path / "state").glob("model*"))
