"""`Trainer`: the training loop of a supernet, whose step is a sandwich of subnets."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastslim.algorithms import AutoSlim
from fastslim.data import ImageData, start_epoch
from fastslim.engine.config import TrainConfig
from fastslim.engine.evaluate import WidthResult, evaluate_widths, spaced_widths
from fastslim.engine.run_folder import RunFolder
from fastslim.engine.training_loop import TrainingLoop


class Trainer(TrainingLoop[WidthResult]):
    """Trains a supernet as a configuration says.

    Args:
        config: all options.
        data: what to train and evaluate on.
        algo: the supernet, on its device.
        folder: where checkpoints and metrics go.
    """

    def __init__(self, config: TrainConfig, data: ImageData, algo: AutoSlim, folder: RunFolder) -> None:
        super().__init__(config, data, algo.architecture, folder)
        self.algo = algo
        self.widths = spaced_widths(config.choices, config.eval_widths)

    def set_training(self) -> None:
        """Puts the algorithm into training mode."""
        self.algo.train()

    def losses_of(self, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """One optimizer step of the sandwich rule on one or several batches; detached losses of every subnet."""
        algo, optimizer = self.algo, self.optimizer
        if len(batches) == 1 and not self.config.clip_grad_norm:
            with self.autocast():
                return algo.train_step(batches[0], optimizer)
        optimizer.zero_grad()
        with self.autocast():
            parts = [algo.accumulate(batch, scale=1 / len(batches)) for batch in batches]
        if self.config.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(algo.parameters(), self.config.clip_grad_norm)
        optimizer.step()
        return {key: torch.stack([part[key] for part in parts]).mean() for key in parts[0]}

    def evaluate(self) -> list[WidthResult]:
        """Accuracy of all evaluated widths; of the averaged weights, where there are any."""
        start_epoch(self.calibration_loader, 0)
        with self.average.swapped_in() if self.average else contextlib.nullcontext():
            results = evaluate_widths(
                self.algo,
                self.val_loader,
                self.widths,
                calibration=self.calibration_loader,
                calibration_batches=self.config.calibration_batches or None,
            )
        if self.average:  # the calibrated statistics belong to the averaged weights
            self.algo.drop_calibration()
        return results

    def extra_state(self) -> dict[str, Any]:
        """The state of the sampler of random subnets."""
        return {"sampling": self.algo.mutator.state_dict()}

    def load_extra(self, state: dict[str, Any]) -> None:
        """Takes back `extra_state`."""
        self.algo.mutator.load_state_dict(state["sampling"])
