"""The digits as a dataset of mmengine, and top-1 accuracy as a metric: what the example and the first steps need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import BaseMetric
from torch import Tensor
from torch.utils.data import Dataset

from fastslim import data, errors
from fastslim.integrations.mmengine.registry import DATASETS, METRICS


@DATASETS.register_module()
class Digits(Dataset):
    """The handwritten digits bundled with scikit-learn, ``dict(inputs=(1, 8, 8), data_samples=label)``.

    Args:
        train: the training part (1438 images), or the held-out part (359 images).
    """

    metainfo = {"classes": tuple("0123456789")}

    def __init__(self, train: bool = True) -> None:
        self.images = data.digits()[0 if train else 1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.images[index]
        return {"inputs": image, "data_samples": label}


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Percentage of images whose class is right, as ``accuracy/top1``; for networks that return logits.

    Args:
        **kwargs: of mmengine's ``BaseMetric``.
    """

    default_prefix = "accuracy"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Counts one batch.

        Args:
            data_batch: as the loader yields it.
            data_samples: ``(logits, targets)``, what the model's mode "predict" gives for a plain network.

        Raises:
            FastslimTypeError: something else; an architecture with modes needs its own library's metric.
        """
        if len(data_samples) != 2 or not all(isinstance(part, Tensor) for part in data_samples):
            raise errors.FastslimTypeError(
                "fastslim.Accuracy takes (logits, targets), which a plain network's predictions are; for data samples "
                "take the metric of their library, such as type='mmpretrain.Accuracy'"
            )
        logits, targets = data_samples
        self.results += (logits.argmax(1) == targets).tolist()

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        """The percentage over all images."""
        return {"top1": 100 * sum(results) / max(len(results), 1)}
