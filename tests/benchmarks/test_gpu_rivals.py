"""The rivals of the whole-step benchmark compute the same step as the plain slicing loop."""

from __future__ import annotations

import copy

import contest
import plain_loop
import pytest
import rivals
import step
import torch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prepared():
    return rivals.prepare("mobilenet_v2", 4, 32, CPU, torch.bfloat16, width=0.25, subnets=4)


def gradients_and_statistics(load, kind):
    """Losses, gradients and running statistics of one sandwich by a kind of `plain_loop.Net`."""
    model = copy.deepcopy(load.model).double()
    net = kind(model)
    images, labels = load.batches[0]
    subnets = [*load.fixed, *load.randoms[:2]]
    losses = plain_loop.sandwich_passes(net, load.forward, images.double(), labels, subnets)
    return [*losses, *(p.grad for p in model.parameters()), *(b for b in model.buffers() if b.is_floating_point())]


def test_masks_compute_what_slices_compute(prepared):
    load, *_ = prepared
    slices, masks = (gradients_and_statistics(load, kind) for kind in (plain_loop.Net, rivals.Masks))
    for a, b in zip(slices, masks, strict=True):
        torch.testing.assert_close(a, b)


def test_all_sides_agree_on_the_losses(prepared):
    load, algo, randoms = prepared
    sides = step.contenders(load, algo, randoms)
    rows, numbers, problems = contest.compare(sides, CPU, 1, {})
    assert [row[0] for row in rows] == ["ours", "plain", "slices", "masks"]
    assert problems == []
    assert set(numbers["slices"]) >= {"ms", "host ms", "device ms", "launches", "syncs", "peak MiB", "first ms"}


def test_rival_that_fails_is_reported(prepared):
    load, algo, randoms = prepared

    def broken():
        raise RuntimeError("no such\nkernel")

    def wrong():
        return lambda: [torch.tensor(9.0)]

    def slow():
        while True:
            pass

    sides = {"ours": step.contenders(load, algo, randoms)["ours"], "broken": broken, "wrong": wrong, "slow": slow}
    rows, _, problems = contest.compare(sides, CPU, 1, {"slow": 0.2})
    assert problems[0] == "broken failed: RuntimeError: no such kernel"
    assert problems[1] == "slow failed: OutOfTimeError: not ready after 0 s"
    assert problems[2].startswith("wrong computes other losses")


def test_cell_without_our_own_step_fails():
    def broken():
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="ours failed: RuntimeError: no kernel"):
        contest.compare({"ours": broken}, CPU, 1, {})


def test_layers_that_slice_themselves_compute_what_slices_compute(prepared, monkeypatch):
    load, *_ = prepared
    monkeypatch.setattr(torch, "compile", lambda net: net)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False):  # what the rival sets is taken back
        compiled = rivals.Compiled(load.model).step(load)()
    for a, b in zip(compiled, rivals.slices(load)(), strict=True):
        torch.testing.assert_close(a, b)
