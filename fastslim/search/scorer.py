"""The score of a subnet: accuracy, or a metric of the user's, over held batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastslim.algorithms import SlimmableAlgorithm
from fastslim.algorithms.norm_statistics import Moments, NormStatistics
from fastslim.algorithms.slimmable import Statistics
from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.search.candidates import Choices
from fastslim.search.held_batches import HeldBatches
from fastslim.search.recorded_forward import NotSharedError, RecordedForward
from fastslim.search.shared_forward import Plan, SharedForward

#: Samples that statistics are calibrated from where no number of batches is given: Universally Slimmable Networks
#: (ICCV 2019, section 3.3) finds no loss of accuracy with a thousand.
CALIBRATION_SAMPLES = 1024
Metric = Callable[[Any, Any], Any]
HOW_TO = (
    "pass metric=: a function metric(output, targets) that returns one score per sample (N,), or the mean of the "
    "batch; higher is better"
)


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

    Attributes:
        shared: computes once what several subnets have in common; None before the block, and where that cannot be.
        reason: why it cannot.
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
        self.shared: SharedForward | None = None
        self.reason = ""
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

    @torch.no_grad()
    def __enter__(self) -> SubnetScorer:
        self.before = self.algo.mutator.current_choices
        self.statistics.__enter__()
        batches = [*self.validation.batches, *(self.calibration.batches if self.calibration else ())]
        try:
            self.shared = SharedForward(RecordedForward(self.algo, [batch.inputs for batch in batches]))
        except NotSharedError as error:
            self.reason = str(error)
        except BaseException as error:
            self.__exit__(error)
            raise
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
        return self._mean(totals)

    def statistics_of(self, subnets: Iterable[Choices]) -> list[Statistics]:
        """What `SlimmableAlgorithm.store_calibration` takes of each subnet; none where scores are not calibrated."""
        kept: list[Statistics] = []
        for choices in subnets if self.calibration is not None else ():
            self.algo.mutator.set_choices(choices)
            self.statistics.calibrate(self.calibration.batches)
            kept.append(self.statistics.results(self.statistics.sink))
        return kept

    @torch.no_grad()
    def score_all(self, subnets: Sequence[Choices]) -> list[float]:
        """The scores of several subnets, the very same ones; what these have in common is computed once.

        That saves most for subnets that differ from each other in one or two units.
        """
        if self.shared is None or len(subnets) < 2:
            return [self(choices) for choices in subnets]
        # Every unit as wide as in most of them: the subnet that a greedy decision started from.
        common = {name: Counter(subnet[name] for subnet in subnets).most_common(1)[0][0] for name in subnets[0]}
        every = {None: common, **dict(enumerate(subnets))}
        plan = self.shared.plan(
            [frozenset(name for name in common if common[name] != subnet[name]) for subnet in subnets]
        )
        statistics = self._calibrated(plan, every) if self.calibration is not None else None
        totals: list[list[Tensor]] = [[] for _ in subnets]

        def switch(number: int | None) -> None:
            self.algo.mutator.set_choices(every[number])
            if statistics is not None:
                self.statistics.use({**statistics[None], **statistics[number]})

        for batch, samples in zip(self.validation.batches, self.validation.sizes, strict=True):
            for number, output in self.shared.run(plan, batch.inputs, switch):
                totals[number].append(batch_total(self.metric, output, batch.targets, samples))
        return [self._mean(own) for own in totals]

    def _calibrated(self, plan: Plan, every: Mapping[int | None, Choices]) -> dict[int | None, Statistics]:
        """Statistics of the layers that were run for each subnet of a plan, and for what they have in common."""
        assert self.shared is not None
        assert self.calibration is not None
        moments: dict[int | None, dict[str, Moments]] = {number: {} for number in every}

        def switch(number: int | None) -> None:
            self.algo.mutator.set_choices(every[number])
            self.statistics.sink = moments[number]

        with self.statistics.recording():
            for batch in self.calibration.batches:
                for _ in self.shared.run(plan, batch.inputs, switch):
                    pass
        return {number: self.statistics.results(own) for number, own in moments.items()}

    def _mean(self, totals: Sequence[Tensor]) -> float:
        # Read at the end: a GPU is waited for once a subnet, not once a batch.
        return sum(torch.stack([total.to(totals[0]) for total in totals]).tolist()) / self.validation.samples


def accuracy(output: Any, targets: Any) -> Tensor:
    """Share of correct classes, per sample; NaN where the logits are.

    Args:
        output: logits (N, classes, ...).
        targets: class indices (N, ...).

    Raises:
        FastslimTypeError: the output is no tensor, or the targets are no class indices.
        FastslimValueError: their shapes do not belong together.
    """
    if not isinstance(output, Tensor):
        raise FastslimTypeError(f"the network returns {type(output).__name__}, not a tensor of logits; {HOW_TO}")
    if not isinstance(targets, Tensor) or targets.dtype.is_floating_point or targets.dtype == torch.bool:
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise FastslimTypeError(f"accuracy needs class indices as targets, but they are {kind}; {HOW_TO}")
    if output.dim() < 2 or targets.shape != output.shape[:1] + output.shape[2:]:
        raise FastslimValueError(
            f"an output of shape {tuple(output.shape)} is no set of logits (N, classes) for targets of shape "
            f"{tuple(targets.shape)}; {HOW_TO}"
        )
    correct = (output.argmax(1) == targets).float()
    # argmax of NaN is some class: a broken subnet would look like a poor one.
    correct = correct.masked_fill(output.isnan().any(1), torch.nan)
    return correct.flatten(1).mean(1) if correct.dim() > 1 else correct


def batch_total(metric: Metric, output: Any, targets: Any, samples: int) -> Tensor:
    """The sum of a metric over the samples of a batch, a scalar that stays on its device.

    Raises:
        FastslimTypeError: the metric returns no number.
        FastslimValueError: it returns neither one score nor one per sample.
    """
    scores = metric(output, targets)
    if isinstance(scores, (int, float)):
        scores = torch.tensor(float(scores))
    if not isinstance(scores, Tensor):
        raise FastslimTypeError(f"the metric returns {type(scores).__name__}; {HOW_TO}")
    if scores.dim() == 0:
        return scores.double() * samples if scores.device.type != "mps" else scores * samples
    if tuple(scores.shape) != (samples,):
        raise FastslimValueError(
            f"the metric returns scores of shape {tuple(scores.shape)} for a batch of {samples} samples; {HOW_TO}"
        )
    return scores.sum(dtype=None if scores.device.type == "mps" else torch.float64)
