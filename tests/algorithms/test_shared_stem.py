"""A step that runs the stem once equals the one whose passes run it each, in float64: gradients, losses, statistics."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from test_exactness import assert_equal_to_rounding, gradients, make, statistics, subnets_of_next_step
from test_step_options import distiller
from torch import Tensor, nn

import fastslim
from fastslim import models
from fastslim.algorithms import SlimmableNetwork
from fastslim.algorithms.shared_stem import SharedStem
from fastslim.bench import peak_bytes
from fastslim.nn import SlimConv2d

LABELS = torch.tensor([1, 2, 3, 4, 5, 6])
NETWORKS = {
    "resnet18": (partial(models.resnet18, 10, width_mult=0.25), partial(plain_loop.resnet18, small_images=False), 32),
    "mobilenet_v2": (
        partial(models.mobilenet_v2, 10, width_mult=0.25),
        partial(plain_loop.mobilenet_v2, small_images=False),
        32,
    ),
    "concat": (plain_loop.ConcatNet, plain_loop.concat_net, 12),  # three boundaries, two widths
    "grouped": (plain_loop.GroupedNet, plain_loop.grouped_net, 16),
}


class Small(nn.Module):
    """conv -> BN -> ReLU -> pool, then a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.MaxPool2d(2)
        self.body, self.body_norm, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.conv(x))))
        return self.fc(F.relu(self.body_norm(self.body(x)) + x).mean((2, 3)))


SMALL = "stem shared by all passes: conv, norm, relu, pool"


def small(**options) -> fastslim.AutoSlim:
    torch.manual_seed(0)
    net = Small().double()
    nn.init.normal_(net.norm.running_mean)
    return fastslim.AutoSlim(architecture=net, example_inputs=images()[:1], divisor=4, seed=1, **options)


