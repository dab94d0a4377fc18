"""Tests of the view that sections have of a model."""

from __future__ import annotations

import peft
import pytest

from peftstate.sections._view import ModelView


@pytest.fixture
def model(load_base, with_lora):
    """A model with two adapters on other layers."""
    model = with_lora(load_base("bf16"))
    model.add_adapter("second", peft.LoraConfig(target_modules=["v_proj"], r=2))
    return model


def adapters_seen(view: ModelView) -> set[str | None]:
    """The adapters that a view's tensors and modules belong to."""
    tensors = {site.adapter for site in view.tensors() if site.part == "adapter"}
    modules = {site.adapter for site in view.sites() if site.part == "adapter"}
    assert tensors == modules
    return tensors


def test_view_of_a_model_has_all_adapters(model):
    """Under their own names, in the folders that PEFT gives them."""
    view = ModelView.of(model)
    assert view.adapters == {"default": "default", "second": "second"}
    assert view.folders == {"default": ".", "second": "second"}
    assert adapters_seen(view) == {"default", "second"}


def test_view_of_a_bare_base_has_none(load_base):
    """It can be described just so."""
    base = load_base("bf16")
    view = ModelView.of(base)
    assert view.adapters == {}
    assert view.base is base
    assert adapters_seen(view) == set()


def test_view_of_one_adapter_is_that_of_its_own_folder(model):
    """The folder of an extra adapter is complete in itself."""
    view = ModelView.of(model).only("second")
    assert view.adapters == {"second": "second"}
    assert view.folders == {"second": "."}
    assert adapters_seen(view) == {"second"}


def test_view_limited_to_some_adapters_keeps_their_folders(model):
    """What is not saved is not looked at."""
    view = ModelView.of(model).limited_to(["second"])
    assert view.folders == {"second": "second"}
    assert adapters_seen(view) == {"second"}


def test_adapter_may_have_another_name_in_the_model(model):
    """The manifest's names lead to the model's, and back."""
    view = ModelView(model=model, adapters={"default": "second"}, folders={"default": "."})
    assert view.saved_name("second") == "default"
    assert view.saved_name("default") is None
    assert adapters_seen(view) == {"second"}


def test_base_is_seen_through_the_adapters(model, load_base):
    """Its modules have their original names; a layer is the base model's own, not PEFT's."""
    modules = dict(ModelView.of(model).base_modules())
    bare = dict(load_base("bf16").named_modules())
    assert modules.keys() == bare.keys()
    assert [type(module) for module in modules.values()] == [type(bare[name]) for name in modules]
    assert ModelView.of(model).base is model.get_base_model()
