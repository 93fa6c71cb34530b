"""The plan computes what the model computes, with fewer calls, and steps aside where it must."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import CLASSIC, make

from fastslim import models
from fastslim.errors import FastslimTypeError
from fastslim.graph import make_plan
from fastslim.mutators import OneShotChannelMutator
from fastslim.nn import SlimBatchNorm2d

UNIT = dict(
    type="OneShotMutableChannelUnit",
    default_args=dict(candidate_choices=[0.25, 0.5, 0.75, 1.0], choice_mode="ratio", divisor=4),
)


def leaves(output):
    return torch.utils._pytree.tree_leaves(output)


def prepare(model, inputs):
    mutator = OneShotChannelMutator(UNIT, example_inputs=inputs, seed=1)
    mutator.prepare_from_supernet(model)
    return mutator


def step(module, model, inputs):
    torch.manual_seed(0)
    model.zero_grad()
    outputs = leaves(module(*inputs))
    sum(o.square().sum() for o in outputs).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return outputs, gradients, {n: b.clone() for n, b in model.named_buffers()}


def assert_same_step(plan, model, inputs):
    state = copy.deepcopy(model.state_dict())
    expected = step(model, model, inputs)
    model.load_state_dict(state)
    got = step(plan, model, inputs)
    model.load_state_dict(state)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def calls(plan):
    return [str(n.target) for n in plan.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize("name", sorted(set(CLASSIC) - {"FlattenHead", "LeNet", "TokenMixing"}))
def test_plan_equals_the_forward_at_random_widths(name):
    model, inputs = make(name)
    mutator = prepare(model.train(), inputs)
    plan, reasons = make_plan(mutator.trace)
    assert plan is not None, reasons
    for choices in (mutator.max_choices, mutator.min_choices, mutator.sample_choices()):
        mutator.set_choices(choices)
        assert_same_step(plan, model, inputs)


def test_plan_shares_every_layer():
    model, inputs = make("Residual")
    plan, _ = make_plan(prepare(model, inputs).trace)
    assert not list(plan.parameters())
    assert "stem.0" in calls(plan)
    plan(*inputs)


@pytest.mark.parametrize(
    ("name", "activations", "residuals"),
    [("resnet18", 17, 8), ("resnet50", 49, 16), ("mobilenet_v2", 35, 10)],
)
def test_every_activation_and_residual_of_public_networks_is_fused(name, activations, residuals):
    model = getattr(models, name)(num_classes=4)
    plan, reasons = make_plan(prepare(model, (2, 3, 32, 32)).trace)
    assert reasons == [f"batch norm fused with {activations} activations and {residuals} residual adds"]
    targets = {n.target for n in plan.graph.nodes if n.op == "call_function"}
    assert not any("add" in getattr(t, "__name__", "") or "relu" in getattr(t, "__name__", "") for t in targets)


def test_bf16_autocast_gives_the_same_classes():
    model = models.resnet18(num_classes=4, small_images=True)
    x = torch.randn(4, 3, 16, 16)
    plan, _ = make_plan(prepare(model, x).trace)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(plan(x), model(x), rtol=0.1, atol=0.1)


def test_hooked_and_kept_modules_are_called_and_seen():
    model, inputs = make("Residual")
    mutator = prepare(model, inputs)
    seen = []
    model.stem[1].register_forward_hook(lambda module, args, out: seen.append(out))
    plan, reasons = make_plan(mutator.trace, keep=["d"])
    assert "stem.1: its output is watched by a hook or recorder" in reasons
    assert "d: runs its own forward, because it is watched" in reasons
    assert "d" in calls(plan)
    seen.clear()
    plan(*inputs)
    assert len(seen) == 1 and (seen[0] < 0).any()  # before the activation


def test_a_hook_added_later_is_called():
    model, inputs = make("Residual")
    plan, _ = make_plan(prepare(model.train(), inputs).trace)
    seen = []
    handle = model.a.register_forward_hook(lambda *_: seen.append(1))
    plan(*inputs)
    assert seen == [1]
    handle.remove()
    plan(*inputs)
    assert seen == [1]


def test_dropout_written_with_self_training_follows_the_mode():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(F.dropout(self.bn(self.conv(x)).relu().mean((2, 3)), 0.5, self.training))

    model, x = Dropping(), torch.randn(4, 3, 8, 8)
    plan, _ = make_plan(prepare(model, x).trace)
    model.train()
    assert_same_step(plan, model, (x,))
    model.eval()
    torch.testing.assert_close(plan(x), model(x))


class Block(nn.Module):
    def __init__(self, rest):
        super().__init__()
        self.conv, self.bn, self.other, self.act = (
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(3, 8, 1),
            nn.ReLU(True),
        )
        self.rest = rest

    def forward(self, x):
        return self.rest(self, x)


def _used_twice(s, x):
    y = s.bn(s.conv(x))
    return F.relu(y) + y


def _input_changed(s, x):
    x = s.conv(x)
    y = s.bn(x)
    z = F.relu_(x)
    return F.relu(y) * z


def _broadcast(s, x):
    return s.bn(s.conv(x)) + s.other(x).mean((2, 3), keepdim=True)


def _with_alpha(s, x):
    return torch.add(s.bn(s.conv(x)), s.other(x), alpha=2)


NOTHING_TO_FUSE = {
    "used twice": _used_twice,
    "input changed": _input_changed,
    "broadcast": _broadcast,
    "alpha": _with_alpha,
}


@pytest.mark.parametrize("case", NOTHING_TO_FUSE)
def test_what_would_change_the_result_is_not_fused(case):
    model, x = Block(NOTHING_TO_FUSE[case]), torch.randn(2, 3, 4, 4)
    plan, reasons = make_plan(prepare(model, x).trace)
    assert plan is None and reasons[0] == "nothing to fuse"


FUSED = {
    "in-place module": lambda s, x: s.act(s.bn(s.conv(x))),
    "silu after add": lambda s, x: F.silu(s.other(x) + s.bn(s.conv(x)), inplace=True),
    "add method": lambda s, x: s.bn(s.conv(x)).add_(s.other(x)).relu_(),
    "hardswish": lambda s, x: F.hardswish(s.bn(s.conv(x))),
    "relu6": lambda s, x: F.relu6(torch.add(s.bn(s.conv(x)), s.other(x))),
    "add only": lambda s, x: s.other(x).add(s.bn(s.conv(x))),
}


@pytest.mark.parametrize("case", FUSED)
def test_every_spelling_is_fused(case):
    model, x = Block(FUSED[case]).double().train(), torch.randn(2, 3, 4, 4).double()
    plan, reasons = make_plan(prepare(model, x).trace)
    assert plan is not None, reasons
    assert sum(n.op in ("call_function", "call_method") for n in plan.graph.nodes) == 0
    assert_same_step(plan, model, (x,))


def test_forwards_that_cannot_be_recorded_for_all_sizes_give_a_reason():
    model = Block(lambda s, x: F.relu(s.bn(s.conv(x))) * int(x.shape[-1]))
    plan, reasons = make_plan(prepare(model, (2, 3, 4, 4)).trace)
    assert plan is None and "forward turns a size into a Python number" in reasons[0] and "test_plan.py:" in reasons[0]


def test_a_plan_that_would_differ_is_refused():
    class Factor:
        n = 0

        @property
        def calls(self):
            type(self).n += 1
            return type(self).n

    model = Block(lambda s, x: F.relu(s.bn(s.conv(x))) * s.factor.calls)
    model.factor = Factor()
    plan, reasons = make_plan(prepare(model, (2, 3, 4, 4)).trace)
    assert plan is None and "differs from the model's" in reasons[0]


def test_a_forward_that_counts_its_calls_gives_a_reason():
    def counts(s, x):
        s.calls = getattr(s, "calls", 0) + 1
        return F.relu(s.bn(s.conv(x)))

    plan, reasons = make_plan(prepare(Block(counts), (2, 3, 4, 4)).trace)
    assert plan is None and reasons == ["Block: forward changes an attribute of the module"]


def test_plan_of_a_model_needs_inputs():
    with pytest.raises(FastslimTypeError, match="needs example_inputs"):
        make_plan(nn.Sequential(SlimBatchNorm2d(4), nn.ReLU()))
    plan, _ = make_plan(nn.Sequential(SlimBatchNorm2d(4), nn.ReLU()), (1, 4, 3, 3))
    assert calls(plan) == ["0"]


@pytest.mark.parametrize("copying", ["deepcopy", "save"])
def test_a_copy_of_model_and_plan_share_their_layers(copying):
    model, inputs = make("Residual")
    both = {"model": model.train(), "plan": make_plan(prepare(model, inputs).trace)[0]}
    if copying == "deepcopy":
        both = copy.deepcopy(both)
    else:
        file = io.BytesIO()
        torch.save(both, file)
        file.seek(0)
        both = torch.load(file, weights_only=False)
    assert both["plan"]._model is both["model"]
    assert both["model"].stem[0] is not model.stem[0]
    assert_same_step(both["plan"], both["model"], inputs)
