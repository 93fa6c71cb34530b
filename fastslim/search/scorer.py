"""The score of a subnet: a metric over held batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastslim.algorithms import SlimmableAlgorithm
from fastslim.algorithms.norm_statistics import NormStatistics
from fastslim.errors import FastslimValueError
from fastslim.search.held_batches import HeldBatches
from fastslim.search.metric import Metric, accuracy, batch_total

#: Samples that statistics are calibrated from where no number of batches is given: Universally Slimmable Networks
#: (ICCV 2019, section 3.3) finds no loss of accuracy with a thousand.
CALIBRATION_SAMPLES = 1024


class SubnetScorer:
    """Scores subnets inside a ``with`` block; the algorithm is as it was behind it.

    Args:
        algo: the supernet.
        val_loader: batches that subnets are compared on, read once.
        calibration: batches that the statistics of batch normalisation are computed from for every subnet; None
            normalises every batch by its own statistics.
        calibration_batches: how many of them; None: as many as hold 1024 samples.
        num_batches: of `val_loader`; None: all.
        metric: ``metric(output, targets)`` -> one score per sample or the batch's mean; accuracy by default.
        seed: while the loaders are read.
    """

    def __init__(
        self,
        algo: SlimmableAlgorithm,
        val_loader: Iterable[Any],
        *,
        calibration: Iterable[Any] | None = None,
        calibration_batches: int | None = None,
        num_batches: int | None = None,
        metric: Metric | None = None,
        seed: int = 0,
    ) -> None:
        self.algo = algo
        self.metric: Metric = accuracy if metric is None else metric
        self.statistics = NormStatistics(algo)
        self.validation = HeldBatches(
            algo, val_loader, what="validation", argument="num_batches", num_batches=num_batches, seed=seed
        )
        self.calibration: HeldBatches | None = None
        if calibration is not None and self.statistics.layers:
            self.calibration = HeldBatches(
                algo,
                calibration,
                what="calibration",
                argument="calibration_batches",
                num_batches=calibration_batches,
                num_samples=CALIBRATION_SAMPLES if calibration_batches is None else None,
                seed=seed,
            )
        if self.calibration is None and self.statistics.layers and min(self.validation.sizes) < 2:
            raise FastslimValueError(
                "a validation batch holds a single sample, which has no statistics to normalise by: take another "
                "batch size, DataLoader(..., drop_last=True), or pass calibration=training_loader"
            )

    def __enter__(self) -> SubnetScorer:
        self.before = self.algo.mutator.current_choices
        self.statistics.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.algo.mutator.set_choices(self.before)
        self.statistics.__exit__(*error)

    @torch.no_grad()
    def __call__(self, choices: Mapping[str, int]) -> float:
        """The mean of the metric over all samples; NaN if it is for one of them."""
        self.algo.mutator.set_choices(choices)
        if self.calibration is not None:
            self.statistics.calibrate(self.calibration.batches)
        totals: list[Tensor] = []
        for batch, samples in zip(self.validation.batches, self.validation.sizes, strict=True):
            output = self.algo.call(self.algo.architecture, batch.inputs)
            totals.append(batch_total(self.metric, output, batch.targets, samples))
        # Read at the end: a GPU is waited for once a subnet, not once a batch.
        return sum(torch.stack([total.to(totals[0]) for total in totals]).tolist()) / self.validation.samples
