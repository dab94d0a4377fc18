"""Tests of the tuple of sections."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from peftstate import errors, sections
from peftstate.sections import SECTIONS

FILES = sorted(
    module.name
    for module in pkgutil.iter_modules(sections.__path__)
    if not module.name.startswith("_")
)
NAMES = [section.name for section in SECTIONS]


@pytest.mark.parametrize("name", FILES)
def test_file_is_registered(name):
    """A file of the package is a section of its name, and is in the tuple."""
    section = importlib.import_module(f"peftstate.sections.{name}").SECTION
    assert section.name == name
    assert section in SECTIONS


def test_every_section_has_a_file_of_its_own():
    """No name stands twice, and none is without a file."""
    assert sorted(NAMES) == FILES


def test_random_generators_come_after_all_that_could_draw():
    """`rng` is restored last; only `predictions`, which must not draw, may follow."""
    assert [name for name in NAMES if name != "predictions"][-1] == "rng"


def test_quantization_comes_before_the_digests_of_the_weights_that_it_gave():
    """A base model that is quantized in another way is reported as that, not as other weights."""
    assert NAMES.index("quantization") < NAMES.index("base_model")


@pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
def test_error_is_the_one_of_the_section(section):
    """What a section raises is a mismatch error that bears the section's name."""
    assert issubclass(section.error, errors.StateMismatchError)
    # what PEFT does not save of an adapter is an adapter's difference
    expected = "adapters" if section.name == "extra_tensors" else section.name
    assert section.error.section == expected


@pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
def test_record_is_a_frozen_value(section):
    """A record is an immutable attrs class that says in its docstring what each field is."""
    fields = attrs.fields(section.record)
    record = section.record(**dict.fromkeys(attrs.fields_dict(section.record)))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(record, fields[0].name, None)
    undocumented = [
        field.name for field in fields if f"{field.name}:" not in section.record.__doc__
    ]
    assert not undocumented


@pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
def test_what_depends_on_the_adapters_can_be_narrowed(section):
    """Where a record depends on which adapters are looked at, it has `for_adapters`."""
    assert hasattr(section.record, "for_adapters") is section.per_adapter


def test_restored_fields_belong_to_a_section_that_restores():
    """No section claims to set what it has no setter for."""
    for section in SECTIONS:
        assert not section.restored or section.prepare or section.restore


@pytest.mark.parametrize("name", FILES)
def test_sections_never_import_each_other(name):
    """A section can be read, changed and removed without the others."""
    source = importlib.import_module(f"peftstate.sections.{name}").__file__
    text = Path(str(source)).read_text(encoding="utf-8")
    others = set(FILES) - {name}
    assert not [other for other in others if f"peftstate.sections.{other} " in text]
    assert not [other for other in others if f"peftstate.sections import {other}" in text]


def test_records_are_known_without_torch():
    """A manifest is read where no torch is installed."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'bitsandbytes'): sys.modules[name] = None\n"
        "import peftstate.sections\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
