"""The benchmark of time and memory: that both sides do the work, its arithmetic, and its page."""

from __future__ import annotations

import gc
import json
import re
import time

import peft
import pytest
import torch

from benchmarks import _page
from benchmarks._generations import silently
from benchmarks.fidelity._libraries import PEFT, PEFTSTATE
from benchmarks.fidelity._models import V4
from benchmarks.performance import _hot, _live, _memory, _plot, _processes, profile
from benchmarks.performance.__main__ import PAGE, PICTURE, main
from benchmarks.performance._growth import Growth
from benchmarks.performance._measure import Comparison, Sample, alternately, timed
from benchmarks.performance._memory import Peak
from benchmarks.performance._rates import Rates
from benchmarks.performance._results import Memory, Profile, Results, Timing
from benchmarks.performance._run import QUICK
from benchmarks.performance._tables import tables
from benchmarks.performance._workloads import TINY, Bench, bare, check_loaded
from peftstate.sections import _tensors

WEIGHTS = "adapter_model.safetensors"
TIMES = Comparison(
    other=(Sample(2.0, 4.0), Sample(1.0, 1.0), Sample(4.0, 2.0)),
    ours=(Sample(1.0, 1.0), Sample(2.0, 1.0), Sample(3.0, 6.0)),
)
RESULTS = Results(
    command="make",
    threads=2,
    rates=Rates(memory=40e9, blake3=10e9, blake3_of_one=5e9, sha256=1e9),
    timings=(Timing(path="from_pretrained", workload="a model", against=PEFT.name, times=TIMES),),
    tree=_processes.Tree(adapters=1000, files=2000, size=8 * 10**6, times=TIMES),
    memory=(
        Memory(
            path="load",
            workload="a model",
            peft=Peak(100 * 10**6, 180 * 10**6),
            ours=Peak(100 * 10**6, 140 * 10**6),
        ),
        Memory(
            path="adapters",
            workload="a model",
            peft=Peak(100 * 10**6, 200 * 10**6),
            ours=Peak(100 * 10**6, 200 * 10**6),
        ),
    ),
    profiles=tuple(
        Profile(
            workload=name,
            base_bytes=10**9,
            adapter_bytes=10**8,
            steps=dict.fromkeys(profile.PATHS, steps),
        )
        for name, steps in (
            ("one", {"read": 0.5, profile.REST: 0.25}),
            ("two", {"inject": 0.125, profile.REST: 0.25}),
        )
    ),
    growths=(),
)


def rows_of(name):
    """The rows of a table of `RESULTS`."""
    return next(table.rows for table in tables(RESULTS) if table.name == name)


@pytest.fixture(autouse=True)
def _collected_soon():
    """Spare each of the many collections of garbage a walk over what the whole suite holds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def bench(tmp_path):
    """The tiny workload."""
    return Bench.make(TINY, tmp_path / "adapter")


def test_ratios_are_of_pairs():
    """Each run of ours is divided by the one just before it; what counts is the median."""
    assert TIMES.wall_ratio == 0.75
    assert TIMES.cpu_ratio == 1.0


def test_runs_are_in_turn():
    """The first round warms up; each other run is kept, in order."""
    ran = []
    runs = {"a": lambda: ran.append("a") or len(ran), "b": lambda: ran.append("b") or len(ran)}
    assert alternately(runs, 2) == {"a": (3, 5), "b": (4, 6)}
    assert ran == ["a", "b"] * 3


def test_time_of_the_cpu_is_that_of_work():
    """Waiting takes time, but none of the CPU's."""
    result, sample = timed(lambda: time.sleep(0.05) or "done")
    assert result == "done"
    assert sample.wall >= 0.05
    assert sample.cpu < sample.wall


def test_both_libraries_load(bench):
    """Each run leaves the base model bare and as it was, for the next one to load onto."""
    before = {name: tensor.clone() for name, tensor in bench.base.state_dict().items()}
    times = _live.first_load(bench, repetitions=1)
    assert len(times.other) == len(times.ours) == 1
    after = bench.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not hasattr(bench.base, "peft_config")


