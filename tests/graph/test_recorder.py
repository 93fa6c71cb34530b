"""Recording a forward while it runs: frames, what is a node, and that the recording computes what forward does."""

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recorded_nets import Child, Net, assert_replays, obstacles, record, targets
from torch import nn

from fastslim.graph.frame import user_location


def test_every_module_with_a_forward_of_its_own_is_a_frame():
    model = Net(lambda s, y: s.child(y) + 1, child=nn.Sequential(nn.ReLU(), Child(lambda s, x: x * s.scale)))
    captured = record(model)
    assert [frame.name for frame in captured.frames()] == ["", "child", "child.1"]
    assert [targets(frame) for frame in captured.frames()] == [["conv", "child", "add"], ["0", "1"], ["scale", "mul"]]
    assert obstacles(captured) == []
    assert_replays(captured, model, (torch.randn(2, 3, 4, 4),))


def test_nodes_know_shape_line_and_tensor():
    captured = record(Net(lambda s, y: s.child(y), child=Child(lambda s, x: x * s.scale)))
    nodes = {node.name: node for node in captured.root.children.popitem()[1].graph.nodes}
    assert nodes["mul"].meta["shape"] == (2, 4, 4, 4)
    assert nodes["mul"].meta["location"].startswith(__file__)
    assert nodes["scale"].meta["tensor"] == "child.scale"


def test_a_module_called_twice_is_two_calls_of_one_module():
    captured = record(Net(lambda s, y: s.child(s.child(y)), child=Child(lambda s, x: x * s.scale)))
    assert [frame.name for frame in captured.frames()] == ["", "child", "child"]
    assert targets(captured.root) == ["conv", "child", "child"]
    assert len({id(frame.module) for frame in captured.frames()}) == 2


def test_a_module_under_two_names_goes_by_the_name_in_its_caller():
    child = Child(lambda s, x: x * s.scale)
    model = Net(lambda s, y: s.outer(y), outer=nn.Sequential(child), also=child)
    captured = record(model)
    assert targets(captured.root) == ["conv", "outer"]
    assert targets(captured.root.children.popitem()[1]) == ["0"]
    assert obstacles(captured) == []


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.Sequential(), nn.Dropout(0.0), nn.Sequential(nn.Identity(), nn.Identity())]
)
def test_what_returns_its_argument_is_recorded_as_a_call(module):
    model = Net(lambda s, y: s.same(y) + y, same=module)
    captured = record(model)
    assert targets(captured.root)[:2] == ["conv", "same"]
    assert obstacles(captured) == []
    assert_replays(captured, model.eval(), (torch.randn(2, 3, 4, 4),))


INPLACE = {
    "method": lambda s, y: y.mul_(2).add_(1) + y,
    "operator": lambda s, y: iadd(y),
    "module": lambda s, y: s.relu(y) + y,
    "function": lambda s, y: F.relu(y, inplace=True) + y,
    "item": lambda s, y: written(y),
    "of a clone": lambda s, y: y.clone().clamp_(min=0) - y,
    "of a view": lambda s, y: viewed(y),
}


def iadd(y):
    before = y
    y += 1
    return before * y


def written(y):
    y[:, 0] = 0
    y[:, 1:2] *= 2
    return y


def viewed(y):
    y.view(-1).mul_(2)
    return y


@pytest.mark.parametrize("case", INPLACE)
def test_in_place_operations_replay(case):
    model = Net(INPLACE[case], relu=nn.ReLU(inplace=True))
    captured = record(model)
    assert obstacles(captured) == []
    assert_replays(captured, model, (torch.randn(2, 3, 4, 4),))


Pair = namedtuple("Pair", "one two")


@dataclass
class Box:
    one: torch.Tensor
    rest: dict


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: (a, [b]),
        lambda a, b: {"a": a, "more": {"b": b}},
        lambda a, b: Pair(a, b),
        lambda a, b: Box(a, {"b": (b,)}),
    ],
    ids=["tuple", "dict", "namedtuple", "dataclass"],
)
def test_nested_outputs_of_model_and_child(wrap):
    def use(s, y):
        made = s.child(y)
        tensors = list(leaves(made))
        return wrap(tensors[0] + 1, tensors[1])

    captured = record(Net(use, child=Child(lambda s, x: wrap(x * 2, x * s.scale))))
    assert len(captured.outputs) == 2
    assert [node.meta["shape"] for node in captured.outputs] == [(2, 4, 4, 4)] * 2
    inner = [node for node in captured.root.graph.nodes if "inner" in node.meta]
    assert [node.meta["inner"].target for node in inner] == [torch.Tensor.mul, torch.Tensor.mul] or [
        getattr(node.meta["inner"].target, "__name__", node.meta["inner"].target) for node in inner
    ] == ["mul", "mul"]


def leaves(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Box):
        yield from leaves([value.one, value.rest])
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


def test_keyword_nested_and_size_arguments_come_from_the_caller():
    def inside(s, x, *, pair, size, flag=True):
        return (x + pair[0]).view(size[0], -1) if flag else x

    def use(s, y):
        return s.child(y, pair=[y * 2, None], size=y.shape[:2])

    model = Net(use, child=Child(inside))
    captured = record(model)
    (child,) = captured.root.children.values()
    inputs = [leaf for leaf in child.leaves if isinstance(leaf, torch.fx.Node)]
    assert [n.meta.get("shape", n.meta.get("value")) for n in inputs] == [(2, 4, 4, 4), (2, 4, 4, 4), 2, 4]
    assert all(node.meta["outer"].graph is captured.root.graph for node in inputs)
    assert obstacles(captured) == []
    assert_replays(captured, model, (torch.randn(2, 3, 4, 4),))


def test_packages_named_like_torch_count_as_the_users_code():
    beside = Path(torch.__file__).parent.with_name("torchvision") / "ops.py"
    inside = Path(torch.__file__).parent / "nn" / "functional.py"
    assert user_location(iter([(str(inside), 1), (str(beside), 7)])) == f"{beside}:7"
