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


def test_a_class_may_have_several_names(models):
    @models.register_module(["Tail", "End"])
    class Tail(nn.Module):
        pass

    assert models.get("Tail") is models.get("End") is Tail
    assert models.module_dict["End"] is Tail
    with pytest.raises(errors.FastslimValueError, match="'End' is registered"):
        models.register_module(["New", "End"], module=nn.Linear)
    assert "New" not in models


def test_names_and_force_are_positional_as_in_mmengine(models):
    models.register_module("Head", True, nn.Linear)
    assert models.get("Head") is nn.Linear


def test_default_arguments_may_come_as_a_dict(models):
    assert models.build({"type": "Head", "width": 3}, default_args={"width": 5, "bias": False}).width == 3
    assert models.build({"type": "Head"}, {"width": 5}).width == 5


@pytest.mark.parametrize("scope", ["fastslim", "mmrazor"])
def test_a_scope_of_ours_inside_a_config_is_understood(models, scope):
    assert models.build({"_scope_": scope, "type": "Head", "width": 3}).width == 3


def test_what_only_looks_like_a_dict_is_one(models):
    class Config:
        def keys(self):
            return ["type", "width"]

        def __iter__(self):
            return iter(self.keys())

        def __getitem__(self, key):
            return {"type": "Head", "width": 4}[key]

    assert models.build(Config()).width == 4


class Framework:
    """A parent that knows one class, in a scope of its own."""

    def __init__(self):
        self.built = []

    def get(self, name, scope=None):
        return nn.Linear if name in ("Dense", "other.Dense") or (name, scope) == ("Head", "other") else None

    def build(self, config):
        self.built.append(config)
        return nn.Linear(config["in_features"], config["out_features"])

    def names(self):
        return ["Dense"]


def test_unknown_names_are_the_parents(models):
    models.parent = Framework()
    for name in ("Dense", "other.Dense"):
        config = {"type": name, "in_features": 2, "out_features": 3}
        assert isinstance(models.build(config), nn.Linear)
        assert models.parent.built[-1] == config
        assert name in models
    other = {"_scope_": "other", "type": "Head", "in_features": 2, "out_features": 3}
    assert isinstance(models.build(other), nn.Linear)
    assert models.parent.built[-1] == other
    assert models.build({"type": "Head", "width": 1}).width == 1  # ours come first


def test_the_parents_names_are_hinted_at_too(models):
    models.parent = Framework()
    with pytest.raises(errors.FastslimValueError, match="did you mean 'Dense'"):
        models.build({"type": "Dence"})
    with pytest.raises(errors.FastslimValueError, match="no argument 'in_feature': did you mean 'in_features'"):
        models.build({"type": "Dense", "in_feature": 2, "out_features": 3})
    assert not models.parent.built


def test_without_an_integration_another_librarys_scope_says_what_to_import(models):
    for config in ({"type": "mmcls.Head"}, {"type": "Head", "_scope_": "mmcls"}):
        with pytest.raises(errors.FastslimValueError, match="scope 'mmcls'.*import fastslim.integrations.mmengine"):
            models.build(config)


def test_forgotten_parentheses_are_named(models):
    with pytest.raises(errors.FastslimTypeError, match="with parentheses"):

        @models.register_module
        class Tail(nn.Module):
            pass
