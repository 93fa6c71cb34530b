"""Metrics as TensorBoard scalars, where TensorBoard is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class MetricsBoard:
    """Writes the records of metrics.jsonl as scalars; without TensorBoard it does nothing.

    Args:
        path: folder of the event files.
        step: scalars after this step, of a run that was resumed, are hidden.
    """

    def __init__(self, path: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(path), purge_step=step + 1)

    def __enter__(self) -> MetricsBoard:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer:
            self.writer.close()

    def write(self, records: list[dict[str, Any]]) -> None:
        """Adds the scalars of an epoch."""
        if self.writer is None:
            return
        for record in records:
            for name, value in scalars(record).items():
                self.writer.add_scalar(name, value, record["step"])


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record under the names TensorBoard groups by."""
    if record["kind"] == "evaluation":
        rows = {f"{row['width']:.2f}x": row for row in record.get("widths", ())}
        rows |= {row["name"]: row for row in record.get("subnets", ())}
        return {f"accuracy/{title}": row["accuracy"] for title, row in rows.items()}
    losses = {f"loss/{name}": value for name, value in record["losses"].items()}
    return {**losses, "lr": record["lr"], "images_per_second": record["images_per_second"]}
