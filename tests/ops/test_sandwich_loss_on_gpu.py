"""sandwich_loss and kl_div_loss on a GPU, by every backend that is usable there."""

from __future__ import annotations

import pytest
import torch
from sandwich_loss_cases import (
    OPTIONS,
    assert_all_as_exact_as_torch,
    batch,
    losses_and_grads,
    torch_losses,
    with_weight,
)

from fastslim.ops import backend, kl_div_loss, sandwich_loss

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, classes): a warp, a block, a stream of tiles a row; ImageNet; pixels; odd counts; the largest; none.
SHAPES = [(64, 10), (64, 1000), (3000, 1000), (7, 1001), (5, 4104), (3, 9001), (70_000, 21), (4, 200_000), (0, 10)]


@pytest.fixture(params=["cuda", "triton"])
def kernel(request):
    """The backend that computes; what torch.empty returns is NaN until it is written."""
    reason = backend.unusable(request.param, backend.target_of(torch.empty(0, device="cuda")))
    if reason:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True)
    with backend.use_backend(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)


def on_gpu(*shape, **options):
    logits, target = batch(*shape, **options)
    return [x.cuda() for x in logits], target.cuda()


def check(logits, target, **options):
    """The op's losses and gradients, at most twice as wrong as torch's own."""
    options = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    ours = losses_and_grads(sandwich_loss, logits, target, **options)
    torch.use_deterministic_algorithms(False)  # torch's own losses of images are not
    theirs = losses_and_grads(torch_losses, logits, target, **options)
    exact = losses_and_grads(torch_losses, [x.double() for x in logits], target, **options)
    assert_all_as_exact_as_torch(ours, theirs, exact)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["smoothing-weight-tau"]], ids=["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_are_as_exact_as_torchs(kernel, dtype, shape, options):
    logits, target = on_gpu(*shape, dtype=dtype)
    assert backend.choose("sandwich_loss", backend.target_of(logits[0]), dtype, False, *shape).backend == kernel
    check(logits, target, **with_weight(options, shape[1]))


def test_classes_of_an_image_lie_in_dimension_one(kernel):
    check(*on_gpu(2, 21, 33, 17))


def test_a_student_alone_is_torchs(kernel):
    (teacher, student), _ = on_gpu(64, 1000, students=1)
    results = []
    for name in (kernel, "reference"):
        leaf = student.clone().requires_grad_()
        with backend.use_backend(name):
            loss = kl_div_loss(leaf, teacher, tau=2.5)
        (loss * 0.7).backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)


def test_no_call_waits_for_the_gpu(kernel):
    logits, target = on_gpu(64, 1000)
    target[3] = 1000  # no class: its row becomes NaN
    leaves = [x.requires_grad_() for x in logits]
    weights = torch.tensor([0.5, 1.0, -3.0], device="cuda")
    sandwich_loss(leaves[0], leaves[1:], target).sum().backward()  # compiles Triton's kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = sandwich_loss(leaves[0], leaves[1:], target, label_smoothing=0.1)
        (losses * weights).sum().backward(retain_graph=True)
        losses.sum().backward()
        kl_div_loss(leaves[1], leaves[0].detach()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isnan().tolist() == [True, False, False]
    assert leaves[0].grad.isnan().any(dim=1).nonzero().flatten().tolist() == [3]


def test_gradient_is_scaled_by_what_comes_from_above(kernel):
    logits, target = on_gpu(4, 1000)
    weights = torch.tensor([0.5, -3.0, 1.0], device="cuda")
    for mine, truth in zip(
        losses_and_grads(lambda *a, **k: sandwich_loss(*a, **k) * weights, logits, target),
        losses_and_grads(lambda *a, **k: torch_losses(*a, **k) * weights, logits, target),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(256, 1000), (20_000, 21), (3, 200_000)], ids=str)
def test_repeats_are_bitwise_equal(kernel, shape):
    logits, target = on_gpu(*shape, dtype=torch.bfloat16)
    first, second = (losses_and_grads(sandwich_loss, logits, target, label_smoothing=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_captured_call_replays_on_new_logits(kernel):
    logits, target = on_gpu(64, 1000)
    before = losses_and_grads(sandwich_loss, logits, target)  # compiles Triton's kernels
    inputs = [torch.zeros_like(x).requires_grad_() for x in logits]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with torch.cuda.graph(graph, stream=stream):
            losses = sandwich_loss(inputs[0], inputs[1:], target)
            grads = torch.autograd.grad(losses.sum(), inputs)
    torch.cuda.synchronize()
    with torch.no_grad():
        for x, value in zip(inputs, logits, strict=True):
            x.copy_(value)
    graph.replay()
    assert all(torch.equal(mine, truth) for mine, truth in zip([losses.detach(), *grads], before, strict=True))


def test_float64_is_exact_in_cuda(kernel):
    logits, target = on_gpu(4, 1000, dtype=torch.float64)
    check(logits, target, tau=2.0, label_smoothing=0.1)  # Triton leaves it to CUDA, or to the reference
