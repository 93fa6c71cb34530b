"""Every architecture of the zoo: converted, equal to its independent construction at any width, trained, exported."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn
from zoo import ZOO, make
from zoo.check import RATIOS, assert_same, call, close, leaves, narrow_copy, tensors, without_dropout

import fastslim
from fastslim import ops

NAMES = list(ZOO)


def converted(name, **options):
    """(converted network, plain copy of it, inputs, mutator)."""
    model, inputs = make(name)
    plain = copy.deepcopy(model)
    report = fastslim.convert(model, inputs, choices=RATIOS, divisor=1, seed=3, **options)
    return model, plain, ZOO[name].inputs(3), report.mutator


@pytest.mark.parametrize("backend", ["reference", "fastest"])
@pytest.mark.parametrize("name", NAMES)
def test_full_width_is_the_original(name, backend):
    """Bit for bit with torch's kernels, to rounding with our own; dropout included."""
    model, plain, inputs, _ = converted(name)
    assert model.state_dict().keys() == plain.state_dict().keys()
    same = assert_equal if backend == "reference" else close
    for training in (False, True):
        torch.manual_seed(1)
        with ops.use_backend("reference") if backend == "reference" else contextlib.nullcontext():
            ours = call(model.train(training), inputs)
        torch.manual_seed(1)
        theirs = call(plain.train(training), inputs)
        assert len(ours) == len(theirs) > 0
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            same(*pair, f"output {i}, training={training}")
        for key, value in plain.state_dict().items():
            same(model.state_dict()[key], value, key)


def assert_equal(ours, theirs, what):
    assert torch.equal(ours, theirs), f"{what} differs by {(ours - theirs).abs().max()}"


@pytest.mark.parametrize("name", NAMES)
def test_every_width_equals_the_independent_construction(name):
    model, plain, inputs, mutator = converted(name)
    without_dropout(model)
    for choices in (mutator.max_choices, mutator.min_choices, *(mutator.sample_choices() for _ in range(5))):
        mutator.set_choices(choices)
        narrow, where = narrow_copy(ZOO[name], plain, mutator, choices)
        assert_same(model, narrow, where, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_widths_that_must_be_slimmable_are(name):
    architecture = ZOO[name]
    model, plain, _, mutator = converted(name)
    shapes = {key: tensor.shape for key, tensor in tensors(plain).items()}

    def widths(choices):
        def size(key, dim):
            index = mutator.trace.index_of(key, choices)[dim] if key in mutator.trace.tensors else None
            return shapes[key][dim] if index is None else len(index)

        return architecture.widths(size), [size(*at.rsplit(":", 1)[:1], int(at[-1])) for at in architecture.full]

    full, narrow = widths(mutator.max_choices), widths(mutator.min_choices)
    assert full[0] == architecture.full_widths
    stuck = [width for width in full[0] if narrow[0][width] >= full[0][width]]
    assert not stuck, f"stay at full width: {stuck}"
    assert full[1] == narrow[1]
    if architecture.units != 0:
        assert len(mutator.mutable_units) == (architecture.units or len(architecture.shown))


def task_loss(output, targets):
    return {"loss": sum(leaf.square().mean() for leaf in leaves(output) if isinstance(leaf, torch.Tensor))}


@pytest.mark.parametrize("name", NAMES)
def test_a_train_step_is_finite_and_changes_weights(name):
    model, _, inputs, mutator = converted(name)
    model.train()
    if ZOO[name].classifies:
        algo = fastslim.AutoSlim(architecture=model)
        losses = algo.train_step((inputs, torch.tensor([0, 1, 2])), torch.optim.SGD(algo.parameters(), 0.01))
        assert {"max_subnet.loss", "min_subnet.loss_kl"} <= losses.keys()
        assert all(torch.isfinite(loss) for loss in losses.values())
        return
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for choices in (mutator.max_choices, mutator.min_choices, mutator.sample_choices()):
        mutator.set_choices(choices)
        loss = sum(o.square().mean() for o in call(model, inputs))
        assert torch.isfinite(loss)
        loss.backward()
    optimizer.step()
    assert any(not torch.equal(p, before[key]) for key, p in model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_subnet_is_plain_and_equal(name):
    model, plain, inputs, mutator = converted(name)
    model.eval()
    subnet = mutator.sample_choices()
    exported = fastslim.export_subnet(model, subnet).eval()
    mutator.set_choices(subnet)
    for ours, theirs in zip(call(exported, inputs), call(model, inputs), strict=True):
        close(ours, theirs, "output")
    assert not [m for m in exported.modules() if type(m).__module__.split(".")[0] == "fastslim"]
    assert sum(p.numel() for p in exported.parameters()) < sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_copies_keep_their_width(name):
    model, _, inputs, mutator = converted(name)
    model.eval()
    mutator.set_min_choices()
    expected = call(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert isinstance(copied, nn.Module)
        for ours, theirs in zip(call(copied, inputs), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_the_zoo_is_large():
    assert len(ZOO) >= 60


@pytest.mark.parametrize("name", NAMES)
def test_the_widths_by_hand_describe_the_full_network(name):
    model, _ = make(name)
    shapes = tensors(model)
    assert ZOO[name].widths(lambda key, dim: shapes[key].shape[dim]) == ZOO[name].full_widths
