"""Captured passes, with a capture that records calls in the place of launches: when, for what, and the same numbers."""

from __future__ import annotations

import functools

import pytest
import torch
from test_sandwich_step import IMAGES, LABELS, algorithm, assert_equal, train

from fastslim.algorithms import graphed_pass, sandwich_step
from fastslim.distillers import ConfigurableDistiller
from fastslim.ops.step_buffers import StepBuffers


class Recorder:
    """Stands for CUDA's capture: capturing changes nothing; a replay runs the function and refills its results."""

    def __init__(self, algo, error=None):
        self.algo, self.error, self.captured, self.replayed = algo, error, 0, 0

    def __call__(self, function):
        self.captured += 1
        buffers = self.algo._step._buffers
        fresh = buffers.fresh()
        state = [*self.algo.architecture.buffers(), *buffers.flat.values()]
        before = [tensor.clone() for tensor in state]
        try:
            result = function()
        finally:
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)
        if self.error is not None:
            raise self.error

        def replay():
            self.replayed += 1
            assert buffers.fresh() == fresh
            losses, output = function()
            for name, value in losses.items():
                result[0][name].copy_(value)
            if output is not None:
                result[1].copy_(output)

        return replay, result


@pytest.fixture
def recorded(monkeypatch):
    """An algorithm whose passes are captured by a recorder, and that recorder."""

    def make(name="mixed", error=None, **options):
        monkeypatch.setattr(sandwich_step, "StepBuffers", functools.partial(StepBuffers, collect=True))
        algo = algorithm(name, cuda_graphs=True, **options)
        recorder = Recorder(algo, error)
        monkeypatch.setattr(sandwich_step, "GraphedPasses", lambda: graphed_pass.GraphedPasses(recorder))
        return algo, recorder

    return make


@pytest.mark.parametrize("name", ["mixed", "resnet18"])
def test_replays_give_the_numbers_of_ordinary_passes(name, recorded):
    expected = train(algorithm(name, share_stem=False), steps=6)  # a captured pass is a whole one
    algo, recorder = recorded(name)
    assert_equal(train(algo, steps=6), expected)
    assert recorder.captured == 2  # the max and the min pass; random widths run as ever
    assert recorder.replayed == 2 * (6 - graphed_pass.EAGER_STEPS)
    assert [line.split(":")[0] for line in algo.graph_report] == ["max_subnet", "min_subnet"]


def test_another_shape_or_state_of_the_gradients_is_captured_anew(recorded):
    algo, recorder = recorded()
    train(algo, steps=4)
    assert recorder.captured == 2
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.01)
    for _ in range(4):  # half the batch
        algo.train_step((IMAGES[:2].double(), LABELS[:2]), optimizer)
    assert recorder.captured == 4
    for _ in range(4):
        algo.accumulate((IMAGES.double(), LABELS), scale=0.5)
    assert recorder.captured == 6


def test_no_more_graphs_than_memory_is_set_aside_for(recorded, monkeypatch):
    monkeypatch.setattr(graphed_pass, "MOST_GRAPHS", 2)
    algo, recorder = recorded()
    train(algo, steps=4)
    train(algo, steps=4, images=IMAGES[..., :12])
    assert recorder.captured == 2


def test_a_capture_that_fails_is_reported_and_left_out(recorded):
    expected = train(algorithm("mixed"), steps=5)
    algo, recorder = recorded(error=RuntimeError("operation not permitted when stream is capturing"))
    with pytest.warns(UserWarning, match="runs without a CUDA graph"):
        state = train(algo, steps=5)
    assert_equal(state, expected)
    assert recorder.captured == 2
    assert all("capturing it failed" in line for line in algo.graph_report)


def test_a_graph_of_students_reads_the_teacher_of_its_own_step(recorded):
    def alternate(algo):
        """The max pass has two graphs, by whether gradients are overwritten or added to; the min pass one."""
        algo.train()
        optimizer = torch.optim.SGD(algo.parameters(), lr=0.05)
        losses = []
        for step in range(12):
            data = (IMAGES.double() * (1 + step / 10), LABELS)
            algo.accumulate(data)
            losses += [value.clone() for value in algo.accumulate(data).values()]
            optimizer.step()
            optimizer.zero_grad()
        return losses

    expected = alternate(algorithm("mixed"))
    algo, recorder = recorded()
    for ours, theirs in zip(alternate(algo), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert recorder.captured == 3


def test_a_factor_of_the_loss_that_changes_needs_no_other_graph(recorded):
    def scaled(algo):
        algo.train()
        for step in range(9):
            algo.zero_grad()
            algo.accumulate((IMAGES.double(), LABELS), scale=2.0**step)
        return [p.grad.clone() for p in algo.parameters()]

    expected = scaled(algorithm("mixed"))
    algo, recorder = recorded()
    for ours, theirs in zip(scaled(algo), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert recorder.captured == 2


def test_a_capture_that_fails_leaves_no_gradients_behind(recorded, monkeypatch):
    expected = train(algorithm("mixed"), steps=5)
    algo, recorder = recorded()
    end_pass = StepBuffers.end_pass

    def end(self):
        if recorder.captured > len(algo.graph_report):  # inside a capture, with gradients waiting
            raise RuntimeError("operation failed due to a previous error during capture")
        end_pass(self)

    monkeypatch.setattr(StepBuffers, "end_pass", end)
    with pytest.warns(UserWarning, match="runs without a CUDA graph"):
        state = train(algo, steps=5)
    assert_equal(state, expected)


def test_parameters_whose_memory_was_replaced_are_captured_anew(recorded):
    algo, recorder = recorded()
    train(algo, steps=4)
    for p in algo.parameters():
        p.data = p.data.clone()
    train(algo, steps=4)
    assert recorder.captured == 4


def test_what_differs_in_every_step_is_not_remembered_for_ever(recorded, monkeypatch):
    monkeypatch.setattr(graphed_pass, "MOST_SEEN", 3)
    algo, recorder = recorded()
    for _ in range(6):
        for p in algo.parameters():
            p.data = p.data.clone()
        train(algo, steps=1)
    assert len(algo._step._graphs._seen) <= 4
    assert recorder.captured == 0


def test_the_report_says_why_nothing_is_captured(recorded):
    algo = algorithm("mixed", cuda_graphs=True)
    train(algo, steps=1)
    assert all("graphs are captured on a GPU" in line for line in algo.graph_report)
    assert algorithm("mixed").graph_report == []
    watched, recorder = recorded(
        distiller=ConfigurableDistiller(
            teacher_recorders=dict(fc=dict(type="ModuleOutputs", source="fc")),
            student_recorders=dict(fc=dict(type="ModuleOutputs", source="fc")),
            distill_losses=dict(loss_kl=dict(type="KLDivergence")),
            loss_forward_mappings=dict(
                loss_kl=dict(
                    preds_S=dict(recorder="fc", from_student=True), preds_T=dict(recorder="fc", from_student=False)
                )
            ),
        )
    )
    train(watched, steps=5)
    assert recorder.captured == 0
    assert all("recorders" in line for line in watched.graph_report)
