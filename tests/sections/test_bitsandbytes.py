"""Tests of what is known of the insides of bitsandbytes."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import bitsandbytes.functional
import bitsandbytes.nn
import pytest
import torch
from torch import nn

from peftstate.sections import _bitsandbytes
from peftstate.sections import _bitsandbytes_forms as forms
from peftstate.sections._bitsandbytes import LayerSettings, LayerState

bnb: Any = bitsandbytes.nn  # it has no types

ROWS, COLUMNS = 128, 192

PACK = "_convert_weight_packed_for_cpu"
CAN_PACK = hasattr(bitsandbytes.functional, PACK)
"""Whether this bitsandbytes has forms; whether running a layer changes its depends on the CPU."""
FORMS = [forms.FRESH, forms.PACKED, forms.UNPACKED] if CAN_PACK else [forms.FRESH]


def linear_4bit(
    *,
    nested: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    quant_type: str = "nf4",
    storage: torch.dtype = torch.uint8,
) -> Any:
    """A quantized 4-bit layer; equal arguments give equal layers."""
    torch.manual_seed(0)
    layer = bnb.Linear4bit(
        COLUMNS,
        ROWS,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer.weight.data = (torch.randn(ROWS, COLUMNS) * 0.02).to(dtype)
    return layer.to("cpu").requires_grad_(requires_grad=False).eval()


def linear_8bit(*, has_fp16_weights: bool = False) -> Any:
    """An 8-bit layer; equal arguments give equal layers."""
    torch.manual_seed(0)
    layer = bnb.Linear8bitLt(COLUMNS, ROWS, has_fp16_weights=has_fp16_weights, threshold=6.0)
    return layer.to("cpu").requires_grad_(requires_grad=False).eval()


def run(layer: Any) -> torch.Tensor:
    """A forward without gradient."""
    with torch.no_grad():
        output: torch.Tensor = layer(torch.ones(3, COLUMNS, dtype=torch.bfloat16))
    return output


def go_around(layer: Any, form: str, cycles: int = 1) -> None:
    """Bring a layer into a form as bitsandbytes does, on any CPU."""
    for _ in range(cycles if form != forms.FRESH else 0):
        if forms.form_of(layer) == forms.PACKED:
            layer.state_dict()
        pack = getattr(bitsandbytes.functional, PACK)  # as `Linear4bit.forward` calls it
        layer.weight.data, _ = pack(layer.weight.data, layer.weight.quant_state)
    if form == forms.UNPACKED:
        layer.state_dict()


def same(one: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor] | None) -> bool:
    """Whether two canonical forms are equal to the last bit."""
    assert one
    assert other
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def same_weight(layer: Any, other: Any) -> bool:
    """Whether two layers hold the same bits in the same form."""
    one, two = forms.weight_of(layer), forms.weight_of(other)
    return (
        forms.form_of(layer) == forms.form_of(other)
        and one.data.shape == two.data.shape
        and torch.equal(one.data.view(torch.uint8), two.data.view(torch.uint8))
        and one.state.dtype == two.state.dtype
        and all(map(torch.equal, forms.scales(one), forms.scales(two)))
        and layer.quant_state is layer.weight.quant_state
    )


LAYERS: dict[str, dict[str, Any]] = {
    "nested": {},
    "plain": {"nested": False},
    "fp4": {"quant_type": "fp4"},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "stored-as-bfloat16": {"storage": torch.bfloat16},
}


@pytest.fixture(params=list(LAYERS.values()), ids=list(LAYERS))
def arguments(request):
    """Arguments of `linear_4bit`."""
    return request.param


@pytest.fixture(params=FORMS)
def form(request):
    """A form that this bitsandbytes has."""
    return request.param


def in_form(layer, form, cycles=1):
    """A copy of a layer, brought into a form as a load brings it."""
    layer = copy.deepcopy(layer)
    forms.convert(layer, form, cycles=cycles)
    return layer


# Canonical tensors


def canonical_tensors(module):
    """The canonical tensors of a module, made."""
    found = _bitsandbytes.canonical_tensors(module)
    return None if found is None else {name: make() for name, make in found.items()}


def test_canonical_tensors_of_4bit_are_nibbles_scales_and_shape():
    """The nibbles are the fresh bytes, the scales are un-nested."""
    layer = linear_4bit(nested=False)
    tensors = canonical_tensors(layer)
    assert tensors is not None
    assert set(tensors) == {"weight", "weight.absmax", "weight.shape"}
    assert torch.equal(tensors["weight"], layer.weight.data.reshape(-1))
    absmax = layer.weight.quant_state.absmax
    assert torch.equal(tensors["weight.absmax"], absmax.to(torch.bfloat16))
    assert tensors["weight.shape"].tolist() == [ROWS, COLUMNS]


def test_running_a_4bit_layer_does_not_change_its_canonical_tensors(arguments):
    """A forward in eval mode packs the layer on some CPUs."""
    layer, fresh = linear_4bit(**arguments), linear_4bit(**arguments)
    run(layer)
    assert same(canonical_tensors(layer), canonical_tensors(fresh))


def test_canonical_tensors_are_comparable_in_any_form(arguments, form):
    """A layer has those of a fresh one that was brought into its form; unpacking changes values."""
    layer, fresh = linear_4bit(**arguments), linear_4bit(**arguments)
    go_around(layer, form)
    assert same(canonical_tensors(layer), canonical_tensors(in_form(fresh, form)))
    assert same(canonical_tensors(layer), canonical_tensors(fresh)) == (form != forms.UNPACKED)
    assert same_weight(fresh, linear_4bit(**arguments))


def test_canonical_tensors_are_comparable_after_several_rounds(arguments, form):
    """Each time that a layer is packed and unpacked its scales change anew."""
    layer, fresh = linear_4bit(**arguments), linear_4bit(**arguments)
    go_around(layer, form, cycles=3)
    assert same(canonical_tensors(layer), canonical_tensors(in_form(fresh, form, cycles=3)))
    assert same_weight(fresh, linear_4bit(**arguments))


def test_canonical_tensors_leave_the_layer_as_it_is(arguments, form):
    """Looking at a layer that has been around changes nothing in it either."""
    layer, other = linear_4bit(**arguments), linear_4bit(**arguments)
    go_around(layer, form)
    go_around(other, form)
    canonical_tensors(layer)
    assert same_weight(layer, other)


def test_canonical_tensors_do_not_depend_on_the_storage_dtype():
    """`bnb_4bit_quant_storage` says how the bytes are typed, not what they are."""
    stored = linear_4bit(storage=torch.bfloat16)
    assert same(canonical_tensors(stored), canonical_tensors(linear_4bit()))


@pytest.mark.parametrize("other", [{"quant_type": "fp4"}, {"nested": False}])
def test_canonical_tensors_tell_other_quantizations(other):
    """Another quant type has other nibbles, another double quantization other scales."""
    assert not same(canonical_tensors(linear_4bit(**other)), canonical_tensors(linear_4bit()))


def test_canonical_tensors_tell_another_weight():
    """One changed nibble shows, also in a layer that has run."""
    layer = linear_4bit()
    layer.weight.data[7] ^= 1
    run(layer)
    assert not same(canonical_tensors(layer), canonical_tensors(linear_4bit()))


def test_running_an_8bit_layer_does_not_change_its_canonical_tensors():
    """The first forward moves weight and scales from the parameter to the layer's state."""
    layer = linear_8bit()
    weight, scale = layer.weight.CB.clone(), layer.weight.SCB.clone()
    fresh = canonical_tensors(layer)
    run(layer)
    assert layer.weight.SCB is None
    assert same(canonical_tensors(layer), fresh)
    assert same(fresh, {"weight": weight, "weight.SCB": scale})


