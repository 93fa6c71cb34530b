"""`load_data`: from a name in a configuration to checked training and held-out datasets."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fastslim.data.augment import Augmented, random_affine, random_crop_flip
from fastslim.data.digits import digits
from fastslim.data.folder import ImageFolder
from fastslim.errors import FastslimFileError, FastslimTypeError, FastslimValueError, nearest


@dataclass(frozen=True)
class ImageData:
    """What a run trains and evaluates on.

    Attributes:
        train: yields ``(image, label)``, augmented where asked.
        val: the held-out part.
        calibration: the training images without augmentation, for BN statistics.
        num_classes: labels are below this number.
        image_shape: (C, H, W).
    """

    train: Dataset[Any]
    val: Dataset[Any]
    calibration: Dataset[Any]
    num_classes: int
    image_shape: tuple[int, int, int]


def load_data(
    name: str,
    *,
    root: str | None = None,
    image_size: int = 224,
    grayscale: bool = False,
    augment: bool = True,
    num_classes: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Loads and checks the datasets a configuration names.

    Args:
        name: ``"digits"``, ``"folder"`` or ``"module:function"``; the function takes no arguments and returns
            ``(train, val)`` datasets of ``(image (C, H, W), label)``.
        root: of ``"folder"``: holds ``train/`` and ``val/``, each with one folder a class.
        image_size: of ``"folder"``: pixels a side.
        grayscale: of ``"folder"``: one channel.
        augment: small rotations and shifts (digits), random crops and mirroring (folder). A function augments its own
            data.
        num_classes: needed where a dataset has neither ``classes`` nor labels in a tensor.
        seed: of the augmentation.

    Raises:
        FastslimFileError: a missing folder or an unreadable image.
        FastslimValueError: an unknown name, an empty dataset, fewer than two classes.
        FastslimTypeError: a function that returns something else.
    """
    if name == "digits":
        train, val = digits()
        seen: Dataset[Any] = Augmented(train, random_affine, seed) if augment else train
        return checked(seen, val, train, num_classes, "digits")
    if name == "folder":
        return load_folder(root, image_size, grayscale, augment, num_classes, seed)
    if ":" in name:
        pair = import_function(name)()
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise FastslimTypeError(f"{name} must return (train, val) datasets, not {describe(pair)}")
        return checked(pair[0], pair[1], pair[0], num_classes, name)
    known = ("digits", "folder", "module:function")
    raise FastslimValueError(f"there is no data {name!r}: {nearest(name, known)}")


def load_folder(
    root: str | None, image_size: int, grayscale: bool, augment: bool, num_classes: int | None, seed: int
) -> ImageData:
    """``root/train`` and ``root/val``; both must have the same classes."""
    if root is None:
        raise FastslimValueError("data 'folder' needs data_root, a folder that holds train/ and val/")
    if not Path(root).is_dir():
        raise FastslimFileError(f"there is no folder {root}: data_root should hold train/ and val/")
    plain = ImageFolder(Path(root) / "train", image_size, grayscale=grayscale)
    val = ImageFolder(Path(root) / "val", image_size, grayscale=grayscale)
    if plain.classes != val.classes:
        only = sorted(set(plain.classes) ^ set(val.classes))
        raise FastslimValueError(f"train and val of {root} differ in their classes: {only[0]!r} is in one of them only")
    if not augment:
        return checked(plain, val, plain, num_classes, root)
    roomy = ImageFolder(Path(root) / "train", image_size, margin=max(1, image_size // 8), grayscale=grayscale)
    seen = Augmented(roomy, functools.partial(random_crop_flip, size=image_size), seed)
    return checked(seen, val, plain, num_classes, root)


def import_function(name: str) -> Callable[..., Any]:
    """The callable behind ``"module:function"``; modules in the current folder are found.

    Raises:
        FastslimValueError: no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise FastslimValueError(f"{name!r}: cannot import {module_name!r} ({error})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise FastslimValueError(f"{module_name!r} has no function {function_name!r}: {nearest(function_name, public)}")
    return function


def checked(
    train: Dataset[Any], val: Dataset[Any], calibration: Dataset[Any], num_classes: int | None, name: str
) -> ImageData:
    """Looks at both datasets before a run spends time on them."""
    shape = sample_shape(train, f"the training data of {name!r}")
    val_shape = sample_shape(val, f"the held-out data of {name!r}")
    if shape[0] != val_shape[0]:
        raise FastslimValueError(f"{name!r}: training images have {shape[0]} channels, held-out ones {val_shape[0]}")
    classes = num_classes or count_classes(train)
    if classes is None:
        raise FastslimValueError(f"{name!r} does not tell how many classes it has: set num_classes")
    if classes < 2:
        raise FastslimValueError(f"{name!r} has {classes} class: a classifier needs at least 2")
    return ImageData(train, val, calibration, classes, shape)


def sample_shape(dataset: Dataset[Any], title: str) -> tuple[int, int, int]:
    """(C, H, W) of the first image, after checking that it can be trained on."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise FastslimTypeError(f"{title} must be a dataset with a length and items, not {describe(dataset)}")
    if len(dataset) == 0:
        raise FastslimValueError(f"{title} is empty")
    sample = dataset[0]
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise FastslimTypeError(f"items of {title} must be (image, label), not {describe(sample)}")
    image, label = sample
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise FastslimTypeError(f"images of {title} must be tensors (C, H, W), not {describe(image)}")
    if not image.is_floating_point():
        raise FastslimTypeError(f"images of {title} are {image.dtype}: convert them to float32, about zero mean")
    if isinstance(label, float) or (isinstance(label, Tensor) and (label.is_floating_point() or label.ndim)):
        raise FastslimTypeError(f"labels of {title} must be whole numbers, not {describe(label)}")
    channels, height, width = image.shape
    return channels, height, width


def count_classes(dataset: Dataset[Any]) -> int | None:
    """Number of classes from ``classes``, or from the labels where they lie in a tensor."""
    classes = getattr(dataset, "classes", None)
    if classes is not None:
        return len(classes)
    labels = dataset.tensors[1] if isinstance(dataset, TensorDataset) else getattr(dataset, "targets", None)
    return None if labels is None else int(torch.as_tensor(labels).max()) + 1


def describe(value: object) -> str:
    """A short description of a wrong value for an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
