"""The random generators of several processes: a file for each rank, sealed by itself.

The processes are played by this one, which is told which rank it is as `torchrun` tells it;
`tests/integrations` has real ones.
"""

from __future__ import annotations

import re
import shutil
import warnings

import attrs
import peft
import pytest
import torch
import transformers
from peft import LoraConfig

import peftstate
from peftstate import PeftModel, errors
from peftstate._rank_files import rank_file_name, rank_of_name, read_rank_file
from peftstate.integrations.trainer import _copy_state, save_ranks
from peftstate.sections._process import ALONE, Process, this_process

RANK_1 = "peftstate.rank-00001-of-00002.tensors"
LOADED_BY_1 = (
    "The state was saved by 2 processes and is loaded by 1. The random generators of this "
    "process, rank 0, were set to those of rank 0; what the processes draw together is not what it "
    "would have been."
)
NOT_SAVED = (
    "The state was saved by 2 processes and is loaded by {loaded}. It holds no random generators "
    "of rank {rank}, so those of this process were left as they stood."
)

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


@pytest.fixture
def as_rank(monkeypatch):
    """Has this process be one of several: `as_rank(rank, world_size)`."""

    def become(rank, world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))

    return become


@pytest.fixture
def model(load_base):
    """A model with an adapter that does something."""
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    return peftstate.get_peft_model(load_base(), config)


@pytest.fixture
def save(as_rank, model):
    """Saves a model as several processes do, rank by rank in an order; gives what each draws next.

    Each rank's generators are seeded with its number and a seed.
    """

    def save_all(folder, ranks, world_size, *, seed=0, main=0, **options):
        drawn = {}
        for rank in ranks:
            as_rank(rank, world_size)
            torch.manual_seed(seed + rank)
            model.save_pretrained(folder, is_main_process=rank == main, **options)
            drawn[rank] = torch.rand(()).item()
        return drawn

    return save_all


@pytest.fixture
def load(as_rank, load_base):
    """Loads a folder as one of several processes; gives what it draws next, and its warnings."""

    def load_as(folder, rank, world_size, **options):
        as_rank(rank, world_size)
        torch.manual_seed(99)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(load_base(), folder, **options)
        told = [str(one.message) for one in caught if one.category is errors.RankStateWarning]
        return torch.rand(()).item(), told

    return load_as


def notes(folder):
    """What `verify_files` says of what is no difference, but for PEFT's model card."""
    report = peftstate.verify_files(folder)
    return [note for note in report.notes if "README.md" not in note]


def untouched():
    """What a process draws that was seeded as `load` does, and whose generators were left alone."""
    torch.manual_seed(99)
    return torch.rand(()).item()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Process(1, 2)),
        ({"RANK": "1"}, ALONE),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ALONE),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ALONE),
        ({"RANK": "one", "WORLD_SIZE": "2"}, ALONE),
    ],
)
def test_which_process_this_is(monkeypatch, environment, expected):
    """It is what the launcher says, if that makes sense."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert this_process() == expected


def test_what_torch_says_goes_first(as_rank, tmp_path):
    """An initialised process group is asked before the launcher's variables."""
    as_rank(1, 2)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        assert this_process() == ALONE
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_each_rank_gets_its_own_back(save, load, tmp_path, order):
    """In whatever order the ranks save, each goes on with the numbers it would have drawn."""
    drawn = save(tmp_path, order, 3)
    names = sorted(path.name for path in tmp_path.glob("peftstate*"))
    ranks = [rank_file_name(rank, 3) for rank in (1, 2)]
    assert names == ["peftstate.json", *ranks, "peftstate.tensors"]
    assert len(set(drawn.values())) == 3
    for rank in range(3):
        assert load(tmp_path, rank, 3) == (drawn[rank], [])
    assert notes(tmp_path) == []
    assert peftstate.verify_files(tmp_path).ok