def test_embeddings_have_canonical_tensors():
    """4-bit and 8-bit embeddings are digested as linear layers are."""
    torch.manual_seed(0)
    four, eight = bnb.Embedding4bit(64, 128).to("cpu"), bnb.Embedding8bit(64, 128).to("cpu")
    before = [canonical_tensors(four), canonical_tensors(eight)]
    four(torch.arange(3))
    eight(torch.arange(3))
    assert before[0] is not None
    assert before[1] is not None
    assert set(before[0]) == {"weight", "weight.absmax", "weight.shape"}
    assert set(before[1]) == {"weight", "weight.SCB"}
    assert same(canonical_tensors(four), before[0])
    assert same(canonical_tensors(eight), before[1])


@pytest.mark.skipif(find_spec("bitsandbytes.nn.parametrize") is None, reason="since 0.48")
def test_a_parametrized_weight_has_canonical_tensors():
    """Its nibbles are a parameter, the scales hang on bitsandbytes' parametrization."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    module: Any = nn.Linear(64, 64, dtype=torch.float16)
    replace_parameter_4bit(module, "weight", compress_statistics=True)
    parametrization = module.parametrizations["weight"][0]
    tensors = canonical_tensors(parametrization)
    assert tensors is not None
    assert set(tensors) == {"absmax", "shape"}
    assert tensors["absmax"].shape == (64,)
    assert _bitsandbytes.settings_of(parametrization) == LayerSettings(
        kind="Bnb4bitParametrization",
        quant_type="nf4",
        blocksize=64,
        double_quant=True,
        dtype="float16",
    )


@pytest.mark.parametrize(
    "module", [nn.Linear(8, 8), nn.LayerNorm(8), linear_8bit(has_fp16_weights=True)]
)
def test_a_weight_that_is_not_quantized_has_no_canonical_tensors(module):
    """It is an ordinary tensor, also of an 8-bit layer with 16-bit weights."""
    assert canonical_tensors(module) is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("cls", [bnb.Linear4bit, bnb.Linear8bitLt])
def test_a_weight_that_cannot_be_read_gives_no_tensor(cls, device):
    """A layer that is not quantized yet, or without values, is not checkable."""
    arguments = {"has_fp16_weights": False} if cls is bnb.Linear8bitLt else {}
    assert canonical_tensors(cls(64, 64, device=device, **arguments)) == {}


def test_a_quantized_layer_on_meta_gives_no_tensor():
    """Offloading puts meta tensors in the place of a layer's weight."""
    layer = linear_4bit()
    layer.weight = layer.weight.to("meta")
    assert canonical_tensors(layer) == {}


