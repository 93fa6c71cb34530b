"""The registry builds what a config says and names the fix where it cannot."""

import importlib.machinery

import pytest
from torch import nn

from fastslim import errors, registry
from fastslim.registry import Registry


@pytest.fixture
def models():
    models = Registry("MODELS")

    @models.register_module()
    class Head(nn.Module):
        def __init__(self, width, bias=True):
            super().__init__()
            self.width, self.bias = width, bias

    models.register_module("Wide", module=lambda **kwargs: kwargs)
    return models


@pytest.mark.parametrize("name", ["Head", "fastslim.Head", "mmrazor.Head"])
def test_a_type_is_found_under_every_scope(models, name):
    config = {"type": name, "width": 3}
    assert models.build(config).width == 3
    assert config == {"type": name, "width": 3}  # a config can be used again
    assert name in models


def test_a_type_may_be_a_class_of_ones_own(models):
    assert models.build({"type": nn.Linear, "in_features": 2, "out_features": 3}).weight.shape == (3, 2)


def test_arguments_of_the_config_override_the_defaults(models):
    assert models.build({"type": "Head", "width": 3}, width=5, bias=False).width == 3
    assert models.build({"type": "Head", "width": 3}, bias=False).bias is False


def test_a_callable_that_takes_anything_gets_everything(models):
    assert models.build({"type": "Wide", "depth": 1}) == {"depth": 1}


def test_an_installed_mmrazor_keeps_its_names(models, monkeypatch):
    spec = importlib.machinery.ModuleSpec("mmrazor", None)
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: spec)
    assert "mmrazor.Head" not in models
    assert "fastslim.Head" in models


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"type": "Haed", "width": 1}, ValueError, "'Haed' is not registered in MODELS: did you mean 'Head'"),
        ({"type": "fastslim.Haed"}, ValueError, "did you mean 'Head'"),
        ({"width": 1}, ValueError, "needs a key 'type'"),
        ({"type": 3}, TypeError, "a registered name or a class, but got 3"),
        ("Head", TypeError, "should be a dict such as dict"),
        ({"type": "Head", "widht": 1}, ValueError, "Head has no argument 'widht': did you mean 'width'"),
        ({"type": "Head"}, ValueError, "Head needs 'width'"),
    ],
)
def test_a_bad_config_names_the_fix(models, config, error, message):
    with pytest.raises(error, match=message) as raised:
        models.build(config)
    assert isinstance(raised.value, errors.FastslimError)


def test_a_taken_name_is_refused_unless_forced(models):
    with pytest.raises(errors.FastslimValueError, match="'Head' is registered in MODELS already"):
        models.register_module("Head", module=nn.Linear)
    models.register_module("Head", module=nn.Linear, force=True)
    assert models.get("Head") is nn.Linear


def test_forgotten_parentheses_are_named(models):
    with pytest.raises(errors.FastslimTypeError, match="with parentheses"):

        @models.register_module
        class Tail(nn.Module):
            pass
