"""Image folders: one folder a class, read with Pillow, resized and normalised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastslim.errors import FastslimFileError, FastslimRuntimeError, FastslimValueError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# ImageNet's mean and deviation, which the published weights expect; grey images take their average.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """``root/class/image``; classes are numbered in the order of their names.

    Args:
        root: folder that holds one folder a class.
        size: the shorter side is resized to this many pixels, then the central (size, size) square is cut out.
        margin: pixels added to ``size`` on both counts, as room for random crops.
        grayscale: one channel instead of three.

    Raises:
        FastslimFileError: the folder is missing.
        FastslimValueError: no classes or no images in it.
    """

    def __init__(self, root: Path | str, size: int, *, margin: int = 0, grayscale: bool = False) -> None:
        self.root = Path(root)
        self.size = size + margin
        self.grayscale = grayscale
        if not self.root.is_dir():
            raise FastslimFileError(f"there is no folder {self.root}: it should hold one folder of images a class")
        self.classes = tuple(sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")))
        if not self.classes:
            raise FastslimValueError(f"{self.root} holds no folders: put the images of each class into a folder there")
        self.samples = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((self.root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.samples:
            raise FastslimValueError(f"{self.root} holds no images ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return normalise(self.read_square(path)), label

    def read_square(self, path: Path) -> np.ndarray:
        """The central square of an image, (size, size) or (size, size, 3), uint8."""
        try:
            from PIL import Image
        except ImportError as error:
            raise FastslimRuntimeError("reading images needs Pillow: pip install 'fastslim[cli]'") from error
        try:
            with Image.open(path) as image:
                image = image.convert("L" if self.grayscale else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise FastslimFileError(f"{path} cannot be read as an image ({error}); repair or remove it") from error
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))


def normalise(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W) or (H, W, 3) to float32 (C, H, W) of about zero mean and unit variance."""
    if pixels.ndim == 2:
        mean, std = (torch.tensor([sum(values) / 3]).view(1, 1, 1) for values in (MEAN, STD))
        image = torch.from_numpy(pixels.copy())[None]
    else:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return (image.float() / 255 - mean) / std