def test_a_first_load_reads_the_base(bench, monkeypatch):
    """By BLAKE3; from the third one on, XXH3 does it."""
    digested = []
    original = _tensors.pieces_digest
    monkeypatch.setattr(
        _tensors, "pieces_digest", lambda *given: digested.append(given[1]) or original(*given)
    )
    shape = tuple(bench.base.get_input_embeddings().weight.shape)
    first, further = (bench.first_load, True), (bench.load, False)
    for load, is_digested in (first, (bench.load, True), further, further, first, first):
        digested.clear()
        load(PEFTSTATE)
        assert (shape in digested) == is_digested


@pytest.mark.parametrize("library", [PEFT, PEFTSTATE])
def test_the_model_is_that_of_the_library(bench, library):
    """Plain PEFT's runs are plain PEFT's."""
    with bench.loaded(library) as (model, _):
        assert isinstance(model, PEFTSTATE.models) is (library is PEFTSTATE)


@pytest.mark.parametrize("library", [PEFT, PEFTSTATE])
def test_a_load_that_loads_something_else_is_found(bench, library):
    """A library that were fast because it left out the weights would end the run."""
    model = library.load(bench.base, bench.adapter, is_trainable=False)
    check_loaded(model, bench.adapter, "default")
    weight = next(weight for name, weight in model.named_parameters() if "lora_B" in name)
    weight.data.zero_()
    with pytest.raises(RuntimeError, match=r"lora_B\.weight is not what was saved"):
        check_loaded(model, bench.adapter, "default")
    bare(model)


def test_both_libraries_save(bench, monkeypatch):
    """The files of both are there, twice written; a save without a file ends the run."""
    first, second = _live.save(bench, repetitions=1)
    assert len(first.other) == len(second.ours) == 1
    monkeypatch.setattr(peft.PeftModel, "save_pretrained", lambda *_: None)
    with pytest.raises(FileNotFoundError):
        _live.save(bench, repetitions=1)


