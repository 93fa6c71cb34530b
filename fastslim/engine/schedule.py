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
    if config.optimizer == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr)


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
