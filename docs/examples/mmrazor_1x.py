"""MMRazor 1.x's "customize mixed algorithms", completed to a program: an algorithm of one's own from fastslim's parts.

Run it with `python docs/examples/mmrazor_1x.py`; it needs fastslim[mmengine] and scikit-learn. What changes for those
who come from MMRazor is the imports and the scope in ``type``.
"""

from __future__ import annotations

import mmengine
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import nn

from fastslim.algorithms import add_prefix
from fastslim.data.digits import digits
from fastslim.distillers import ConfigurableDistiller
from fastslim.integrations.mmengine import BaseAlgorithm  # the import puts fastslim's classes into its registries
from fastslim.mutators import OneShotChannelMutator
from fastslim.registry import MODELS

VALID_MUTATOR_TYPE = OneShotChannelMutator | dict
VALID_DISTILLER_TYPE = ConfigurableDistiller | dict


@MODELS.register_module()
class MyAutoSlim(BaseAlgorithm):
    """The tutorial's AutoSlim: hard labels for the max subnet, the max subnet's output for the others."""

    def __init__(
        self,
        mutator: VALID_MUTATOR_TYPE,
        distiller: VALID_DISTILLER_TYPE,
        architecture: BaseModel | dict,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: dict | None = None,
        num_samples: int = 2,
    ) -> None:
        super().__init__(architecture, data_preprocessor, init_cfg)
        self.mutator = self._build_mutator(mutator)
        # `prepare_from_supernet` must be called before distiller initialized
        self.mutator.prepare_from_supernet(self.architecture)

        self.distiller = self._build_distiller(distiller)
        self.distiller.prepare_from_teacher(self.architecture)
        self.distiller.prepare_from_student(self.architecture)
        self.num_samples = num_samples

    def _build_mutator(self, mutator: VALID_MUTATOR_TYPE) -> OneShotChannelMutator:
        if isinstance(mutator, dict):
            mutator = MODELS.build(mutator)
        if not isinstance(mutator, OneShotChannelMutator):
            raise TypeError(f"mutator should be a `dict` or `OneShotChannelMutator` instance, but got {type(mutator)}")
        return mutator

    def _build_distiller(self, distiller: VALID_DISTILLER_TYPE) -> ConfigurableDistiller:
        if isinstance(distiller, dict):
            distiller = MODELS.build(distiller)
        if not isinstance(distiller, ConfigurableDistiller):
            raise TypeError(
                f"distiller should be a `dict` or `ConfigurableDistiller` instance, but got {type(distiller)}"
            )
        return distiller

    def set_max_subnet(self) -> None:
        """Full width."""
        self.mutator.set_choices(self.mutator.max_choices)

    def set_min_subnet(self) -> None:
        """Smallest widths."""
        self.mutator.set_choices(self.mutator.min_choices)

    def train_step(self, data: dict, optim_wrapper: OptimWrapper) -> dict[str, torch.Tensor]:
        """The sandwich rule with in-place distillation."""

        def distill_step(batch_inputs: torch.Tensor, data_samples: torch.Tensor) -> dict[str, torch.Tensor]:
            with optim_wrapper.optim_context(self), self.distiller.student_recorders:
                self(batch_inputs, data_samples, mode="tensor")
                subnet_losses = self.distiller.compute_distill_losses()
                parsed, _ = self.parse_losses(subnet_losses)
            optim_wrapper.update_params(parsed)
            return subnet_losses

        batch_inputs, data_samples = self.data_preprocessor(data, True).values()
        total_losses = {}
        self.set_max_subnet()
        with optim_wrapper.optim_context(self), self.distiller.teacher_recorders:
            max_subnet_losses = self(batch_inputs, data_samples, mode="loss")
            parsed, _ = self.parse_losses(max_subnet_losses)
        optim_wrapper.update_params(parsed)
        total_losses.update(add_prefix(max_subnet_losses, "max_subnet"))

        self.set_min_subnet()
        total_losses.update(add_prefix(distill_step(batch_inputs, data_samples), "min_subnet"))

        for sample_idx in range(self.num_samples):
            self.mutator.set_choices(self.mutator.sample_choices())
            random_subnet_losses = distill_step(batch_inputs, data_samples)
            total_losses.update(add_prefix(random_subnet_losses, f"random_subnet_{sample_idx}"))
        return total_losses


@mmengine.MODELS.register_module()
class DigitsClassifier(BaseModel):
    """A small network in mmengine's form."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Linear(2 * channels * 4, 10)

    def forward(self, inputs: torch.Tensor, data_samples: torch.Tensor | None = None, mode: str = "tensor"):
        """Logits, losses or predictions."""
        logits = self.fc(F.adaptive_avg_pool2d(self.backbone(inputs), 2).flatten(1))
        if mode == "loss":
            return {"loss": F.cross_entropy(logits, data_samples)}
        return logits if mode == "tensor" else list(logits.argmax(1))


def config(kind: str = "MyAutoSlim") -> dict:
    """The tutorial's step 4."""
    recorder = dict(fc=dict(type="ModuleOutputs", source="fc"))
    return dict(
        type=f"fastslim.{kind}",
        architecture=dict(type="DigitsClassifier"),
        mutator=dict(
            type="OneShotChannelMutator",
            channel_unit_cfg=dict(
                type="OneShotMutableChannelUnit",
                default_args=dict(candidate_choices=[i / 12 for i in range(2, 13)], choice_mode="ratio", divisor=4),
            ),
            parse_cfg=dict(type="ChannelAnalyzer", demo_input=(1, 1, 8, 8), tracer_type="BackwardTracer"),
        ),
        distiller=dict(
            type="ConfigurableDistiller",
            teacher_recorders=recorder,
            student_recorders=recorder,
            distill_losses=dict(loss_kl=dict(type="KLDivergence", tau=1.0, loss_weight=1.0)),
            loss_forward_mappings=dict(
                loss_kl=dict(
                    preds_S=dict(recorder="fc", from_student=True), preds_T=dict(recorder="fc", from_student=False)
                )
            ),
        ),
    )


def train(kind: str = "MyAutoSlim", epochs: int = 5) -> tuple[BaseAlgorithm, dict[str, float]]:
    """The trained algorithm and the losses of its last step."""
    torch.manual_seed(0)
    algo = mmengine.MODELS.build(config(kind))
    algo.mutator.rng.seed(0)
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.2, momentum=0.9)
    wrapper = OptimWrapper(optimizer, accumulative_counts=4)  # one optimizer step for the four passes
    images, labels = digits()[0].tensors
    losses = {}
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(64)[:-1]:
            inputs = images[part].to(torch.get_default_dtype())
            losses = algo.train_step({"inputs": inputs, "data_samples": labels[part]}, wrapper)
    return algo, {name: float(value.detach()) for name, value in losses.items()}


if __name__ == "__main__":
    for kind in ("MyAutoSlim", "AutoSlim"):  # the tutorial's class, and fastslim's own
        print(kind, {name: round(value, 4) for name, value in train(kind)[1].items()})
