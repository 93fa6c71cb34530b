"""MMRazor 0.x's "customize mixed algorithms", completed to a program: pretraining, then retraining two subnets.

Run it with `python docs/examples/mmrazor_0x.py`; it needs fastslim and scikit-learn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastslim.data.digits import digits
from fastslim.registry import ALGORITHMS


@ALGORITHMS.register_module()
class DigitsNet(nn.Module):
    """A small network."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * channels)
        self.head = nn.ModuleDict({"fc": nn.Linear(2 * channels * 4, 10)})

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(img))))))
        return self.head["fc"](F.adaptive_avg_pool2d(x, 2).flatten(1))


def algorithm(**options) -> dict:
    """The tutorial's step 3."""
    return dict(
        type="AutoSlim",
        architecture=dict(type="DigitsNet"),
        pruner=dict(
            type="RatioPruner",
            ratios=(2 / 12, 3 / 12, 4 / 12, 5 / 12, 6 / 12, 7 / 12, 8 / 12, 9 / 12, 10 / 12, 11 / 12, 1.0),
        ),
        distiller=dict(
            type="SelfDistiller",
            components=[
                dict(
                    student_module="head.fc",
                    teacher_module="head.fc",
                    losses=[dict(type="KLDivergence", name="loss_kd", tau=1, loss_weight=1)],
                )
            ],
        ),
        retraining=False,
        input_shape=(1, 1, 8, 8),
        **options,
    )


def train(algo: nn.Module, epochs: int = 5) -> dict:
    """What the last step returned."""
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.05, momentum=0.9)
    images, labels = digits()[0].tensors
    outputs = {}
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(64)[:-1]:
            outputs = algo.train_step({"img": images[part], "gt_label": labels[part]}, optimizer)
    return outputs


if __name__ == "__main__":
    torch.manual_seed(0)
    supernet = ALGORITHMS.build(algorithm())
    print("pretraining:", train(supernet)["log_vars"])

    supernet.set_min_subnet()
    small = supernet.mutator.export_subnet()
    supernet.set_subnet(supernet.uniform_subnet(0.5))
    half = supernet.mutator.export_subnet()

    one = ALGORITHMS.build({**algorithm(), "distiller": None, "retraining": True, "channel_cfg": half})
    print("one subnet:", train(one)["log_vars"])
    both = ALGORITHMS.build({**algorithm(), "distiller": None, "retraining": True, "channel_cfg": [small, half]})
    print("two subnets:", train(both)["log_vars"])
