"""A small AutoSlim, a batch for it, and what it holds."""

from __future__ import annotations

import plain_loop
import torch

import fastslim


def make(**options) -> fastslim.AutoSlim:
    torch.manual_seed(0)
    net = options.pop("net", None) or plain_loop.ConcatNet()
    return fastslim.AutoSlim(architecture=net, example_inputs=torch.randn(1, 3, 12, 12), divisor=4, seed=0, **options)


def batch(n: int = 8, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 3, 12, 12, dtype=dtype), torch.randint(0, 10, (n,))


def state(algo: fastslim.AutoSlim) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in algo.state_dict().items()}
