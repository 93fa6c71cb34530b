"""A small network, plain and as a model of mmengine, the same by hand, and what a test of a Runner needs around it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import plain_loop
import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import Tensor, nn

from fastslim.integrations.mmengine import AutoSlim

MUTATOR = dict(
    type="OneShotChannelMutator",
    channel_unit_cfg=dict(
        type="OneShotMutableChannelUnit",
        default_args=dict(candidate_choices=[0.25, 0.5, 0.75, 1.0], choice_mode="ratio", divisor=2),
    ),
    parse_cfg=dict(type="ChannelAnalyzer", demo_input=(1, 1, 8, 8), tracer_type="BackwardTracer"),
)
DISTILLER = dict(
    type="ConfigurableDistiller",
    teacher_recorders=dict(fc=dict(type="ModuleOutputs", source="fc")),
    student_recorders=dict(fc=dict(type="ModuleOutputs", source="fc")),
    distill_losses=dict(loss_kl=dict(type="KLDivergence", tau=1.0, loss_weight=1.0)),
    loss_forward_mappings=dict(
        loss_kl=dict(preds_S=dict(recorder="fc", from_student=True), preds_T=dict(recorder="fc", from_student=False))
    ),
)


def fill(net: nn.Module, width: int) -> None:
    """Two convolutions, each with a norm, and a classifier."""
    net.conv1, net.norm1 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
    net.conv2, net.norm2 = nn.Conv2d(width, 2 * width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(2 * width)
    net.fc = nn.Linear(8 * width, 10)


def logits(net: nn.Module, x: Tensor) -> Tensor:
    x = net.norm1(net.conv1(x)).relu()
    return net.fc(F.adaptive_avg_pool2d(net.norm2(net.conv2(x)).relu(), 2).flatten(1))


def by_hand(net: plain_loop.Net, x: Tensor) -> Tensor:
    x = F.relu(net.norm("norm1", net.conv("conv1", x, 1, 1)))
    x = F.relu(net.norm("norm2", net.conv("conv2", x, 2, 1)))
    return net.linear("fc", F.adaptive_avg_pool2d(x, 2).flatten(1))


class PlainToy(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        fill(self, width)

    def forward(self, x: Tensor) -> Tensor:
        return logits(self, x)


@MODELS.register_module()
class ModeToy(BaseModel):
    """The same as a model of mmengine: forward(inputs, data_samples, mode)."""

    def __init__(self, width: int = 8, data_preprocessor: Any = None, init_cfg: Any = None) -> None:
        super().__init__(data_preprocessor, init_cfg)
        fill(self, width)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        output = logits(self, inputs)
        if mode == "tensor":
            return output
        labels = torch.as_tensor(data_samples)
        return {"loss": F.cross_entropy(output, labels)} if mode == "loss" else (output, labels)


def make(
    architecture: type[nn.Module] = PlainToy, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[AutoSlim, nn.Module]:
    """The algorithm and an untouched copy of its network, from the same weights."""
    torch.manual_seed(0)
    plain = architecture().to(dtype)
    for norm in (plain.norm1, plain.norm2):  # nothing at its default may hide a mistake
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    mutator = {**copy.deepcopy(MUTATOR), "example_inputs": torch.zeros(1, 1, 8, 8, dtype=dtype), "seed": 1}
    return AutoSlim(architecture=copy.deepcopy(plain), mutator=mutator, **options), plain


def batch(dtype: torch.dtype = torch.float64, seed: int = 0, size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 8, 8, dtype=dtype, generator=generator)
    return {"inputs": images, "data_samples": torch.randint(0, 10, (size,), generator=generator)}


def widths_of_next_step(algo: AutoSlim) -> list[dict[str, int]]:
    """Output channels by convolution, of every pass of the next step."""
    algo = copy.deepcopy(algo)
    widths = []
    for choices in algo.subnets_of_step().values():
        algo.set_subnet(choices)
        widths.append({name: getattr(algo.architecture, name).active_out for name in ("conv1", "conv2", "fc")})
    assert any(w != widths[0] for w in widths[1:])
    return widths


def forget_runs() -> None:
    """Mmengine keeps scopes, loggers and message hubs of every run in global tables."""
    for manager in (DefaultScope, MessageHub, MMLogger, Visualizer):
        manager._instance_dict.clear()


def start(config: Any, work_dir: Path, name: str) -> Runner:
    """A Runner that says little."""
    config = copy.deepcopy(config)
    config.work_dir, config.experiment_name, config.log_level = str(work_dir), name, "ERROR"
    return Runner.from_cfg(config)