def test_every_generator_is_in_a_ranks_file(save, as_rank, tmp_path):
    """The record is that of the section, the rank told."""
    save(tmp_path, (0, 1), 2)
    record = read_rank_file((tmp_path / RANK_1).read_bytes(), path=RANK_1)
    saved = peftstate.read_manifest(tmp_path).sections["rng"]
    assert record.process == attrs.evolve(saved.process, rank=1)
    assert saved.process.rank == 0
    assert (tmp_path / RANK_1).stat().st_mode & 0o777 == (
        tmp_path / "peftstate.json"
    ).stat().st_mode & 0o777
    assert {record.python.state.shape, record.torch_cpu.shape} == {(625,), (5056,)}


def test_one_process_is_recorded_as_one(model, tmp_path):
    """Without a launcher there is no word of ranks, and a process that is not the main saves none.

    So it is with PEFT's `is_main_process=False`.
    """
    model.save_pretrained(tmp_path / "a")
    assert peftstate.read_manifest(tmp_path / "a").sections["rng"].process is None
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert list((tmp_path / "b").iterdir()) == []


def test_any_rank_may_be_the_main_one(save, load, tmp_path):
    """On each node with a disk of its own another rank writes the manifest."""
    drawn = save(tmp_path, (0, 1), 2, main=1)
    assert (tmp_path / "peftstate.rank-00000-of-00002.tensors").exists()
    for rank in range(2):
        assert load(tmp_path, rank, 2) == (drawn[rank], [])


def test_one_process_takes_the_manifests(save, load, tmp_path):
    """A load in one process restores the main process's, and says so."""
    drawn = save(tmp_path, (0, 1), 2)
    assert load(tmp_path, 0, 1) == (
        drawn[0],
        [LOADED_BY_1],
    )


def test_more_processes_than_saved(save, load, tmp_path):
    """Ranks that were saved get theirs back; the others are left alone; each says which it is."""
    drawn = save(tmp_path, (0, 1), 2)
    number, told = load(tmp_path, 1, 3)
    assert number == drawn[1]
    assert [text[:61] for text in told] == [
        "The state was saved by 2 processes and is loaded by 3. The ra"
    ]
    number, told = load(tmp_path, 2, 3)
    assert number == untouched()
    assert told == [NOT_SAVED.format(loaded=3, rank=2)]


def test_saved_by_one_loaded_by_two(save, load, model, monkeypatch, tmp_path):
    """The ranks do not all get the same state."""
    monkeypatch.delenv("RANK", raising=False)
    torch.manual_seed(0)
    model.save_pretrained(tmp_path)
    drawn = torch.rand(()).item()
    assert load(tmp_path, 0, 2)[0] == drawn
    number, told = load(tmp_path, 1, 2)
    assert number == untouched()
    assert told[0].startswith("The state was saved by 1 process and is loaded by 2. It holds no")


def test_a_missing_rank(save, load, tmp_path):
    """A rank that saved nothing is left alone, with a warning; `verify_files` notes it."""
    save(tmp_path, (0,), 2)
    number, told = load(tmp_path, 1, 2)
    assert number == untouched()
    assert told == [NOT_SAVED.format(loaded=2, rank=1)]
    assert peftstate.verify_files(tmp_path).ok
    assert notes(tmp_path) == [
        "there are no random generators of rank 1 in the folder; no load restores these",
    ]


def test_a_load_for_inference_says_nothing(save, load, tmp_path):
    """It restores no generators, so there is nothing to tell."""
    save(tmp_path, (0,), 2)
    assert load(tmp_path, 1, 2, is_trainable=False) == (untouched(), [])
    assert load(tmp_path, 1, 4, on_mismatch={"rng": "ignore"})[1] == []


def test_another_rank_can_be_an_error(save, load, tmp_path):
    """Who asks for it is refused."""
    save(tmp_path, (0,), 2)
    with pytest.raises(errors.RngMismatchError, match=r"rng\.process\.rank: saved 0, found 1"):
        load(tmp_path, 1, 2, on_mismatch={"rng": "error"})


