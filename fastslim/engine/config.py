"""`TrainConfig`: every option of a training run, from YAML, from flags and back to YAML."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastslim.errors import FastslimFileError, FastslimRuntimeError, FastslimTypeError, FastslimValueError, nearest
from fastslim.files import write_atomically

SHIPPED = Path(__file__).with_name("configs")
TWELFTHS = tuple(i / 12 for i in range(2, 13))


def option(default: Any, help: str, *, among: tuple[str, ...] = (), low: float | None = None) -> Any:
    """A field with the sentence `--help` shows, its allowed values and its smallest value."""
    return field(default=default, metadata={"help": help, "among": among, "low": low})


@dataclass(frozen=True)
class TrainConfig:
    """All options of `fastslim train`; each is a YAML key and, with dashes, a flag."""

    data: str = option("digits", "digits, folder, or module:function that returns (train, val) datasets")
    data_root: str | None = option(None, "folder with train/ and val/, each with one folder a class")
    image_size: int = option(224, "pixels a side of the images of a folder", low=1)
    grayscale: bool = option(False, "read a folder's images as one channel")
    augment: bool = option(True, "small rotations and shifts (digits) or crops and mirroring (folder) while training")
    num_classes: int | None = option(None, "classes, where the data does not tell", low=2)
    workers: int = option(0, "processes that read images; 0 reads in the main one", low=0)

    model: str = option("resnet18", "resnet18, resnet50, mobilenet_v2, or module:function called with num_classes")
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
    lr_schedule: str = option("cosine", "course of the learning rate", among=("cosine", "step", "constant"))
    warmup_epochs: float = option(1.0, "epochs in which the learning rate rises from zero", low=0)
    lr_milestones: tuple[float, ...] = option((0.5, 0.75), "lr_schedule step: where it drops, as parts of the run")
    lr_gamma: float = option(0.1, "lr_schedule step: factor at each drop")
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
        for entry in dataclasses.fields(self):
            object.__setattr__(self, entry.name, check_value(entry, getattr(self, entry.name)))
        if not all(0 < ratio <= 1 for ratio in self.choices) or max(self.choices, default=0) != 1:
            raise FastslimValueError(
                f"choices={list(self.choices)}: must be ratios above 0 and up to 1, with 1.0 among them (the supernet)"
            )
        for name in ("lr", "width_mult", "lr_gamma"):
            if not getattr(self, name) > 0:
                raise FastslimValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.ema_decay >= 1:
            raise FastslimValueError(f"ema_decay={self.ema_decay}: must be below 1, for example 0.999")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0 and self.epochs > 1:
            raise FastslimValueError(f"warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some options changed, checked like the original."""
        return from_mapping({**self.as_dict(), **changes}, "the flags")

    def save(self, path: Path) -> None:
        """Writes YAML that `load_config` reads back to an equal object."""
        write_atomically(path, import_yaml().safe_dump(self.as_dict(), sort_keys=False, default_flow_style=None))


def expected_type(entry: dataclasses.Field[Any]) -> tuple[type, bool]:
    """The type of an option's values (of its items, for a tuple), and whether it may be unset."""
    hint = typing.get_type_hints(TrainConfig)[entry.name]
    if isinstance(hint, types.UnionType):
        return next(kind for kind in hint.__args__ if kind is not type(None)), True
    return hint, False


def check_value(entry: dataclasses.Field[Any], value: Any) -> Any:
    """The value in its proper type, or an error that names the option."""
    kind, may_be_unset = expected_type(entry)
    if value is None and may_be_unset:
        return None
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(check_scalar(entry.name, each, item) for each in values)
    value = check_scalar(entry.name, value, kind)
    among, low = entry.metadata["among"], entry.metadata["low"]
    if among and value not in among:
        raise FastslimValueError(f"{entry.name}: {value!r} is not possible: {nearest(value, among)}")
    if low is not None and value < low:
        raise FastslimValueError(f"{entry.name}={value}: must be at least {low}")
    return value


def check_scalar(name: str, value: Any, kind: type) -> Any:
    """One value as ``kind``; YAML reads ``1e-3`` as a string, which is a number all the same."""
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number == number:
            return number
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    raise FastslimTypeError(f"{name} must be {words[kind]}, not {value!r} ({type(value).__name__})")


def from_mapping(values: Mapping[str, Any], source: str) -> TrainConfig:
    """A configuration from plain values.

    Raises:
        FastslimValueError: an unknown key (the nearest known one is named) or an impossible value.
        FastslimTypeError: a value of the wrong type.
    """
    known = [entry.name for entry in dataclasses.fields(TrainConfig)]
    for key in values:
        if key not in known:
            raise FastslimValueError(f"unknown key {key!r} in {source}: {nearest(key, known)}")
    return TrainConfig(**values)


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
    yaml = import_yaml()
    path = find_config(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FastslimFileError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise FastslimValueError(f"{path}{line} is not plain YAML: {problem}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise FastslimValueError(f"{path} must hold 'key: value' lines, not a {type(values).__name__}")
    return from_mapping({**values, **changes}, str(path))


def import_yaml() -> Any:
    """PyYAML, or one sentence on how to get it."""
    try:
        import yaml
    except ImportError as error:
        raise FastslimRuntimeError("configuration files need PyYAML: pip install 'fastslim[cli]'") from error
    return yaml
