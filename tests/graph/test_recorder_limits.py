"""What a recording cannot stand for, what is not looked into, and that nothing is left behind."""

import builtins
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from recorded_nets import Child, Net, assert_replays, obstacles, record, targets
from torch import nn

from fastslim.errors import FastslimRuntimeError


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
    assert "data-dependent" in captured.opaque["child"] and "test_recorder_limits.py:" in captured.opaque["child"]
    assert [frame.name for frame in captured.frames()] == [""]


def test_only_the_module_that_decides_is_not_looked_into():
    inner = Child(lambda s, x: s.inner(x * 2))
    inner.inner = Child(steer)
    captured = record(Net(lambda s, y: s.child(y), child=inner))
    assert list(captured.opaque) == ["child.inner"]
    assert [frame.name for frame in captured.frames()] == ["", "child"]


def test_a_model_that_decides_itself_is_refused_with_its_line():
    with pytest.raises(
        FastslimRuntimeError, match=r"data-dependent.*test_recorder_limits.py:\d+.*submodule of its own"
    ):
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
    with pytest.raises(
        FastslimRuntimeError, match=r"test_recorder_limits.py:\d+, in module 'child'.*exclude=\('child',\)"
    ):
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
