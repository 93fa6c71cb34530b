"""`TrainConfig`: every option of a training run, and the configurations that are shipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastslim.engine.options import Options, option
from fastslim.errors import FastslimFileError, FastslimValueError, nearest

SHIPPED = Path(__file__).with_name("configs")
TWELFTHS = tuple(i / 12 for i in range(2, 13))


@dataclass(frozen=True)
class TrainConfig(Options):
    """All options of `fastslim train`; each is a YAML key and, with dashes, a flag."""

    NOT_PART_OF_THE_RESULT: ClassVar[tuple[str, ...]] = ("workers", "device", "log_every", "tensorboard")

    data: str = option("digits", "digits, folder, or module:function that returns (train, val) datasets")
    data_root: str | None = option(None, "folder with train/ and val/, each with one folder a class")
    image_size: int = option(224, "pixels a side of the images of a folder", low=1)
    grayscale: bool = option(False, "read a folder's images as one channel")
    augment: bool = option(True, "small rotations and shifts (digits) or crops and mirroring (folder) while training")
    num_classes: int | None = option(None, "classes, where the data does not tell", low=2)
    search_share: float = option(
        0.0, "part of the training images that is left out, for `fastslim search` to compare subnets on", low=0
    )
    workers: int = option(0, "processes that read images; 0 reads in the main one", low=0)

    model: str = option(
        "resnet18",
        "resnet18, resnet50, mobilenet_v1, mobilenet_v2, mnasnet, or module:function called with num_classes",
    )
    width_mult: float = option(1.0, "width of the supernet, as a factor on the published one")
    small_images: bool | None = option(None, "stem for small images; unset: below 64 pixels")

    choices: tuple[float, ...] = option(TWELFTHS, "widths a channel unit can take, as ratios of the full one")
    divisor: int = option(8, "widths are rounded to multiples of this", low=1)
    exclude: tuple[str, ...] = option((), "names of layers that keep their width; * matches anything")
    num_samples: int = option(2, "random subnets a step, besides max and min", low=0)
    random_widths: str = option(
        "per_unit", "random subnets: a width for each unit, or one for all", among=("per_unit", "uniform")
    )
    student_loss: str = option(
        "kd", "what subnets learn from: the max subnet, or the labels too", among=("kd", "ce+kd")
    )
    grad_reduction: str = option("sum", "how the gradients of a step's subnets are joined", among=("sum", "mean"))

    epochs: int = option(30, "passes over the training data", low=1)
    batch_size: int = option(64, "images a batch", low=2)
    accumulate: int = option(1, "batches an optimizer step; their mean gradient counts", low=1)
    optimizer: str = option("sgd", "optimizer", among=("sgd", "adam", "adamw"))
    lr: float = option(0.05, "learning rate after the warm-up")
    momentum: float = option(0.9, "momentum of sgd", low=0)
    nesterov: bool = option(True, "Nesterov's form of the momentum")
    weight_decay: float = option(1e-4, "weight decay of convolutions and linear layers", low=0)
    norm_weight_decay: float = option(0.0, "weight decay of BN and biases", low=0)
    lr_schedule: str = option("cosine", "course of the learning rate", among=("cosine", "linear", "step", "constant"))
    warmup_epochs: float = option(1.0, "epochs in which the learning rate rises from zero", low=0)
    lr_milestones: tuple[float, ...] = option((0.5, 0.75), "lr_schedule step: where it drops, as parts of the run")
    lr_gamma: float = option(0.1, "lr_schedule step: factor at each drop")
    label_smoothing: float = option(0.0, "part of each label that is spread over all classes", low=0)
    clip_grad_norm: float = option(0.0, "largest norm of the gradient; 0: no clipping", low=0)
    ema_decay: float = option(0.0, "decay of averaged weights, which are then evaluated; 0: none", low=0)
    autocast: str = option("none", "compute type inside the step", among=("none", "bf16"))
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    seed: int = option(0, "seed of weights, order, augmentation and sampled subnets", low=0)

    eval_widths: int = option(4, "evenly spaced widths to evaluate, with the narrowest and the full one", low=2)
    eval_every: int = option(1, "epochs between evaluations", low=1)
    calibration_batches: int = option(16, "batches that BN statistics are computed from; 0: all", low=0)
    log_every: int = option(50, "steps between printed lines where there is no progress bar", low=1)
    tensorboard: bool = option(True, "write TensorBoard files, if it is installed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < ratio <= 1 for ratio in self.choices) or max(self.choices, default=0) != 1:
            raise FastslimValueError(
                f"choices={list(self.choices)}: must be ratios above 0 and up to 1, with 1.0 among them (the supernet)"
            )
        for name in ("lr", "width_mult", "lr_gamma"):
            if not getattr(self, name) > 0:
                raise FastslimValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.search_share > 0.5:
            raise FastslimValueError(f"search_share={self.search_share}: must be at most 0.5, for example 0.1")
        if self.label_smoothing >= 1:
            raise FastslimValueError(f"label_smoothing={self.label_smoothing}: must be below 1, for example 0.1")
        if self.ema_decay >= 1:
            raise FastslimValueError(f"ema_decay={self.ema_decay}: must be below 1, for example 0.999")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0 and self.epochs > 1:
            raise FastslimValueError(f"warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}")


def find_config(name: str | Path) -> Path:
    """The file behind ``--config``: a path, or the name of a configuration shipped with fastslim.

    Raises:
        FastslimFileError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = [p.stem for p in SHIPPED.glob("*.yaml")]
    raise FastslimFileError(
        f"there is no configuration file {name}, and none ships as {name!r}: {nearest(path.stem, names)}"
    )


def load_config(name: str | Path, **changes: Any) -> TrainConfig:
    """Reads a YAML file (or a shipped configuration); ``changes`` override what it says.

    Raises:
        FastslimFileError: no such file, or it cannot be read.
        FastslimValueError: not YAML, a tag that would build an object, an unknown key, an impossible value.
        FastslimTypeError: a value of the wrong type.
    """
    return TrainConfig.from_file(find_config(name), **changes)