def images(size: int = 12) -> Tensor:
    return torch.randn(6, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def unshared(algo: fastslim.AutoSlim) -> fastslim.AutoSlim:
    """A copy whose passes run everything; it draws the same widths."""
    other = copy.deepcopy(algo)
    other.share_stem = False
    return other


def everything(algo: nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**losses, **{f"grad.{k}": v for k, v in gradients(algo).items()}, **dict(algo.named_buffers())}


def assert_same_step(algo, batch=None, step=None, shared: bool = True, copies=None) -> None:
    """Two steps, the second on top of the first, with and without a shared stem; says that it was shared."""
    batch = (images(), LABELS) if batch is None else batch
    other = unshared(algo) if copies is None else copies
    algo.zero_grad()  # which the copy has none of
    for _ in range(2):
        results = [(step or (lambda a: a.accumulate(batch)))(each) for each in (algo, other)]
        assert_equal_to_rounding(everything(algo, results[0]), everything(other, results[1]))
    assert any(line.startswith("stem shared by all passes") for line in algo.plan_report) == shared, algo.plan_report
    assert "stem not shared: share_stem=False" in other.plan_report
    assert algo._plan.shared is None


@pytest.fixture
def calls(monkeypatch) -> list[nn.Module]:
    """Every convolution that is called."""
    seen: list[nn.Module] = []
    forward = SlimConv2d.forward
    monkeypatch.setattr(SlimConv2d, "forward", lambda conv, x: (seen.append(conv), forward(conv, x))[1])
    return seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_equals_the_plain_loop_and_the_step_without(name, layout, calls) -> None:
    build, forward, size = NETWORKS[name]
    torch.manual_seed(0)
    plain = build().double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    plain, x = plain.to(memory_format=layout), images(size).to(memory_format=layout)
    algo = fastslim.AutoSlim(architecture=copy.deepcopy(plain), example_inputs=x[:1], divisor=4, seed=1)
    other, widths = unshared(algo), subnets_of_next_step(algo)
    first = next(m for m in algo.architecture.modules() if isinstance(m, SlimConv2d))
    calls.clear()
    losses = algo.accumulate((x, LABELS))
    assert calls.count(first) == 1 and len(calls) > 4
    expected = plain_loop.sandwich_passes(plain_loop.Net(plain), forward, x, LABELS, widths)
    torch.testing.assert_close(torch.stack(list(losses.values())), torch.stack(expected), rtol=0, atol=1e-12)
    assert_equal_to_rounding(gradients(algo.architecture), gradients(plain))
    assert_equal_to_rounding(statistics(algo.architecture), statistics(plain))
    assert_equal_to_rounding(everything(algo, losses), everything(other, other.accumulate((x, LABELS))))


def test_all_layers_of_a_stem_run_once_and_the_others_in_every_pass(calls) -> None:
    algo, _, x, labels = make("mobilenet_v2", torch.float64, "nhwc")
    calls.clear()
    algo.accumulate((x, labels))
    counts = {name: calls.count(m) for name, m in algo.architecture.named_modules() if isinstance(m, SlimConv2d)}
    assert {name for name, count in counts.items() if count == 1} == {"features.0.0", "features.1.conv.0.0"}
    assert {count for count in counts.values() if count != 1} == {4}


@pytest.mark.parametrize("momentum", [0.0, 0.01, 0.7, 1.0, None])
def test_running_statistics_are_those_of_all_passes(momentum) -> None:
    algo = small()
    algo.architecture.norm.momentum = momentum
    assert_same_step(algo)
    assert algo.architecture.norm.momentum == momentum
    assert int(algo.architecture.norm.num_batches_tracked) == 2 * 4


def test_running_statistics_have_a_closed_form() -> None:
    algo = small()
    norm, m = algo.architecture.norm, 0.3
    norm.momentum, old = m, norm.running_var.clone()
    widths = [w["conv"] for w in subnets_of_next_step(algo)]
    algo.accumulate((images(), LABELS))
    batch = algo.architecture.conv(images()).var((0, 2, 3)).detach()
    keep = torch.tensor(
        [(1 - m) ** sum(width > channel for width in widths) for channel in range(16)], dtype=torch.float64
    )
    torch.testing.assert_close(norm.running_var, keep * old + (1 - keep) * batch, rtol=0, atol=1e-12)
    assert len(set(widths)) > 1


def evaluate_norm(algo) -> None:
    algo.architecture.norm.eval()


def no_statistics(algo) -> None:
    algo.architecture.norm.track_running_stats = False


def freeze(*names: str):
    def change(algo) -> None:
        for name, p in algo.architecture.named_parameters():
            p.requires_grad_(not name.startswith(names))

    return change


@pytest.mark.parametrize(
    "change",
    [evaluate_norm, no_statistics, freeze("conv"), freeze("conv", "norm"), freeze("norm.bias")],
    ids=["norm in evaluation", "no statistics", "frozen convolution", "frozen stem", "frozen shift"],
)
def test_frozen_parts_of_a_stem_stay_as_they_are(change) -> None:
    algo = small()
    change(algo)
    before = {name: value.clone() for name, value in algo.architecture.norm.named_buffers()}
    assert_same_step(algo)
    if change in (evaluate_norm, no_statistics):
        assert_equal_to_rounding(dict(algo.architecture.norm.named_buffers()), before)


@pytest.mark.parametrize("options", [dict(num_samples=0), dict(num_samples=1), dict(grad_reduction="mean")], ids=str)
def test_any_number_of_passes_and_the_mean_of_them(options) -> None:
    assert_same_step(small(**options))


def test_scaled_losses_and_optimizer_steps() -> None:
    assert_same_step(small(), step=lambda algo: algo.accumulate((images(), LABELS), scale=0.25))
    algo = small()
    other = unshared(algo)
    optimizers = {id(each): torch.optim.SGD(each.parameters(), 0.1, 0.9) for each in (algo, other)}
    assert_same_step(algo, step=lambda a: a.train_step((images(), LABELS), optimizers[id(a)]), copies=other)


def test_gradients_of_the_images() -> None:
    results = []
    for algo in (small(), small(share_stem=False)):
        x = images().requires_grad_()
        algo.accumulate((x, LABELS))
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recorded", ["fc", "body", "conv", "norm", "pool"])
def test_recorded_layers_are_run_in_every_pass(recorded, calls) -> None:
    config = distiller("fc")
    for side in ("student_recorders", "teacher_recorders"):
        config[side] = {**config[side], "seen": dict(type="ModuleOutputs", source=recorded)}
    algo = small(distiller=config)
    calls.clear()
    algo.accumulate((images(), LABELS))
    assert calls.count(algo.architecture.conv) == (4 if recorded == "conv" else 1)
    assert_same_step(algo, shared=recorded != "conv")
    if recorded == "conv":
        assert "stem not shared: conv is watched by a hook or recorder" in algo.plan_report


def listed(algo_class=SlimmableNetwork, **options) -> SlimmableNetwork:
    torch.manual_seed(0)
    return algo_class(Small().double(), example_inputs=images()[:1], **options)


def test_the_widest_pass_may_be_the_last_and_every_width_have_its_own_statistics(calls) -> None:
    algo = listed()
    calls.clear()
    algo.accumulate((images(), LABELS))
    widths = [subnet[next(iter(subnet))] for subnet in algo.mutator.subnets]
    assert widths[0] < widths[-1] and calls.count(algo.architecture.conv) == 1
    assert_same_step(algo)
    assert "stem shared by all passes: conv" in algo.plan_report  # its batch norm is another one in every pass


class Reversed(fastslim.AutoSlim):
    """The narrowest pass comes first."""

    def subnets_of_step(self):
        return dict(reversed(super().subnets_of_step().items()))


def test_a_narrow_first_pass_reads_the_stem_of_the_widest(calls) -> None:
    torch.manual_seed(0)
    algo = Reversed(architecture=Small().double(), example_inputs=images()[:1], divisor=4, seed=1)
    assert_same_step(algo)
    calls.clear()
    algo.accumulate((images(), LABELS))
    assert calls.count(algo.architecture.conv) == 1


class Augmented(fastslim.AutoSlim):
    """Some students see other images, or run without a gradient before."""

    def losses_of_pass(self, batch, teacher, *, first):
        self.passes = 0 if first else self.passes + 1
        if self.passes == 2:
            batch = batch._replace(inputs=batch.inputs.flip(3))
        if self.passes == 3:
            with torch.no_grad():
                self.call(self.fast_architecture, batch.inputs)
        return super().losses_of_pass(batch, teacher, first=first)


def test_passes_with_images_of_their_own_run_the_stem_themselves(calls) -> None:
    torch.manual_seed(0)
    algo = Augmented(architecture=Small().double(), example_inputs=images()[:1], divisor=4, seed=1)
    other = unshared(algo)
    for each in (algo, other):
        each.passes = 0
    calls.clear()
    losses = [each.accumulate((images(), LABELS)) for each in (algo, other)]
    assert_equal_to_rounding(everything(algo, losses[0]), everything(other, losses[1]))
    assert calls.count(algo.architecture.conv) == 3
    assert any(line.startswith("stem not shared: in the last step, a pass") for line in algo.plan_report)


class Overwriting(fastslim.AutoSlim):
    """Changes the images in place behind the first pass."""

    def losses_of_pass(self, batch, teacher, *, first):
        result = super().losses_of_pass(batch, teacher, first=first)
        if first:
            self.late = batch.inputs
        return result

    def choose_subnet(self, index, choices):
        super().choose_subnet(index, choices)
        if index == 1 and getattr(self, "late", None) is not None:
            with torch.no_grad():
                self.late += 1
            self.late = None


def test_changed_images_are_noticed(calls) -> None:
    torch.manual_seed(0)
    algo = Overwriting(architecture=Small().double(), example_inputs=images()[:1], divisor=4, seed=1)
    algo.architecture.conv.requires_grad_(False)  # whose backward pass would complain
    calls.clear()
    algo.accumulate((images(), LABELS))
    assert calls.count(algo.architecture.conv) == 4


def assert_not_shared(algo, reason: str, calls, step=None) -> None:
    calls.clear()
    (step or (lambda: algo.accumulate((images(), LABELS))))()
    assert calls.count(algo.architecture.conv) == 4
    lines = [line for line in algo.plan_report if line.startswith("stem")]
    assert lines == [f"stem not shared: {reason}"]


def test_options_that_keep_passes_whole(calls) -> None:
    assert_not_shared(small(share_stem=False), "share_stem=False", calls)
    assert_not_shared(small(fuse=False), "there is no execution plan", calls)
    assert_not_shared(small(cuda_graphs=True), "cuda_graphs=True: passes stand for themselves", calls)
    assert_not_shared(small(overlap_students=True), "overlap_students=True: passes stand for themselves", calls)


def test_evaluation_mode_keeps_passes_whole(calls) -> None:
    algo = small().eval()
    with pytest.warns(UserWarning, match="evaluation mode"):
        assert_not_shared(algo, "the algorithm is in evaluation mode", calls)
    algo.train()
    assert_same_step(algo)


@pytest.mark.parametrize("kind", ["module", "parameter", "accumulated", "forward"])
def test_a_hook_that_is_added_later_keeps_passes_whole(kind, calls) -> None:
    algo, seen = small(), []
    assert_same_step(algo)
    conv = algo.architecture.conv
    reason = "a layer of it has a hook"
    if kind == "module":
        handle = conv.register_forward_hook(lambda *_: seen.append(1))
    elif kind == "parameter":
        handle = conv.weight.register_hook(lambda _: seen.append(1))
    elif kind == "accumulated":
        handle = conv.weight.register_post_accumulate_grad_hook(lambda _: seen.append(1))
    else:
        reason, handle, forward = "a layer of it has a forward of its own", None, conv.forward
        conv.forward = lambda x: (seen.append(1), forward(x))[1]
    assert_not_shared(algo, reason, calls)
    assert len(seen) == 4
    if handle is not None:
        handle.remove()
        assert_same_step(algo)


def test_an_optim_wrapper_keeps_passes_whole(calls) -> None:
    wrapping = pytest.importorskip("mmengine.optim")
    algo = small()
    wrapper = wrapping.OptimWrapper(torch.optim.SGD(algo.parameters(), 0.1), accumulative_counts=4)
    reason = "an optim wrapper may change the weights between two passes"
    assert_not_shared(algo, reason, calls, lambda: algo.train_step((images(), LABELS), wrapper))


class Modes(Small):
    def forward(self, inputs, data_samples=None, mode="tensor"):
        output = super().forward(inputs)
        return {"loss": F.cross_entropy(output, data_samples)} if mode == "loss" else output


def test_a_network_with_modes_keeps_passes_whole(calls) -> None:
    torch.manual_seed(0)
    algo = fastslim.AutoSlim(architecture=Modes().double(), example_inputs=images()[:1], divisor=4, seed=1)
    calls.clear()
    algo.accumulate(dict(inputs=images(), data_samples=LABELS))
    assert calls.count(algo.architecture.conv) == 4
    assert any(line.startswith("stem not shared") for line in algo.plan_report)


def test_a_network_that_has_changed_runs_itself(calls) -> None:
    algo = small()
    other = unshared(algo)
    for each in (algo, other):
        each.architecture.pool = nn.AvgPool2d(2)
    losses = [each.accumulate((images(), LABELS)) for each in (algo, other)]
    assert_equal_to_rounding(everything(algo, losses[0]), everything(other, losses[1]))
    assert algo.plan_report[-1] == "stem not shared: in the last step, the network's own forward ran"


@pytest.mark.parametrize("failing", [0, 1, 3, "backward"])
def test_an_error_leaves_everything_as_before(failing, monkeypatch) -> None:
    algo = small()
    algo.accumulate((images(), LABELS))
    before = {name: value.clone() for name, value in algo.state_dict().items()}
    passes, inner = iter(range(100)), algo.losses_of_pass

    def out_of_memory(*args, **kwargs):
        result = inner(*args, **kwargs)
        if next(passes) == failing:
            raise torch.OutOfMemoryError
        return result

    def broken(shared):
        raise torch.OutOfMemoryError

    if failing == "backward":
        monkeypatch.setattr(SharedStem, "backward", broken)
    else:
        monkeypatch.setattr(algo, "losses_of_pass", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        algo.accumulate((images(), LABELS))
    for name, value in algo.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in algo.parameters()) and algo._plan.shared is None
    monkeypatch.undo()
    assert_same_step(algo)


def test_an_error_inside_the_stem_puts_its_batch_norm_back() -> None:
    algo = small()
    norm = algo.architecture.norm
    kept = {name: id(value) for name, value in norm.named_buffers()}
    before = {name: value.clone() for name, value in norm.named_buffers()}
    algo.accumulate((images(), LABELS))
    with pytest.raises(fastslim.errors.FastslimTypeError, match="input is torch.float32"):
        algo.accumulate((images().float(), LABELS))
    norm.load_state_dict({**norm.state_dict(), **before})
    assert {name: id(value) for name, value in norm.named_buffers()} == kept
    assert norm.momentum == 0.1 and algo._plan.shared is None
    assert_same_step(algo)


def test_an_output_changed_in_place_later_is_an_error_that_names_the_remedy() -> None:
    class Late(Small):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(F.relu(self.norm(self.conv(x))))
            y = self.act(x + 0.0)
            return self.fc(F.relu(self.body_norm(self.body(y))).mean((2, 3)))

    torch.manual_seed(0)
    algo = fastslim.AutoSlim(architecture=Late().double(), example_inputs=images()[:1], divisor=4, seed=1)
    stem = algo._plan.stem
    run = stem.rest
    # As by a layer whose `inplace` was set behind the plan's back.
    object.__setattr__(stem, "rest", lambda model, value, *rest: run(model, value.mul_(1.5), *rest))
    with pytest.raises(fastslim.errors.FastslimRuntimeError, match="share_stem=False"):
        algo.accumulate((images(), LABELS))


def test_copies_and_pickles_share_their_own_stem() -> None:
    algo = small()
    for other in (copy.deepcopy(algo), pickle.loads(pickle.dumps(algo))):
        assert other._plan.stem.convs[0] is other.architecture.conv
        assert SMALL in other.plan_report
        assert_same_step(other)
    torch.testing.assert_close(algo.architecture.norm.num_batches_tracked, torch.tensor(0))


def test_verify_compares_the_shared_stem_with_the_plain_loop() -> None:
    algo, _, x, labels = make("resnet18", torch.float32, "nhwc")
    assert algo.plan_report[-1].startswith("stem shared")
    report = fastslim.verify(algo, (x, labels))
    assert report, str(report)


def test_verify_notices_gradients_of_a_pass_that_are_lost(monkeypatch) -> None:
    from fastslim.algorithms.shared_stem import _Value

    algo, _, x, labels = make("resnet18", torch.float32, "nhwc")
    add = _Value.add
    monkeypatch.setattr(_Value, "add", lambda value, g: add(value, g) if g.shape == value.tensor.shape else None)
    assert not fastslim.verify(algo, (x, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_err_no_more_than_passes_of_their_own(dtype) -> None:
    algo = small()
    truth = unshared(algo)
    truth.accumulate((images(), LABELS))
    low = [algo.float(), unshared(algo.float())]
    with torch.autocast("cpu", dtype):
        for each in low:
            each.accumulate((images().float(), LABELS))
    errors = []
    for each in low:
        of_stem = [(getattr(each.architecture, n), getattr(truth.architecture, n)) for n in ("conv", "norm")]
        pairs = [(a.weight.grad.double(), b.weight.grad) for a, b in of_stem]
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
    assert errors[0] <= 2 * errors[1] + 16 * torch.finfo(dtype).eps
    assert errors[0] < 0.1


def test_the_step_on_the_meta_device() -> None:
    algo = small().to("meta")
    algo.accumulate((images().to("meta"), LABELS.to("meta")))
    assert SMALL in algo.plan_report


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_shared_stem_needs_no_more_memory(name) -> None:
    peaks = []
    x = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    for share_stem in (True, False):
        torch.manual_seed(0)
        net = models.create_model(name, num_classes=10)
        algo = fastslim.AutoSlim(architecture=net, example_inputs=x[:1], seed=0, share_stem=share_stem)
        algo = algo.to(memory_format=torch.channels_last)
        algo.accumulate((x, torch.arange(8)))
        peaks.append(peak_bytes(partial(algo.accumulate, (x, torch.arange(8)))))
    assert peaks[0] > 5e6
    assert peaks[0] <= 1.01 * peaks[1]