def test_verify_compares_with_the_ranks_own(save, as_rank, model, tmp_path):
    """`verify` holds a rank to its own state, and tells when there is none."""
    save(tmp_path, (0, 1), 2)
    as_rank(1, 2)
    torch.manual_seed(1)
    assert peftstate.verify(model, tmp_path).ok
    torch.manual_seed(0)
    fields = [mismatch.field for mismatch in peftstate.verify(model, tmp_path).mismatches]
    assert fields == ["torch_cpu.digest"]
    as_rank(2, 3)
    fields = [mismatch.field for mismatch in peftstate.verify(model, tmp_path).mismatches]
    assert fields == ["process.rank", "process.world_size"]


def damage(path, offset):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 3, 40, 0.3, 0.6, -1])
def test_a_damaged_file(save, load, tmp_path, place):
    """One bit is enough, wherever it is; the error and `verify_files` name the file."""
    save(tmp_path, (0, 1), 2)
    path = tmp_path / RANK_1
    size = path.stat().st_size
    damage(path, int(size * place) if isinstance(place, float) else place)
    with pytest.raises(errors.IntegrityError) as caught:
        load(tmp_path, 1, 2)
    assert caught.value.file == str(path)
    report = peftstate.verify_files(tmp_path)
    assert [mismatch.field for mismatch in report.mismatches] == [f"[{RANK_1}]"]
    with pytest.raises(errors.IntegrityError, match=re.escape(RANK_1)):
        report.raise_for_mismatch()
    assert load(tmp_path, 0, 2)[1] == []  # which does not read it


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file(save, load, tmp_path, size):
    """A file that was cut off is refused."""
    save(tmp_path, (0, 1), 2)
    path = tmp_path / RANK_1
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(errors.IntegrityError) as caught:
        load(tmp_path, 1, 2)
    assert caught.value.file == str(path)
    assert not peftstate.verify_files(tmp_path).ok


def test_a_file_under_another_ranks_name(save, load, tmp_path):
    """A copy is no other rank's state."""
    save(tmp_path, (0, 1), 3)
    copy = tmp_path / rank_file_name(2, 3)
    shutil.copyfile(tmp_path / rank_file_name(1, 3), copy)
    with pytest.raises(errors.IntegrityError) as caught:
        load(tmp_path, 2, 3)
    assert str(caught.value) == (
        f"{copy}: saved the random state of the rank in its name, found one of rank 1. "
        "The file changed after it was saved: restore it from a copy, or save again."
    )


def test_a_file_of_another_save(save, load, model, tmp_path):
    """A file that an older save left is not taken for this one's, nor does it stay in the way."""
    save(tmp_path, (0, 1), 2)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight += 1
    save(tmp_path, (0,), 2, seed=5)
    number, told = load(tmp_path, 1, 2)
    assert number == untouched()
    assert "holds no random generators of rank 1" in told[0]
    assert peftstate.verify_files(tmp_path).ok
    assert notes(tmp_path) == [
        f"{RANK_1}: random generators of ranks of another save, which no load restores",
        "there are no random generators of rank 1 in the folder; no load restores these",
    ]
    drawn = save(tmp_path, (1,), 2, seed=5)  # the slower rank
    assert load(tmp_path, 1, 2) == (drawn[1], [])


@pytest.mark.parametrize("world_size", [1, 3])
def test_files_of_another_world_size_are_removed(save, tmp_path, world_size):
    """A save by another number of processes leaves none of them."""
    save(tmp_path, (0, 1), 2)
    save(tmp_path, range(world_size), world_size)
    found = {path.name for path in tmp_path.glob("peftstate.rank*")}
    assert found == {rank_file_name(rank, world_size) for rank in range(1, world_size)}
    assert notes(tmp_path) == []


def test_each_folder_of_adapters_is_complete(save, load, model, tmp_path):
    """An extra adapter's folder has the files, too, so that it can be moved away."""
    model.add_adapter("ref", LoraConfig(task_type="CAUSAL_LM"))
    drawn = save(tmp_path / "all", (1, 0), 2)
    assert notes(tmp_path / "all") == []
    shutil.move(tmp_path / "all" / "ref", tmp_path / "ref")
    assert notes(tmp_path / "ref") == []
    assert load(tmp_path / "ref", 1, 2) == (drawn[1], [])
    save(tmp_path / "one", (0, 1), 2, selected_adapters=["ref"])
    assert not list((tmp_path / "one").glob("peftstate*"))
    assert notes(tmp_path / "one" / "ref") == []


