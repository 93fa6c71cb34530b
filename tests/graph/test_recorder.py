"""Recording a forward while it runs: frames, what is a node, what is an obstacle, and that nothing is left behind."""

import builtins
import copy
import random
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastslim.errors import FastslimRuntimeError
from fastslim.graph.capture import bind_inputs, capture
from fastslim.graph.flat import flatten_frames


class Net(nn.Module):
    """A convolution, with `function(self, y)` behind it."""

    def __init__(self, function, **parts):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, self.conv(x))


class Child(nn.Module):
    """The same without a convolution, and any arguments."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.full((4, 1, 1), 2.0))

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def record(model, inputs=(2, 3, 4, 4), **kwargs):
    return capture(model, bind_inputs(model, inputs), **kwargs)


def targets(frame):
    return [getattr(n.target, "__name__", n.target) for n in frame.graph.nodes if n.op not in ("placeholder", "output")]


def obstacles(captured):
    return [reason for frame in captured.frames() for reason in frame.obstacles]


def assert_replays(captured, model, inputs):
    """The recorded graphs, put together, compute what forward does."""
    module = torch.fx.GraphModule(model, flatten_frames(captured))
    torch.testing.assert_close(module(*inputs), model(*inputs))


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


def test_a_tensor_passed_by_attribute_is_an_obstacle_on_both_sides():
    def give(s, x):
        s.box.append(x * 2)
        return x

    def use(s, y):
        s.child.box = []
        return s.child(y) + s.child.box[0]

    captured = record(Net(use, child=Child(give)))
    assert any("among its arguments" in reason for reason in captured.root.obstacles)
    (child,) = captured.root.children.values()
    assert any("another way than its result" in reason for reason in child.obstacles)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda s, y: y * random.random(), "random numbers in Python"),
        (lambda s, y: y if torch.rand(1).item() < 2 else -y, "tokens, masks or random numbers"),
        (lambda s, y: setattr(s, "calls", 3) or y, "changes an attribute"),
        (lambda s, y: y * s.other[0].weight.sum(), "tensor of another module"),
        (lambda s, y: y + ELSEWHERE, "tensor from elsewhere"),
        (lambda s, y: setattr(y, "data", y.data * 2) or y, "assigns to Tensor.data"),
    ],
)
def test_what_a_recording_cannot_stand_for_is_an_obstacle(function, reason):
    model = Net(function)
    model.other = ()
    outside = nn.Sequential(model, nn.Conv2d(4, 4, 1))
    model.other = (outside[1],)
    captured = record(outside)
    frame = captured.root.children[next(iter(captured.root.children))]
    assert any(reason in obstacle for obstacle in frame.obstacles), frame.obstacles


ELSEWHERE = torch.ones(4, 1, 1)


def test_tensors_made_in_forward_are_nodes():
    def use(s, y):
        mask = torch.ones(y.shape[-1], y.shape[-1]).tril()
        return y * mask + torch.arange(4) - y.new_zeros(y.shape[1], 1, 1) + torch.rand_like(y) * 0 + torch.tensor(1.5)

    model = Net(use)
    captured = record(model)
    names = targets(captured.root)
    assert {"ones", "tril", "arange", "new_zeros", "rand_like", "tensor"} <= set(names)
    assert obstacles(captured) == []
    assert_replays(captured, model, (torch.randn(2, 3, 4, 4),))


def test_sizes_that_are_compared_or_looped_over_are_guards():
    def use(s, y):
        for _ in range(y.shape[2]):
            y = y + 1
        return y if y.shape[3] > 3 else -y

    captured = record(Net(use))
    assert len(captured.root.guards) == 2
    assert all(guard.location.startswith(__file__) for guard in captured.root.guards)


def steer(s, x):
    return x + 1 if x.sum() > 0 else x - 1


def test_a_submodule_that_decides_by_data_is_not_looked_into_and_reported():
    captured = record(Net(lambda s, y: s.child(y), child=Child(steer)))
    assert list(captured.opaque) == ["child"]
    assert "data-dependent" in captured.opaque["child"] and "test_recorder.py:" in captured.opaque["child"]
    assert [frame.name for frame in captured.frames()] == [""]


def test_only_the_module_that_decides_is_not_looked_into():
    inner = Child(lambda s, x: s.inner(x * 2))
    inner.inner = Child(steer)
    captured = record(Net(lambda s, y: s.child(y), child=inner))
    assert list(captured.opaque) == ["child.inner"]
    assert [frame.name for frame in captured.frames()] == ["", "child"]


def test_a_model_that_decides_itself_is_refused_with_its_line():
    with pytest.raises(FastslimRuntimeError, match=r"data-dependent.*test_recorder.py:\d+.*submodule of its own"):
        record(Net(steer))


@pytest.mark.parametrize(
    "read",
    [lambda x: x.max().item() > 0, lambda x: x.tolist(), lambda x: float(x.mean()), lambda x: x.detach().numpy()],
)
def test_reading_data_in_any_way_counts_as_deciding(read):
    with pytest.raises(FastslimRuntimeError, match="data-dependent"):
        record(Net(lambda s, y: (read(y), y)[1]))


def test_verdicts_on_finite_numbers_do_not_stop_the_recording():
    captured = record(Net(lambda s, y: y if torch.isfinite(y).all() else y * 0))
    assert any("decides by" in reason for reason in obstacles(captured))


def test_hooks_run_and_their_computation_is_noticed():
    model = Net(lambda s, y: s.relu(y), relu=nn.ReLU())
    calls = []
    model.conv.register_forward_hook(lambda *args: calls.append("seen"))
    assert obstacles(record(model)) == [] and calls == ["seen"]
    model.conv.register_forward_hook(lambda module, args, result: result * 2)
    captured = record(model)
    assert targets(captured.root) == ["conv", "mul", "relu"]
    assert obstacles(captured) == ["a hook of conv computes"]


def test_both_modes_are_recorded_as_they_run():
    model = Net(lambda s, y: F.dropout(y, 0.5, s.training) if s.training else y)
    assert targets(record(model, training=True).root) == ["conv", "dropout"]
    assert targets(record(model, training=False).root) == ["conv"]


def snapshot(model):
    return [
        (dict(m.__dict__), dict(m._parameters), dict(m._buffers), dict(m._modules), m.training) for m in model.modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_python_are_as_before(training, fails):
    def use(s, y):
        s.norm(y)
        s.note, s.conv.note = 1, 2
        s.norm.running_mean.add_(1)
        s.norm.register_buffer("late", torch.ones(1))
        s.norm.eval()
        torch.rand(1)
        return y.view(7, 7) if fails else y

    model = Net(use, norm=nn.BatchNorm2d(4))
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    call, ranges, draws = nn.Module.__call__, builtins.range, torch.get_rng_state()
    if fails:
        with pytest.raises(FastslimRuntimeError, match="shape '\\[7, 7\\]' is invalid"):
            record(model, training=training)
    else:
        record(model, training=training)
    assert nn.Module.__call__ is call and builtins.range is ranges
    assert torch.equal(torch.get_rng_state(), draws)
    for ours, theirs in zip(snapshot(model), before, strict=True):
        assert [set(d) if isinstance(d, dict) else d for d in ours] == [
            set(d) if isinstance(d, dict) else d for d in theirs
        ]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()


def test_an_error_names_the_module_the_line_and_the_way_out():
    broken = Child(lambda s, x: x.view(7, 7))
    with pytest.raises(FastslimRuntimeError, match=r"test_recorder.py:\d+, in module 'child'.*exclude=\('child',\)"):
        record(Net(lambda s, y: s.child(y), child=broken))


def test_a_module_that_is_not_the_models_runs_unrecorded_as_torch_functions():
    helper = nn.Conv2d(4, 4, 1)
    captured = record(Net(lambda s, y: F.relu(y) + helper(y)))
    assert any("tensor from elsewhere" in reason for reason in captured.root.obstacles)


def test_scripted_modules_are_not_looked_into():
    model = Net(lambda s, y: s.scripted(y), scripted=torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())))
    assert targets(record(model).root) == ["conv", "scripted"]


def test_excluded_modules_need_not_be_recordable():
    captured = record(Net(lambda s, y: s.child(y), child=Child(steer)), opaque=frozenset({"child"}))
    assert captured.opaque == {"child": "excluded by the caller"}