def test_copies_of_an_adapter_are_adapters(bench):
    """What stands for loaded adapters has their modules and their weights."""
    with bench.loaded(PEFT) as (model, _):
        _hot.fill(model, 3)
        assert list(model.peft_config) == ["default", "copy-1", "copy-2"]
        check_loaded(model, bench.adapter, "copy-2")
        model.set_adapter("copy-2")
        model(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("path", profile.PATHS)
def test_profile(bench, path):
    """The steps are those of the path, each took time, and none is counted twice."""
    bench.load(PEFTSTATE)
    started = time.perf_counter()
    found = profile.PATHS[path](bench)
    assert sum(found.values()) < time.perf_counter() - started
    expected = {
        "from_pretrained": {*profile.LOAD} - {"inject, by PEFT's own load"},
        "from_pretrained-again": {*profile.LOAD} - {"inject, by PEFT's own load"},
        "load_adapter": {*profile.LOAD}
        - {"inject, by PEFT's own load", "wait for the digests of the base model"},
        "save_pretrained": {*profile.SAVE},
    }
    assert {step for step, seconds in found.items() if seconds} == expected[path] | {profile.REST}


def test_a_step_within_another_is_not_counted_twice():
    """The outer one stands still meanwhile, also if the inner one fails."""
    stopwatch = profile.Stopwatch()

    def fail():
        time.sleep(0.05)
        raise KeyError

    with stopwatch.on("outer"), pytest.raises(KeyError):
        stopwatch.watched("inner", fail)()
    assert stopwatch.spent["inner"] >= 0.05
    assert stopwatch.spent["outer"] < 0.05


@pytest.mark.parametrize("path", ["load", "save"])
@pytest.mark.parametrize("library", [PEFT, PEFTSTATE])
def test_memory(bench, path, library):
    """The peak is not below what the process had before."""
    with silently():
        found = _memory.PATHS[path](library, TINY, bench.adapter)
    assert found.peak >= found.before > 0
    assert found.increase == found.peak - found.before


def test_picture(tmp_path):
    """Each thing that grows has its part, with a line for either library."""
    growth = Growth(against="number of things", points=((1, TIMES), (2, TIMES)))
    figure = _plot.figure_of([growth] * 3)
    drawn = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_xlabel() for axes in drawn] == ["number of things"] * 3
    assert [line.get_ydata().tolist() for line in drawn[0].lines] == [[2e3, 2e3], [2e3, 2e3]]
    _plot.draw([growth], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(V4, reason="PEFT 0.17 gives a further adapter other weights than the file's")
def test_quick_run(tmp_path, capsys):
    """One run of everything gives every table, and all figures as JSON; both libraries run."""
    out = tmp_path / "out.json"
    main(["--quick", "--json", str(out)])
    printed = capsys.readouterr().out
    assert printed.count(f"`{QUICK.command}`, on ") == len(tables(RESULTS))
    found = json.loads(out.read_text("utf-8"))
    assert {"cores", "versions", "commit", "command", "threads", "rates"} <= found.keys()
    assert [timing["path"] for timing in found["timings"]] == [
        *("from_pretrained", "from_pretrained", "save_pretrained", "save_pretrained"),
        *("load_adapter", "load_adapter"),
        *("python -c pass", 'python -c "import peftstate"'),
        *('python -c "import peftstate.cli.app"', "peftstate verify"),
    ]
    points = [point[1] for growth in found["growths"] for point in growth["points"]]
    assert len(points) == 4
    for times in (*(timing["times"] for timing in found["timings"]), *points):
        (other,), (ours,) = times["other"], times["ours"]
        assert times["wall_ratio"] == ours["wall"] / other["wall"] > 0
        assert times["cpu_ratio"] == ours["cpu"] / other["cpu"] > 0
    assert found["tree"]["adapters"] == 2
    adapter = found["profiles"][0]["adapter_bytes"]
    for library in ("peft", "ours"):
        memory = found["memory"][0][library]
        assert memory["peak"] - memory["before"] > adapter


def test_tables_of_times_and_memory():
    """Medians of the times, and the ratios; what one further adapter takes, of all of them."""
    assert rows_of("performance") == [
        [
            "`from_pretrained`",
            "a model",
            "plain PEFT",
            "2,000.0 ms",
            "2,000.0 ms",
            "**0.750**",
            "1.00",
        ],
        [
            "`peftstate verify --recursive`",
            "1,000 adapters, 2,000 files of 8 MB",
            "`cat`",
            "2,000.0 ms",
            "2,000.0 ms",
            "**0.750**",
            "1.00",
        ],
    ]
    table = next(table for table in tables(RESULTS) if table.name == "performance")
    assert table.note == (
        "`verify --recursive` does 4 MB/s and 1,000 files/s. Threads of torch: 2."
    )
    assert rows_of("performance-memory") == [
        ["load", "a model", "80 MB", "40 MB", "**0.50**", "0.78"],
        ["`load_adapter`, each", "a model", "2.00 MB", "2.00 MB", "**1.00**", "1.00"],
    ]


def test_tables_of_steps():
    """A column for each workload, what is left over last, and the limits of its bytes."""
    assert [row[1:] for row in rows_of("performance-from_pretrained")] == [
        ["500.0", ""],
        ["", "125.0"],
        ["250.0", "250.0"],
        ["750.0", "375.0"],
        ["110.0", "110.0"],
        ["27.5", "27.5"],
    ]
    limits = [row[1] for row in rows_of("performance-load_adapter")[-2:]]
    assert limits == ["10.0", "2.5"]  # the adapter alone


def test_large_models_are_computed():
    """Two bytes a weight, over the rates."""
    assert rows_of("performance-large")[0] == ["Llama 3.1 70B", "141 GB", "28 s", "14 s", "1.8 s"]


def test_page_has_a_place_for_every_table():
    """And the picture is there."""
    page = (_page.DOCS / PAGE).read_text("utf-8")
    marks = re.findall("<!-- begin: (.*) -->", page)
    assert sorted(marks) == sorted(table.name for table in tables(RESULTS))
    assert PICTURE.relative_to(_page.DOCS).as_posix() in page
    assert PICTURE.is_file()