def test_nothing_of_bitsandbytes_is_imported():
    """A process that has not imported it holds no layer of its, so it is not looked for."""
    code = (
        "import sys\n"
        "from peftstate.sections import _bitsandbytes, quantization\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "assert _bitsandbytes.canonical_tensors(torch.nn.Linear(2, 2)) is None\n"
        "assert 'bitsandbytes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Forms


def test_form_is_told_on_the_live_layer(arguments, form):
    """A layer that was packed bears a mark, and one that was unpacked another."""
    layer = linear_4bit(**arguments)
    go_around(layer, form)
    assert forms.form_of(layer) == form


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_converting_a_fresh_layer_gives_the_bits_of_one_that_was_used(arguments, form, cycles):
    """A form can be restored on a fresh base model, however often the saved one went around."""
    used, fresh = linear_4bit(**arguments), linear_4bit(**arguments)
    go_around(used, form, cycles)
    forms.convert(fresh, form, cycles=cycles)
    assert same_weight(fresh, used)


@pytest.mark.parametrize("wanted", FORMS[2:] or FORMS)
def test_converting_a_packed_layer_unpacks_it(arguments, wanted):
    """A base model that has run before the adapter is loaded is brought on."""
    used, ran = linear_4bit(**arguments), linear_4bit(**arguments)
    go_around(used, wanted)
    go_around(ran, FORMS[:2][-1])
    forms.convert(ran, wanted)
    assert same_weight(ran, used)


def test_in_form_leaves_the_layer_as_it_is(arguments, form):
    """What a layer would be is worked out on a copy of its state."""
    layer = linear_4bit(**arguments)
    forms.in_form(layer, form, cycles=2)
    assert same_weight(layer, linear_4bit(**arguments))


@pytest.mark.parametrize("form", ["fresh", "packed", "unpacked", "other"])
def test_what_rounding_lost_does_not_come_back(form):
    """An unpacked layer stays one: neither rounded scales nor an unknown form can be computed."""
    layer = linear_4bit()
    layer.weight.quant_state.packing_format_for_cpu = False  # the mark of `state_dict`
    assert forms.can_compute(layer, form) == (form == forms.UNPACKED)
    if form != forms.UNPACKED:
        with pytest.raises(ValueError, match=f"unpacked cannot be brought into form '{form}'"):
            forms.in_form(layer, form)


def test_older_releases_have_no_forms(monkeypatch):
    """Without the functions that pack, a layer stays fresh."""
    monkeypatch.delattr(bitsandbytes.functional, PACK, raising=False)
    layer = linear_4bit()
    assert not forms.can_compute(layer, forms.PACKED)
    assert not forms.can_compute(layer, forms.UNPACKED)
    assert same(canonical_tensors(layer), canonical_tensors(linear_4bit()))


def test_a_cpu_that_does_not_pack_cannot_hold_a_packed_layer():
    """The unpacked form is but other values, which any device holds."""
    layer = linear_4bit()
    layer.support_avx512bf16_for_cpu = False
    assert not forms.can_hold(layer, forms.PACKED)
    assert forms.can_hold(layer, forms.UNPACKED)
    assert forms.can_hold(layer, forms.FRESH)


def test_a_shape_that_bitsandbytes_does_not_pack_stays_fresh():
    """Its rows must be a multiple of 32; bitsandbytes itself fails on others."""
    layer = bnb.Linear4bit(64, 48, bias=False).to("cpu")
    assert not forms.can_compute(layer, forms.PACKED)


# Settings and state


def test_settings_of_a_4bit_layer(arguments, form):
    """They say how the layer was quantized, whatever form it is in."""
    layer = linear_4bit(**arguments)
    go_around(layer, form)
    assert _bitsandbytes.settings_of(layer) == LayerSettings(
        kind="Linear4bit",
        quant_type=arguments.get("quant_type", "nf4"),
        blocksize=64,
        double_quant=arguments.get("nested", True),
        dtype=str(arguments.get("dtype", torch.bfloat16)).removeprefix("torch."),
    )


def test_settings_of_8bit_layers():
    """Threshold and 16-bit weights are what an 8-bit layer can differ in."""
    assert _bitsandbytes.settings_of(linear_8bit(has_fp16_weights=True)) == LayerSettings(
        kind="Linear8bitLt", threshold=6.0, has_fp16_weights=True
    )
    embedding = bnb.Embedding8bit(64, 64, dtype=torch.float16).to("cpu")
    assert _bitsandbytes.settings_of(embedding) == LayerSettings(
        kind="Embedding8bit", dtype="float16"
    )


def test_settings_of_a_layer_that_is_not_quantized_yet():
    """What it will be is known from its arguments; a subclass counts as what it derives from."""
    assert _bitsandbytes.settings_of(bnb.LinearNF4(64, 64)) == LayerSettings(
        kind="Linear4bit", quant_type="nf4", blocksize=64, double_quant=True
    )


def test_other_modules_have_neither_settings_nor_state():
    """Only layers of bitsandbytes are in its table."""
    module = nn.Linear(2, 2)
    assert _bitsandbytes.kind_of(module) is None
    assert _bitsandbytes.settings_of(module) is None
    assert _bitsandbytes.state_of(module) is None


@pytest.mark.parametrize(
    "state",
    [
        LayerState(compute_dtype="float16", compute_dtype_is_set=True, form="fresh"),
        LayerState(compute_dtype=None, compute_dtype_is_set=False, form="fresh"),
    ],
)
def test_compute_dtype_is_restored(state):
    """Also that the next input decides it."""
    layer = linear_4bit()
    _bitsandbytes.set_compute_dtype(layer, state)
    assert _bitsandbytes.state_of(layer) == state


@pytest.mark.parametrize("name", ["load", "int8", "nonsense", ""])
def test_only_known_names_are_set_as_compute_dtype(name):
    """Nothing from a manifest reaches ``getattr(torch, …)``."""
    layer = linear_4bit()
    state = LayerState(compute_dtype=name, compute_dtype_is_set=False, form="fresh")
    _bitsandbytes.set_compute_dtype(layer, state)
    assert layer.compute_dtype == torch.bfloat16
