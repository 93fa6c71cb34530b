"""A recorded forward as steps: what counts as one, what each reads and makes, and that it is plain data."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO, make

from fastslim.graph import trace
from fastslim.graph.steps import ForwardSteps, find_function


def steps_of(forward, *shape: int, **modules: nn.Module) -> ForwardSteps:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module)

    Net.forward = forward
    return trace(Net(), torch.randn(shape)).forward


def told(steps: ForwardSteps) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    return [(step.module or step.function, step.reads, step.makes) for step in steps.steps]


def test_views_are_other_names_of_an_activation() -> None:
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        left, right = x.flatten(2).transpose(1, 2).chunk(2, dim=-1)
        return left + right

    steps = steps_of(forward, 2, 3, 4, 4, conv=nn.Conv2d(3, 8, 1))
    assert told(steps) == [("conv", (0,), (1,)), ("Tensor.add", (1,), (2,))]
    assert (steps.inputs, steps.outputs, steps.samples) == (1, (2,), 2)


def test_layers_that_do_nothing_are_no_steps() -> None:
    steps = steps_of(
        lambda self, x: self.drop(self.same(self.conv(x))),
        1,
        3,
        4,
        4,
        conv=nn.Conv2d(3, 8, 1),
        same=nn.Identity(),
        drop=nn.Dropout(),
    )
    assert told(steps) == [("conv", (0,), (1,))] and steps.outputs == (1,)


IN_PLACE = {
    "module": nn.ReLU(inplace=True),
    "function": torch.relu_,
    "keyword": lambda x: F.relu(x, inplace=True),
    "method": lambda x: x.mul_(2),
    "operator": lambda x: x.__iadd__(1),
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_whole_activation_changed_in_place_counts_as_a_new_one(kind: str) -> None:
    activate = IN_PLACE[kind]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = (self.activate if kind == "module" else activate)(x)
        return x + y

    steps = steps_of(forward, 1, 3, 4, 4, conv=nn.Conv2d(3, 8, 1), activate=IN_PLACE["module"])
    assert [(reads, makes) for _, reads, makes in told(steps)] == [((0,), (1,)), ((1,), (2,)), ((2,), (3,))]


def test_a_part_changed_in_place_is_the_same_activation() -> None:
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x[:, :, 0] = 0
        return x.sum((2, 3))

    steps = steps_of(forward, 1, 3, 4, 4, conv=nn.Conv2d(3, 8, 1))
    assert told(steps)[1:] == [("_operator.setitem", (1,), ()), ("Tensor.sum", (1,), (2,))]


def test_several_results_belong_to_one_step() -> None:
    def forward(self, x: Tensor) -> Tensor:
        values, places = self.conv(x).max(-1)
        return values * places

    steps = steps_of(forward, 1, 3, 4, 4, conv=nn.Conv2d(3, 8, 1))
    assert told(steps)[1:] == [("Tensor.max", (1,), (2, 3)), ("Tensor.mul", (2, 3), (4,))]
    assert steps.activations[3].dtype == torch.int64


def test_parameters_are_no_activations_but_what_is_made_of_them_is() -> None:
    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.mul(2)
        return F.conv2d(x, weight, self.conv.bias)

    steps = steps_of(forward, 1, 3, 4, 4, conv=nn.Conv2d(3, 8, 1))
    assert told(steps) == [("Tensor.mul", (), (1,)), ("torch.conv2d", (0, 1), (2,))]
    stored = steps.steps[1].args[2]
    assert stored.stored and not steps.steps[1].args[0].stored


@pytest.mark.parametrize("name", ["Residual", "FusedQKV", "Swin", "GPT2", "Inception"])
def test_steps_are_plain_data_whose_functions_are_found_by_name(name: str) -> None:
    if name not in ZOO:
        pytest.fail(f"no {name} in the zoo")
    found = trace(*make(name))
    assert pickle.loads(pickle.dumps(found.forward)) == copy.deepcopy(found.forward) == found.forward
    functions = {step.function for step in found.forward.steps if step.function}
    assert {function for function in functions if find_function(function) is None} == set()
    assert all(step.module or step.function for step in found.forward.steps)


def test_unknown_functions_are_not_found() -> None:
    assert find_function("") is None
    assert find_function("os.system") is None
    assert find_function("torch.no_such_function") is None
