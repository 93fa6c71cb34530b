"""Images to train on: the embedded handwritten digits, image folders, or any function that returns datasets."""

from __future__ import annotations

from fastslim.data.augment import Augmented, random_affine, random_crop_flip
from fastslim.data.digits import digits
from fastslim.data.folder import ImageFolder
from fastslim.data.loader import EpochShuffle, make_loader, start_epoch
from fastslim.data.sources import ImageData, import_function, load_data

__all__ = [
    "Augmented",
    "EpochShuffle",
    "ImageData",
    "ImageFolder",
    "digits",
    "import_function",
    "load_data",
    "make_loader",
    "random_affine",
    "random_crop_flip",
    "start_epoch",
]
