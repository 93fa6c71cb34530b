"""Optimizers and learning-rate schedules of a configuration."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastslim.engine.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer; weight decay of matrices and of BN and biases are two groups."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": config.norm_weight_decay},
    ]
    fused = can_fuse(model) or None  # None is torch's own choice, which is a loop on a CPU
    if config.optimizer != "sgd":
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=config.lr, fused=fused)
    nesterov = config.nesterov and config.momentum > 0
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)
    if fused and config.momentum:
        # torch's fused SGD makes these in the first step, of the gradients there are, and fails if a later step brings
        # another one. A momentum of zero is the same first step: 0 times momentum, plus the gradient.
        for p in trained:
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def can_fuse(model: nn.Module) -> bool:
    """Whether one pass of torch's fused optimizers over the memory of each parameter gives the right step.

    They walk a parameter, its gradient and its state from first to last byte, so that all must be dense and laid out
    alike, as those of a dense parameter are; and they take neither sparse gradients nor complex numbers.
    """
    return all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda") and p.stride() == torch.empty_like(p).stride()
        for p in model.parameters()
    ) and not any(getattr(module, "sparse", False) for module in model.modules())


def lr_factor(step: int, config: TrainConfig, steps_per_epoch: int) -> float:
    """Factor on the learning rate in a step, counted from 0.

    A linear warm-up from zero, then to zero by a cosine (Loshchilov and Hutter, 2017) or in a line, drops at
    milestones, or a constant.
    """
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total)
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_schedule == "step":
        return config.lr_gamma ** sum(step >= milestone * total for milestone in config.lr_milestones)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0 - done if config.lr_schedule == "linear" else 1.0


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> LambdaLR:
    """`lr_factor` as a scheduler that is stepped after every optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, steps_per_epoch))
