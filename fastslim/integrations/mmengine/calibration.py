"""Statistics of batch normalisation, calibrated from a part of a training loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastslim import errors
from fastslim.algorithms.calibrate import calibrate_batch_norm
from fastslim.integrations.mmengine.costs import supernet_of


class FirstSamples:
    """The first batches of a loader, as many as hold a number of samples; can be iterated again.

    Args:
        loader: of batches.
        samples: at least so many.
    """

    def __init__(self, loader: Iterable[Any], samples: int) -> None:
        self.loader, self.samples = loader, samples

    def __iter__(self) -> Iterator[Any]:
        left = self.samples
        for data in self.loader:
            if left <= 0:
                return
            yield data
            left -= _size(data)


class CalibrateBNMixin:
    """For loops: calibrates batch normalisation of subnets, see :func:`fastslim.calibrate_batch_norm`."""

    runner: Any

    def calibrate_bn_statistics(
        self,
        dataloader: Iterable[Any],
        calibrate_sample_num: int = 2000,
        subnets: Sequence[Mapping[str, int]] | None = None,
    ) -> None:
        """Computes the statistics of subnets in one pass over the data; they hold until the weights change.

        Args:
            dataloader: batches as for training.
            calibrate_sample_num: samples used.
            subnets: the present one by default.
        """
        model = supernet_of(self.runner)
        if subnets is None:
            subnets = [model.mutator.current_choices]
        self.runner.logger.info(f"Calibrating batch norm of {len(subnets)} subnets with {calibrate_sample_num} samples")
        calibrate_batch_norm(model, FirstSamples(dataloader, calibrate_sample_num), subnets)


def training_loader(runner: Any) -> Iterable[Any]:
    """The runner's training data.

    Raises:
        FastslimValueError: its config has none.
    """
    loop = runner.train_loop if hasattr(runner, "train_loop") else None
    if loop is None:
        raise errors.FastslimValueError(
            "calibrate_sample_num needs training data: the config lacks train_cfg, train_dataloader and optim_wrapper; "
            "add them, or set calibrate_sample_num=-1"
        )
    return loop.dataloader


def _size(data: Any) -> int:
    if isinstance(data, Mapping):
        data = data["inputs"] if "inputs" in data else next(iter(data.values()))
    elif isinstance(data, (list, tuple)):
        data = data[0]
    return len(data)
