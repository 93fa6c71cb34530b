"""AutoSlim as a LightningModule: ``Trainer.fit`` trains, evaluates chosen widths, saves and resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.algorithms.calibrate import calibrate_batch_norm
from fastslim.algorithms.joint_training import JointTraining

try:
    from lightning.pytorch import LightningModule
except ImportError:
    try:
        from pytorch_lightning import LightningModule  # type: ignore[assignment]  # its older name
    except ImportError as error:
        raise errors.FastslimRuntimeError(
            "fastslim.integrations.lightning needs Lightning: pip install 'fastslim[lightning]'"
        ) from error

_MUTATOR = "fastslim_mutator"


class SlimmableModule(LightningModule):
    """Trains an algorithm of fastslim under a Lightning ``Trainer``.

    A step of the trainer is a step of the algorithm: all passes on one batch, then the optimizer. Training losses
    are logged as ``train/max_subnet.loss`` and so on; every validation calibrates batch normalisation for each of
    `val_widths` and logs ``val/accuracy_0.50x`` and ``val/loss_0.50x``.

    Optimization is manual in Lightning's sense, so the trainer refuses ``gradient_clip_val`` and
    ``accumulate_grad_batches``: give them here. Precision "32-true", "64-true" and "bf16-mixed" work; "16-mixed"
    needs a loss scaler inside the step and is refused. With several devices (strategy "ddp") gradients are
    averaged by the algorithm itself, see :meth:`JointTraining.distribute`.

    Args:
        algo: an :class:`~fastslim.AutoSlim` or :class:`~fastslim.algorithms.SlimmableNetwork`.
        optimizer: ``optimizer(parameters)`` -> a torch optimizer; SGD with momentum by default.
        scheduler: ``scheduler(optimizer)`` -> a learning rate schedule, stepped with `scheduler_interval`.
        scheduler_interval: "epoch", or "step" (of the optimizer).
        val_widths: ratios of the full width that validation evaluates, each applied to every unit.
        calibration_batches: training batches that batch normalisation is calibrated with.
        gradient_clip_val: largest norm of the gradient; None for no clipping.
        accumulate_grad_batches: batches for an optimizer step; their mean gradient counts.

    Raises:
        FastslimTypeError: `algo` is no algorithm of fastslim.
        FastslimValueError: widths, batches or interval that cannot be.
    """

    def __init__(
        self,
        algo: JointTraining,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        *,
        scheduler_interval: str = "epoch",
        val_widths: Sequence[float] = (0.25, 0.5, 1.0),
        calibration_batches: int = 16,
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(algo, JointTraining):
            raise errors.FastslimTypeError(f"algo should be an AutoSlim or SlimmableNetwork, but got {type(algo)}")
        if not all(0 < width <= 1 for width in val_widths):
            raise errors.FastslimValueError(f"val_widths={val_widths!r}: ratios above 0 and up to 1 are needed")
        if scheduler_interval not in ("epoch", "step"):
            hint = errors.nearest(scheduler_interval, ("epoch", "step"))
            raise errors.FastslimValueError(f"scheduler_interval={scheduler_interval!r}: {hint}")
        if accumulate_grad_batches < 1 or calibration_batches < 1:
            raise errors.FastslimValueError("accumulate_grad_batches and calibration_batches must be at least 1")
        self.automatic_optimization = False
        self.algo = algo
        self._make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
        self._make_scheduler, self._interval = scheduler, scheduler_interval
        self.val_widths, self.calibration_batches = tuple(val_widths), calibration_batches
        self.gradient_clip_val, self.accumulate_grad_batches = gradient_clip_val, accumulate_grad_batches
        self._sums: dict[str, Tensor] = {}

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The network's output at the current width."""
        return self.algo(*inputs, **keywords)

    def configure_optimizers(self) -> Any:
        """The optimizer and, if there is one, its schedule."""
        optimizer = self._make_optimizer(self.algo.parameters())
        if self._make_scheduler is None:
            return optimizer
        return [optimizer], [self._make_scheduler(optimizer)]

    def on_fit_start(self) -> None:
        """Joins the other processes, and refuses what would train wrongly without a word."""
        if self.trainer.precision == "16-mixed":
            raise errors.FastslimValueError(
                "precision='16-mixed' scales the loss outside of the step; use 'bf16-mixed', or scale by hand with "
                "algo.accumulate(batch, scale=...)"
            )
        if self.trainer.world_size > 1:
            self.algo.distribute()

    def training_step(self, batch: Any, batch_index: int) -> None:
        """All passes on one batch; the optimizer's step when enough batches are accumulated."""
        optimizer: Any = self.optimizers()
        position = batch_index % self.accumulate_grad_batches
        last = batch_index + 1 == self.trainer.num_training_batches
        if position == 0:
            optimizer.zero_grad()
        losses = self.algo.accumulate(batch, scale=1.0 / self.accumulate_grad_batches)
        if position + 1 == self.accumulate_grad_batches or last:
            if self.gradient_clip_val is not None:
                self.clip_gradients(optimizer, self.gradient_clip_val, "norm")
            optimizer.step()
            if self._make_scheduler is not None and self._interval == "step":
                self.lr_schedulers().step()
        self.log_dict({f"train/{name}": value for name, value in losses.items()})

    def on_train_epoch_end(self) -> None:
        """The schedule's step."""
        if self._make_scheduler is not None and self._interval == "epoch":
            self.lr_schedulers().step()

    def on_validation_epoch_start(self) -> None:
        """Calibrates batch normalisation for every width, on training data."""
        self._subnets = [self.algo.uniform_subnet(width) for width in self.val_widths]
        self._sums = {}
        loader = self.trainer.train_dataloader
        if loader is None:  # Trainer.validate: nothing was trained
            self.trainer.fit_loop.setup_data()
            loader = self.trainer.train_dataloader
        if loader is not None:
            calibrate_batch_norm(self.algo, loader, self._subnets, self.calibration_batches)

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Adds up hits and losses of every width."""
        for width, subnet in zip(self.val_widths, self._subnets, strict=True):
            self.algo.set_subnet(subnet)
            inputs, targets = self.algo.unpack(batch, training=False)
            logits = self.algo.call(self.algo, inputs).float()
            found = {"accuracy": (logits.argmax(1) == targets).sum(), "count": targets.new_tensor(len(targets))}
            found["loss"] = nn.functional.cross_entropy(logits, targets, reduction="sum")
            for name, value in found.items():
                key = f"{name}_{width:.2f}x"
                self._sums[key] = self._sums.get(key, torch.zeros_like(value)) + value

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all processes, and goes back to full width."""
        sums = {key: self.all_gather(value).sum() for key, value in self._sums.items()}
        for width in self.val_widths:
            for name in ("accuracy", "loss"):
                key = f"{name}_{width:.2f}x"
                self.log(f"val/{key}", sums[key] / sums[f"count_{width:.2f}x"], rank_zero_only=True)
        self.algo.set_max_subnet()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the random state of the widths, so that a resumed run draws the same."""
        checkpoint[_MUTATOR] = self.algo.mutator.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back."""
        if _MUTATOR in checkpoint:
            self.algo.mutator.load_state_dict(checkpoint[_MUTATOR])
