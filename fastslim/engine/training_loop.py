"""The training loop, whatever a step is: learning rate, evaluation, checkpoints, and an exact resume."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastslim.data import ImageData, make_loader, start_epoch
from fastslim.engine.checkpoint import load_model, rng_state, save_checkpoint, set_rng_state
from fastslim.engine.config import TrainConfig
from fastslim.engine.ema import WeightAverage
from fastslim.engine.evaluate import Evaluation
from fastslim.engine.progress import make_progress
from fastslim.engine.run_folder import RunFolder
from fastslim.engine.schedule import make_optimizer, make_scheduler
from fastslim.engine.signals import StopRequest
from fastslim.engine.tensorboard import MetricsBoard

Row = TypeVar("Row", bound=Evaluation)


class TrainingLoop(Generic[Row]):
    """Trains a network as a configuration says; what a step and an evaluation are is said by subclasses.

    Args:
        config: all options.
        data: what to train and evaluate on.
        network: whose parameters are trained, on its device.
        folder: where checkpoints and metrics go.
    """

    #: What metrics.jsonl calls the rows of an evaluation.
    rows_are = "widths"

    def __init__(self, config: TrainConfig, data: ImageData, network: nn.Module, folder: RunFolder) -> None:
        self.config = config
        self.network = network
        self.folder = folder
        self.device = next(network.parameters()).device
        pin = self.device.type == "cuda"
        options: dict[str, Any] = {"workers": config.workers, "pin_memory": pin}
        self.train_loader = make_loader(data.train, config.batch_size, shuffle=True, seed=config.seed, **options)
        self.calibration_loader = make_loader(data.calibration, config.batch_size, shuffle=True, **options)
        self.val_loader = make_loader(data.val, max(config.batch_size, 256), shuffle=False, **options)
        self.batches_per_epoch = len(self.train_loader)
        self.steps_per_epoch = -(-self.batches_per_epoch // config.accumulate)
        self.optimizer = make_optimizer(network, config)
        self.scheduler = make_scheduler(self.optimizer, config, self.steps_per_epoch)
        self.average = WeightAverage(network, config.ema_decay) if config.ema_decay else None
        self.epoch = 0
        self.batch = 0
        self.step = 0
        self.best = -1.0
        self.seconds = 0.0
        self.epoch_seconds = 0.0
        self.totals: dict[str, Tensor] = {}
        self.results: list[Row] = []

    def losses_of(self, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Gradients of one or several batches (their mean), and the optimizer's step; detached losses."""
        raise NotImplementedError

    def evaluate(self) -> list[Row]:
        """Accuracy on the held-out data; of the averaged weights, where there are any."""
        raise NotImplementedError

    def set_training(self) -> None:
        """Puts what is trained into training mode."""
        self.network.train()

    def extra_state(self) -> dict[str, Any]:
        """What else a subclass needs to go on exactly."""
        return {}

    def load_extra(self, state: dict[str, Any]) -> None:
        """Takes back `extra_state`."""

    def fit(self) -> bool:
        """Trains to the last epoch.

        Returns:
            False if SIGINT or SIGTERM stopped it earlier; the state is then in ``last.pt``.
        """
        config = self.config
        board = MetricsBoard(self.folder.tensorboard, self.step) if config.tensorboard else None
        progress = make_progress(config.epochs, self.steps_per_epoch, config.log_every, self.step)
        with StopRequest() as stop, progress, board or contextlib.nullcontext():
            self.set_training()
            while self.epoch < config.epochs:
                for losses in self.train_epoch():
                    in_epoch = self.step - self.epoch * self.steps_per_epoch
                    if progress.wants_losses(in_epoch):
                        values = {key: value.item() for key, value in losses.items()}
                        progress.step(self.epoch, in_epoch, values, self.images_per_second())
                    if stop.requested:
                        self.save_last()
                        return False
                means = {key: value.item() / self.steps_per_epoch for key, value in self.totals.items()}
                records = self.finish_epoch(means)
                if board:
                    board.write(records)
                accuracies = "  ".join(f"{r.title} {100 * r.accuracy:.1f}%" for r in self.results)
                progress.epoch(self.epoch - 1, means, records[0]["images_per_second"], accuracies)
                self.save_last()
                if stop.requested and self.epoch < config.epochs:
                    return False
        return True

    def train_epoch(self) -> Iterator[dict[str, Tensor]]:
        """Trains what is left of the epoch; yields the losses of each step."""
        start_epoch(self.train_loader, self.epoch, skip_batches=self.batch)
        batches = iter(self.train_loader)
        while group := list(itertools.islice(batches, self.config.accumulate)):
            started = time.perf_counter()
            losses = self.train_step(group)
            for key, value in losses.items():
                self.totals[key] = self.totals[key] + value.double() if key in self.totals else value.double()
            self.batch += len(group)
            self.step += 1
            self.epoch_seconds += time.perf_counter() - started
            yield losses

    def train_step(self, group: list[Any]) -> dict[str, Tensor]:
        """One optimizer step on one or several batches; detached losses."""
        losses = self.losses_of([(images.to(self.device), labels.to(self.device)) for images, labels in group])
        self.scheduler.step()
        if self.average:
            self.average.update()
        return losses

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The compute type of a step."""
        if self.config.autocast == "none":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def images_per_second(self) -> float:
        """Images trained per second in this epoch; a sandwich step counts its images once."""
        return self.batch * self.config.batch_size / max(self.epoch_seconds, 1e-9)

    def finish_epoch(self, losses: dict[str, float]) -> list[dict[str, Any]]:
        """Evaluates where due, records metrics and moves on to the next epoch."""
        record = {
            "kind": "epoch",
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "losses": losses,
            "images_per_second": self.images_per_second(),
        }
        records: list[dict[str, Any]] = [record]
        self.results = []
        if (self.epoch + 1) % self.config.eval_every == 0 or self.epoch + 1 == self.config.epochs:
            self.results = self.evaluate()
            rows = [result.as_dict() for result in self.results]
            records.append({"kind": "evaluation", "epoch": self.epoch + 1, "step": self.step, self.rows_are: rows})
        self.seconds += self.epoch_seconds
        self.epoch, self.batch, self.epoch_seconds, self.totals = self.epoch + 1, 0, 0.0, {}
        for entry in records:
            self.folder.append_metrics(entry)
        mean_accuracy = sum(r.accuracy for r in self.results) / len(self.results) if self.results else -1.0
        if mean_accuracy > self.best:
            self.best = mean_accuracy
            save_checkpoint(self.folder.best, self.weights())
        return records

    def weights(self) -> dict[str, Any]:
        """What a later evaluation needs."""
        return {
            "model": self.network.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "epoch": self.epoch,
            "step": self.step,
            "config": self.config.as_dict(),
        }

    def save_last(self) -> None:
        """Writes everything that the rest of the run depends on."""
        state = {
            **self.weights(),
            "batch": self.batch,
            "best": self.best,
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
            "totals": self.totals,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": rng_state(),
            **self.extra_state(),
        }
        save_checkpoint(self.folder.last, state)

    def load(self, state: dict[str, Any]) -> None:
        """Continues from what `save_last` wrote, in the middle of an epoch if need be."""
        load_model(self.network, state["model"], self.folder.last)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.average:
            self.average.load_state_dict(state["average"])
        for name in ("epoch", "batch", "step", "best", "seconds", "epoch_seconds"):
            setattr(self, name, state[name])
        self.totals = {key: value.to(self.device) for key, value in state["totals"].items()}
        self.load_extra(state)
        set_rng_state(state["random"])
        self.folder.truncate_metrics(self.step)
