"""Batch normalisation statistics for chosen subnets, all in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastslim import errors
from fastslim.algorithms.norm_statistics import Moments, NormStatistics
from fastslim.algorithms.slimmable import SlimmableAlgorithm


@torch.no_grad()
def calibrate_batch_norm(
    algo: SlimmableAlgorithm,
    loader: Iterable[Any],
    subnets: Sequence[Mapping[str, int]],
    num_batches: int | None = None,
) -> None:
    """Computes the batch normalisation statistics of many subnets in one pass over the data.

    The running statistics a slimmable network trains with mix all widths and fit none. Statistics
    are kept in `algo` by subnet; ``algo.set_subnet`` selects them; the next training step drops them.
    Source: Yu and Huang, Universally Slimmable Networks (ICCV 2019), section 3.3.

    Args:
        algo: the algorithm whose subnets are evaluated.
        loader: yields batches as for training.
        subnets: dicts from unit name to width, such as ``algo.uniform_subnet(0.5)``.
        num_batches: use the first batches only.

    Raises:
        FastslimValueError: the loader is empty.
    """
    before = algo.mutator.current_choices
    moments: list[dict[str, Moments]] = [{} for _ in subnets]
    device = next(algo.architecture.parameters()).device
    seen = 0
    try:
        with NormStatistics(algo) as statistics, statistics.recording():
            for index, data in enumerate(loader):
                if num_batches is not None and index >= num_batches:
                    break
                inputs = torch.utils._pytree.tree_map(
                    lambda value: value.to(device) if isinstance(value, Tensor) else value,
                    algo.unpack(data, training=False).inputs,
                )
                seen += 1
                for choices, statistics.sink in zip(subnets, moments, strict=True):
                    algo.mutator.set_choices(choices)
                    algo.call(algo.architecture, inputs)
        if not seen:
            raise errors.FastslimValueError("the calibration loader yields no batch; give it data, or num_batches >= 1")
        for choices, own in zip(subnets, moments, strict=True):
            algo.store_calibration(choices, statistics.results(own))
    finally:
        algo.set_subnet(before)
