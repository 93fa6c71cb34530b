"""How good a subnet is, by a loop's own dataloader and evaluator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.runner.amp import autocast

from fastslim import errors
from fastslim.algorithms.norm_statistics import NormStatistics
from fastslim.integrations.mmengine.calibration import FirstSamples, training_loader
from fastslim.integrations.mmengine.costs import supernet_of


class SubnetScores:
    """For search loops; they have a runner, a dataloader and an evaluator, as every loop of mmengine.

    Batch normalisation uses the statistics of each validation batch, since those that were recorded in training fit
    no subnet; or, with `calibrate_sample_num` above 0, statistics of so many training samples for each subnet.

    Attributes:
        score_key: which of the evaluator's metrics is maximised.
        calibrate_sample_num: training samples for the statistics of each subnet.
        fp16: evaluate under autocast.
    """

    runner: Any
    dataloader: Any
    evaluator: Any
    score_key: str
    calibrate_sample_num: int
    fp16: bool

    @contextlib.contextmanager
    def comparing_subnets(self) -> Iterator[None]:
        """Around a search: the model's modes, statistics and widths are afterwards as they were."""
        model = supernet_of(self.runner)
        before, norm_training = model.mutator.current_choices, model.norm_training
        with NormStatistics(model) as self._statistics:
            model.norm_training = True  # statistics are seen to: no warning, and no mode of its own
            try:
                yield
            finally:
                model.norm_training = norm_training
                model.mutator.set_choices(before)

    @torch.no_grad()
    def score(self, choices: Mapping[str, int]) -> float:
        """The metric of a subnet over the whole dataloader; inside :meth:`comparing_subnets`.

        Raises:
            FastslimValueError: the evaluator has no such metric.
        """
        model = supernet_of(self.runner)
        model.mutator.set_choices(choices)
        if self.calibrate_sample_num > 0:
            batches = FirstSamples(training_loader(self.runner), self.calibrate_sample_num)
            self._statistics.calibrate(model.unpack(data, training=False) for data in batches)
        for data in self.dataloader:
            with autocast(enabled=self.fp16):
                outputs = self.runner.model.val_step(data)
            self.evaluator.process(data_samples=outputs, data_batch=data)
        metrics = self.evaluator.evaluate(len(self.dataloader.dataset))
        if not len(metrics):  # an evaluator without metrics: all subnets are as good
            return 0.0
        if self.score_key not in metrics:
            raise errors.FastslimValueError(
                f"score_key={self.score_key!r} is none of the evaluator's metrics: "
                f"{errors.nearest(self.score_key, metrics)}"
            )
        return float(metrics[self.score_key])
