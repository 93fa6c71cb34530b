"""What the tests of batch_norm_act share: arguments, a run of forward and backward, the comparison with torch."""

from __future__ import annotations

import torch
from cases import LAYOUTS, assert_as_exact_as_torch, poison

from fastslim.ops.batch_norm_act import batch_norm_act, batch_norm_act_reference

# One channel, fewer than a vector, odd, a vector and a half; 1x1, smaller than a vector, 7x7, one
# more than a chunk of rows (channels_last, 8 channels) and than a group of values (NCHW).
SHAPES = [(3, 1, 5, 3), (9, 8, 1, 1), (33, 17, 2, 2), (5, 24, 7, 7), (2, 40, 3, 5), (2, 8, 46, 90)]


def tensors(shape, dtype, layout="nchw", full=None, residual=False, seed=0):
    """Keyword arguments of batch_norm_act, and dy; parameters are NaN beyond x's channels."""
    random = torch.Generator().manual_seed(seed)
    active, full = shape[1], full or shape[1] + 3
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation():
        value = torch.randn(shape, generator=random).to(dtype)
        return value.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else value

    def vector(shift):
        return poison((torch.rand(full, generator=random) + shift).to(wide), slice(0, active))

    arguments = {
        "x": activation() * 2 + 1,
        "residual": activation() if residual else None,
        "weight": vector(0.5),
        "bias": vector(-0.5),
        "running_mean": vector(0.5),
        "running_var": vector(0.5),
    }
    return arguments, activation()


def run(function, arguments, dy, **options):
    """All results of forward and backward by name; the arguments stay as they are."""
    options = {"training": True, "momentum": 0.3, "eps": 1e-4} | options
    copies = {k: None if t is None else t.detach().clone() for k, t in arguments.items()}
    for name in ("x", "residual", "weight", "bias"):
        if copies[name] is not None:
            copies[name].requires_grad_()
    y = function(**copies, **options)
    y.backward(dy)
    gradients = {f"d{k}": t.grad for k, t in copies.items() if t is not None and t.requires_grad}
    return {"y": y.detach(), **gradients, **{k: copies[k] for k in ("running_mean", "running_var")}}


def doubled(arguments):
    return {k: None if t is None else t.double() for k, t in arguments.items()}


def check(arguments, dy, channels, function=batch_norm_act, **options):
    ours = run(function, arguments, dy, **options)
    torchs = run(batch_norm_act_reference, arguments, dy, **options)
    truth = run(batch_norm_act_reference, doubled(arguments), dy.double(), **options)
    values = dy.numel() // channels
    for name, value in ours.items():
        if value is None:
            continue
        active = slice(None) if value.shape == ours["y"].shape else slice(0, channels)
        value, exact = value[active], truth[name][active]
        try:
            if dy.dtype == torch.float64:  # torch is the truth itself
                assert (value - exact).abs().max() <= 1e-13 * values * exact.abs().max()
            else:
                assert_as_exact_as_torch(value, torchs[name][active], exact)
        except AssertionError as error:
            raise AssertionError(f"{name} with {tuple(dy.shape)} {options}: {error}") from error
