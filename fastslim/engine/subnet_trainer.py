"""`SubnetTrainer`: the training loop of one plain network, with or without a teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastslim.data import ImageData, start_epoch
from fastslim.engine.evaluate import SubnetResult, accuracy_and_loss
from fastslim.engine.run_folder import RunFolder
from fastslim.engine.stage_options import RetrainConfig
from fastslim.engine.training_loop import TrainingLoop
from fastslim.errors import FastslimFileError, FastslimRuntimeError
from fastslim.graph import Cost
from fastslim.ops import kl_div_loss


class SubnetTrainer(TrainingLoop[SubnetResult]):
    """Trains an exported subnet by itself.

    Args:
        config: all options.
        data: what to train and evaluate on.
        network: the plain network, on its device.
        folder: where checkpoints and metrics go.
        name: of the subnet.
        cost: of the subnet.
        teacher: the network whose predictions are learnt, in evaluation mode; None learns the labels.
        made_of: what the training depends on besides its options; a checkpoint of something else is refused.
    """

    rows_are = "subnets"

    def __init__(
        self,
        config: RetrainConfig,
        data: ImageData,
        network: nn.Module,
        folder: RunFolder,
        *,
        name: str,
        cost: Cost,
        teacher: nn.Module | None,
        made_of: dict[str, Any],
    ) -> None:
        super().__init__(config, data, network, folder)
        self.name, self.cost, self.teacher, self.made_of = name, cost, teacher, made_of

    def losses_of(self, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """One optimizer step on one or several batches; detached losses."""
        self.optimizer.zero_grad()
        parts = []
        for images, labels in batches:
            losses = self.losses(images, labels)
            total = torch.stack(list(losses.values())).sum() / len(batches)
            if not total.isfinite():
                raise FastslimRuntimeError(
                    f"the loss of {self.name} is {total.item()} in step {self.step + 1}: lower lr (it is "
                    f"{self.optimizer.param_groups[0]['lr']:.3g}), or go on from the last checkpoint with --resume"
                )
            total.backward()
            parts.append({key: value.detach() for key, value in losses.items()})
        if self.config.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_grad_norm)
        self.optimizer.step()
        return {key: torch.stack([part[key] for part in parts]).mean() for key in parts[0]}

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy with the labels, or what a student learns instead or besides."""
        with self.autocast():
            logits = self.network(images)
            if self.teacher is None:
                return {"loss": self.on_labels(logits, labels)}
            with torch.no_grad():
                soft = self.teacher(images)
            losses = {"loss_kl": kl_div_loss(logits, soft.to(logits.dtype))}
            if self.config.student_loss == "ce+kd":
                losses["loss"] = self.on_labels(logits, labels)
        return losses

    def on_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with the labels."""
        smoothing = self.config.label_smoothing
        return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

    def evaluate(self) -> list[SubnetResult]:
        """Accuracy on the held-out data; of the averaged weights, where there are any."""
        network = self.final_network()
        was_training = self.network.training
        network.eval()
        accuracy, loss = accuracy_and_loss(network, self.val_loader)
        self.network.train(was_training)
        return [SubnetResult(self.name, self.cost.multiply_adds, self.cost.parameters, accuracy, loss)]

    def final_network(self) -> nn.Module:
        """The network, or a copy with the averaged weights and the BN statistics that belong to them."""
        if self.average is None:
            return self.network
        with self.average.swapped_in():
            averaged = copy.deepcopy(self.network)
        start_epoch(self.calibration_loader, 0)
        images = [images for images, _ in self.calibration_batches()]
        update_bn(images, averaged, self.device)
        return averaged

    def calibration_batches(self) -> list[Any]:
        """As many as the configuration says."""
        limit = self.config.calibration_batches or len(self.calibration_loader)
        return [batch for _, batch in zip(range(limit), self.calibration_loader, strict=False)]

    def extra_state(self) -> dict[str, Any]:
        """What the training depends on."""
        return {"made_of": self.made_of}

    def load_extra(self, state: dict[str, Any]) -> None:
        """Refuses a checkpoint of something else."""
        if state.get("made_of") != self.made_of:
            raise FastslimFileError(
                f"{self.folder.last} began with another supernet or subnet, which have changed since: "
                f"choose another {self.folder.named_by}, or begin anew with --overwrite"
            )
