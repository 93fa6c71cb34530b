"""The handwritten digits bundled with scikit-learn: 1797 real scans, 8x8 grey, ten classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastslim.errors import FastslimRuntimeError

HELD_OUT = 5  # every fifth image of a class, 20 %
SPLIT_SEED = 0


class Digits(TensorDataset):
    """Images (1, 8, 8) in float32, zero mean and unit variance over the training part; labels 0 to 9."""

    classes = tuple("0123456789")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:  # type: ignore[override]
        image, label = super().__getitem__(index)
        return image, int(label)


def digits() -> tuple[Digits, Digits]:
    """The training part (1438 images) and the held-out part (359 images, 20 % of every class).

    The split never changes: it does not depend on a training seed.

    Source: Alpaydin and Kaynak, 1998, "Optical Recognition of Handwritten Digits", test part.

    Raises:
        FastslimRuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FastslimRuntimeError("the digits come with scikit-learn: pip install 'fastslim[cli]'") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None]
    labels = torch.from_numpy(bunch.target).long()
    # RandomState's stream is frozen by numpy, so the split is the same with every version.
    order = np.random.RandomState(SPLIT_SEED)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        of_label = order.permutation(np.flatnonzero(bunch.target == label))
        held_out[of_label[: round(len(of_label) / HELD_OUT)]] = True
    std, mean = torch.std_mean(images[~held_out])
    images = (images - mean) / std
    return Digits(images[~held_out], labels[~held_out]), Digits(images[held_out], labels[held_out])
