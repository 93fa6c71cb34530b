"""What a training run shows: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Mapping
from typing import Any


def shorten(losses: Mapping[str, float]) -> str:
    """Losses per subnet in few characters: ``max 0.52  min 0.31  random 0.12``; random subnets are averaged."""
    groups: dict[str, list[float]] = {}
    for key, value in losses.items():
        subnet = key.split(".")[0].split("_subnet")[0]
        groups.setdefault(subnet, []).append(value)
    return "  ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in groups.items())


class PlainProgress:
    """One line an epoch, and one every ``log_every`` steps of a long epoch.

    Args:
        epochs: of the run.
        steps_per_epoch: optimizer steps.
        log_every: steps between lines.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, log_every: int) -> None:
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.log_every = log_every

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()

    def wants_losses(self, step: int) -> bool:
        """Whether the losses of a step would be shown; reading them makes a GPU wait."""
        return step % self.log_every == 0 and step < self.steps_per_epoch

    def step(self, epoch: int, step: int, losses: Mapping[str, float], images_per_second: float) -> None:
        """Shows a step (from 1) of an epoch (from 0)."""
        at = f"epoch {epoch + 1}/{self.epochs}  step {step}/{self.steps_per_epoch}"
        self.say(f"{at}  {shorten(losses)}  {images_per_second:.0f} images/s")

    def epoch(self, epoch: int, losses: Mapping[str, float], images_per_second: float, accuracies: str) -> None:
        """Shows the end of an epoch."""
        line = f"epoch {epoch + 1:>3}/{self.epochs}  {shorten(losses)}  {images_per_second:.0f} images/s"
        self.say(f"{line}  {accuracies}" if accuracies else line)

    def say(self, text: str) -> None:
        """Prints a line."""
        print(text, flush=True)


class RichProgress(PlainProgress):
    """A bar with losses, images/s and the time left; a line where an epoch was evaluated."""

    REFRESH_SECONDS = 0.2

    def __init__(self, epochs: int, steps_per_epoch: int, log_every: int, done_steps: int) -> None:
        super().__init__(epochs, steps_per_epoch, log_every)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("[bold]epoch {task.fields[epoch]}[/]"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeRemainingColumn(),
        )
        total = epochs * steps_per_epoch
        self.task = self.bar.add_task("", total=total, completed=done_steps, epoch="", losses="")
        self.shown = 0.0

    def __enter__(self) -> RichProgress:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def wants_losses(self, step: int) -> bool:
        """Often enough to look alive."""
        return time.monotonic() - self.shown > self.REFRESH_SECONDS

    def step(self, epoch: int, step: int, losses: Mapping[str, float], images_per_second: float) -> None:
        """Moves the bar."""
        self.shown = time.monotonic()
        self.bar.update(
            self.task,
            completed=epoch * self.steps_per_epoch + step,
            epoch=f"{epoch + 1}/{self.epochs}",
            losses=f"{shorten(losses)}  {images_per_second:.0f} images/s",
        )

    def epoch(self, epoch: int, losses: Mapping[str, float], images_per_second: float, accuracies: str) -> None:
        """Keeps a line of the epochs that were evaluated."""
        self.step(epoch, self.steps_per_epoch, losses, images_per_second)
        if accuracies:
            super().epoch(epoch, losses, images_per_second, accuracies)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def make_progress(epochs: int, steps_per_epoch: int, log_every: int, done_steps: int) -> PlainProgress:
    """A bar, if rich is installed and the output is a terminal; else plain lines."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        return RichProgress(epochs, steps_per_epoch, log_every, done_steps)
    return PlainProgress(epochs, steps_per_epoch, log_every)
