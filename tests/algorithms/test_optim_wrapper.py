"""Optimizer wrappers by their methods alone: every pass is one update, and the wrapper decides when to step."""

from __future__ import annotations

import contextlib
import copy
import types
import warnings

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from test_exactness import make, subnets_of_next_step

from fastslim.algorithms.optim_wrapper import announcing, is_optim_wrapper


class Wrapper:
    """Adds up the gradients of `counts` updates, scaled to their mean times `factor`, clips and steps."""

    def __init__(self, optimizer, counts=1, factor=1.0, clip=None):
        self.optimizer, self._accumulative_counts, self.factor, self.clip = optimizer, counts, factor, clip
        self.updates = self.steps = 0
        self.contexts = []
        self.message_hub = types.SimpleNamespace(runtime_info={})

    def should_sync(self):
        return (self.updates + 1) % self._accumulative_counts == 0

    @contextlib.contextmanager
    def optim_context(self, model):
        self.contexts.append(model)
        yield

    def update_params(self, loss):
        (self.factor * loss / self._accumulative_counts).backward()
        self.updates += 1
        if self.updates % self._accumulative_counts:
            return
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad /= self.factor
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1


def plain_step(plain, images, labels, subnets, wrapper):
    net, teacher = plain_loop.Net(plain), None
    for net.widths in subnets:
        logits = plain_loop.concat_net(net, images)
        if teacher is None:
            loss, teacher = F.cross_entropy(logits, labels), F.softmax(logits.detach(), 1)
        else:
            loss = F.kl_div(F.log_softmax(logits, 1), teacher, reduction="batchmean")
        wrapper.update_params(loss)


@pytest.mark.parametrize(("counts", "steps"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (8, 1)])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.filterwarnings("ignore:accumulative_counts")
def test_three_steps_equal_a_loop_with_the_same_wrapper(counts, steps, clip) -> None:
    algo, plain, images, labels = make("concat", torch.float64, "nchw")
    wrappers = [
        Wrapper(torch.optim.SGD(m.parameters(), 1e-2, 0.9), counts, factor=1024.0, clip=clip) for m in (algo, plain)
    ]
    for _ in range(3):
        subnets = subnets_of_next_step(algo)
        algo.train_step((images, labels), wrappers[0])
        plain_step(plain, images, labels, subnets, wrappers[1])
    assert wrappers[0].steps == wrappers[1].steps == steps
    assert wrappers[0].contexts == [algo] * 12
    for (name, mine), theirs in zip(algo.architecture.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=name)
        assert (mine.grad is None) == (theirs.grad is None)


@pytest.mark.parametrize(
    ("counts", "message"), [(1, "makes 4 optimizer steps for each batch"), (3, "does not go evenly into 4 passes")]
)
def test_a_count_that_makes_several_steps_a_batch_is_said_once(counts, message) -> None:
    algo, _, *batch = make("concat", torch.float64, "nchw")
    wrapper = Wrapper(torch.optim.SGD(algo.parameters(), 1e-2), counts)
    with pytest.warns(UserWarning, match=message):
        algo.train_step(batch, wrapper)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algo.train_step(batch, wrapper)


def test_the_wrappers_count_of_iterations_is_multiplied_by_the_passes() -> None:
    algo, _, *batch = make("concat", torch.float64, "nchw", num_samples=1)
    wrapper = Wrapper(torch.optim.SGD(algo.parameters(), 1e-2), 3)
    wrapper.message_hub.runtime_info.update(iter=5, max_iters=100)
    told = []
    wrapper.initialize_count_status = lambda model, now, last: told.append((model, now, last))
    for _ in range(2):
        algo.train_step(batch, wrapper)
    assert told == [(algo, 15, 300)]
    assert algo._optim_wrapper_count_status_reinitialized


def test_the_mean_is_the_wrappers_business() -> None:
    algo, _, *batch = make("concat", torch.float64, "nchw", grad_reduction="mean")
    with pytest.raises(ValueError, match="what an optim wrapper with accumulative_counts=4 does"):
        algo.train_step(batch, Wrapper(torch.optim.SGD(algo.parameters(), 1e-2), 4))


@pytest.mark.parametrize("optimizer", [None, "sgd", 0.1])
def test_what_is_no_optimizer_is_named(optimizer) -> None:
    algo, _, *batch = make("concat", torch.float64, "nchw")
    with pytest.raises(TypeError, match="optimizer should be a torch.optim.Optimizer or an mmengine OptimWrapper"):
        algo.train_step(batch, optimizer)


def test_a_failing_pass_leaves_statistics_and_no_gradients() -> None:
    algo, _, images, labels = make("concat", torch.float64, "nchw")
    wrapper = Wrapper(torch.optim.SGD(algo.parameters(), 1e-2), 4)
    before = copy.deepcopy(algo.state_dict())
    algo.task_loss = lambda output, targets: output.sum() * float("nan")
    with pytest.raises(RuntimeError, match="in the max_subnet pass: the loss is nan"):
        algo.train_step((images, labels), wrapper)
    assert all(torch.equal(value, before[key]) for key, value in algo.state_dict().items())
    assert all(p.grad is None for p in algo.parameters())


def test_the_end_of_a_backward_pass_is_announced_after_all_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)
    seen = []
    loss = announcing((2 * weight).sum(), lambda: seen.append(weight.grad.clone()))
    assert not seen
    loss.backward()
    assert seen[0].tolist() == [2.0, 2.0, 2.0]


def test_a_plain_optimizer_is_no_wrapper() -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1)
    assert not is_optim_wrapper(optimizer)
    assert is_optim_wrapper(Wrapper(optimizer))
