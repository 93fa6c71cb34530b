"""What keeps passes whole, and what an error in a step with a shared stem leaves behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stem_cases import LABELS, Small, assert_same_step, everything, images, small, unshared
from test_exactness import assert_equal_to_rounding
from torch import Tensor, nn

import fastslim
from fastslim.algorithms.shared_stem import SharedStem


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