def test_a_rank_that_cannot_save_goes_on(save, as_rank, model, tmp_path):
    """A disk that fails a rank ends no training; what is lost is told, and nothing is left."""
    save(tmp_path, (0,), 2)
    (tmp_path / RANK_1).mkdir()
    as_rank(1, 2)
    with pytest.warns(errors.RankStateWarning) as caught:
        model.save_pretrained(tmp_path, is_main_process=False)
    text = str(caught[0].message)
    assert text.startswith(f"{tmp_path}: the random generators of rank 1 could not be saved (")
    assert text.endswith("). A load will leave those of this rank as they stand.")
    assert not list(tmp_path.glob(".peftstate-*"))


def test_a_signature_covers_the_files_that_are_there(save, load, tmp_path):
    """What was there when it was signed is covered; what a slower rank adds is refused."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    trusted = [key.public_key()]
    drawn = save(tmp_path, (0, 1), 2)
    peftstate.sign(tmp_path, key)
    assert load(tmp_path, 1, 2, trusted_keys=trusted) == (drawn[1], [])
    save(tmp_path, (1,), 2, seed=7)
    with pytest.raises(errors.SignatureError, match=re.escape(RANK_1)):
        load(tmp_path, 1, 2, trusted_keys=trusted)
    peftstate.sign(tmp_path, key)
    assert load(tmp_path, 1, 2, trusted_keys=trusted)[1] == []


def test_pushes_carry_them(save, tmp_path):
    """`Trainer` uploads a folder that it copies a checkpoint to; older rank files are removed."""
    save(tmp_path / "output", (0, 1, 2), 3)
    save(tmp_path / "checkpoint", (0, 1), 2, seed=5)
    _copy_state(tmp_path / "checkpoint", tmp_path / "output")
    assert notes(tmp_path / "output") == []
    assert peftstate.verify_files(tmp_path / "output").ok
    assert [path.name for path in (tmp_path / "output").glob("*rank*")] == [RANK_1]


def test_a_trainers_save_is_wrapped_once(monkeypatch):
    """`install` and the callback do not have a rank write twice, and `install` can be undone."""
    monkeypatch.setattr(transformers.Trainer, "save_model", plain := _unwrapped())
    with peftstate.installed():
        wrapper = transformers.Trainer.save_model
        save_ranks()
        assert transformers.Trainer.save_model is wrapper is not plain
    assert transformers.Trainer.save_model is plain
    save_ranks()
    wrapper = transformers.Trainer.save_model
    with peftstate.installed():
        assert transformers.Trainer.save_model is wrapper


def _unwrapped():
    """`Trainer.save_model` as transformers has it."""
    method = transformers.Trainer.save_model
    return getattr(method, "__wrapped__", method)


def test_a_plain_peft_model_is_loaded_as_ever(as_rank, load_base, tmp_path):
    """Folders without a manifest are PEFT's, whatever the rank."""
    as_rank(1, 2)
    model = peft.get_peft_model(load_base(), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with pytest.warns(errors.MissingManifestWarning):
        PeftModel.from_pretrained(load_base(), tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (RANK_1, (1, 2)),
        ("peftstate.rank-123456-of-200000.tensors", (123456, 200000)),
        ("peftstate.rank-000001-of-00002.tensors", None),
        ("peftstate.rank-1-of-2.tensors", None),
        ("peftstate.rank-00001-of-00002.tensors.bak", None),
        ("peftstate.tensors", None),
    ],
)
def test_names(name, expected):
    """A file's name tells its rank, in one form only."""
    assert rank_of_name(name) == expected
    if expected is not None:
        assert rank_file_name(*expected) == name
