"""Deliveries: what the teacher's functions returned is what the students' functions return."""

import copy

import pytest
import recorded_toy as toy
import torch

from fastslim import errors
from fastslim.distillers import DistillDeliveryManager, FunctionOutputsDelivery, MethodOutputsDelivery

SCALE = {"type": "FunctionOutputs", "func_path": "recorded_toy.scale", "max_keep_data": 2}
MEAN = {"type": "MethodOutputs", "method_path": "recorded_toy.Pool.mean", "max_keep_data": 2}


@pytest.fixture
def images():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


MAKERS = {
    "function": (lambda: FunctionOutputsDelivery("recorded_toy.scale", 2), lambda x: toy.scale(x)),
    "method": (lambda: MethodOutputsDelivery("recorded_toy.Pool.mean", max_keep_data=2), lambda x: toy.Pool().mean(x)),
    "manager of functions": (lambda: DistillDeliveryManager({"it": SCALE}), lambda x: toy.scale(x)),
    "manager of methods": (lambda: DistillDeliveryManager({"it": MEAN}), lambda x: toy.Pool().mean(x)),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_results_are_replayed_in_order(images, kind):
    make, call = MAKERS[kind]
    delivery = make()
    assert not delivery.override_data
    with delivery:
        first, second = call(images), call(images + 1)
    with pytest.raises(AssertionError, match="push into an full queue.* raise max_keep_data"), delivery:
        call(images)
    delivery.override_data = True
    assert delivery.override_data
    with delivery:
        assert torch.equal(call(images + 2), first) and torch.equal(call(images + 2), second)
    with pytest.raises(AssertionError, match="pop from an empty queue.* run the teacher first"), delivery:
        call(images)
    assert not torch.equal(call(images + 2), first)  # outside it is the function itself


@pytest.mark.parametrize("kind", MAKERS)
def test_every_student_starts_from_the_first_result_and_every_teacher_anew(images, kind):
    make, call = MAKERS[kind]
    delivery = make()
    for shift in (0, 1):
        delivery.override_data = False
        with delivery:
            first = call(images + shift)
        for _student in range(3):
            delivery.override_data = True
            with delivery:
                assert torch.equal(call(images + 5), first)


def test_a_student_that_calls_less_often_leaves_nothing_behind(images):
    delivery = FunctionOutputsDelivery("recorded_toy.scale", 2)
    for shift in (0, 1):
        delivery.override_data = False
        with delivery:
            first, _ = toy.scale(images + shift), toy.scale(images)
        delivery.override_data = True
        with delivery:
            assert torch.equal(toy.scale(images), first)


def test_results_are_kept_without_their_graph(images):
    delivery = FunctionOutputsDelivery("recorded_toy.scale")
    with delivery:
        assert toy.scale(images.requires_grad_()).requires_grad
    delivery.override_data = True
    with delivery:
        assert not toy.scale(images).requires_grad
    delivery.clear()
    assert not delivery.data_queue


def test_a_copy_has_no_results(images):
    delivery = FunctionOutputsDelivery("recorded_toy.scale")
    with delivery:
        toy.scale(images)
        other = copy.deepcopy(delivery)
    other.override_data = True
    with pytest.raises(AssertionError, match="pop from an empty queue"), other:
        toy.scale(images)


def test_a_delivery_is_not_opened_twice():
    delivery, function = FunctionOutputsDelivery("recorded_toy.scale"), toy.scale
    with delivery, pytest.raises(errors.FastslimRuntimeError, match="open already"), delivery:
        pass
    assert toy.scale is function


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FunctionOutputsDelivery(1, 1), TypeError, "func_path should be an import path"),
        (lambda: FunctionOutputsDelivery("scale", 1), AssertionError, "func_path must have at least one dot"),
        (lambda: MethodOutputsDelivery(1, 1), TypeError, "method_path should be an import path"),
        (lambda: MethodOutputsDelivery("mean", 1), AssertionError, "method_path must have at least two dots"),
        (lambda: MethodOutputsDelivery("nowhere.Pool.mean"), ImportError, "nowhere is not imported"),
        (lambda: MethodOutputsDelivery("recorded_toy.P.mean"), AssertionError, "P is not in recorded_toy"),
        (lambda: MethodOutputsDelivery("recorded_toy.scale.mean"), TypeError, "scale should be a type"),
        (lambda: MethodOutputsDelivery("recorded_toy.Pool.meen"), AssertionError, "meen is not in Pool"),
        (lambda: MethodOutputsDelivery("recorded_toy.Pool.__dict__"), TypeError, "__dict__ should be a function"),
        (lambda: FunctionOutputsDelivery("a.b", 0), ValueError, "max_keep_data=0 must be at least 1"),
        (lambda: DistillDeliveryManager([1]), TypeError, "a dict from name to delivery, but got list"),
        (lambda: DistillDeliveryManager({"it": 1}), TypeError, "a DistillDelivery or its config, but got int"),
        (lambda: DistillDeliveryManager({"it": SCALE | {"func_path": "a.b"}}), ImportError, "a is not imported"),
    ],
)
def test_what_cannot_be_delivered_names_the_fix(make, error, message):
    with pytest.raises(error, match=message) as raised:
        make()
    assert isinstance(raised.value, errors.FastslimError)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere.scale", ImportError, "nowhere is not imported"),
        ("recorded_toy.scael", AssertionError, "scael is not in recorded_toy"),
        ("recorded_toy.torch", TypeError, "torch should be a function"),
    ],
)
def test_a_function_of_a_delivery_alone_is_looked_up_when_used(path, error, message):
    delivery = FunctionOutputsDelivery(path, 1)
    with pytest.raises(error, match=message), delivery:
        pass
