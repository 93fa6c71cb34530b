"""Options of the commands after training: search, export, retrain and eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastslim.engine.config import TrainConfig
from fastslim.engine.options import Numbers, Options, option
from fastslim.errors import FastslimValueError

FORMATS = ("subnet", "pt2", "onnx", "slimmable")


@dataclass(frozen=True)
class SearchOptions(Options):
    """All options of `fastslim search`; each is a YAML key and, with dashes, a flag."""

    NOT_PART_OF_THE_RESULT: ClassVar[tuple[str, ...]] = ("device",)

    budget: Numbers = option(  # noqa: RUF009  (it makes a field)
        {},
        "largest costs, may be repeated: flops=0.5,0.25, parameters, memory (bytes of activations), latency (ms); "
        "up to 1 they are parts of the full cost",
    )
    method: str = option("greedy", "how subnets are found", among=("greedy", "evolution"))
    score: str = option(
        "accuracy", "what makes a subnet good; loss tells subnets apart on few images", among=("accuracy", "loss")
    )
    images: int | None = option(None, "images that subnets are compared on; unset: all that are there for it", low=1)
    batch_size: int = option(256, "images a batch", low=1)
    batches: int | None = option(None, "compare subnets on so many batches; unset: on all images", low=1)
    calibrate: bool = option(
        True, "BN statistics of every subnet from training images; without: those of each batch, faster"
    )
    calibration_batches: int | None = option(None, "batches they are computed from; unset: 1024 images", low=1)
    latency_device: str = option("cpu", "latency: where the network will run, cpu, cuda or cuda:1")
    latency_batch_size: int = option(1, "latency: images at a time", low=1)
    latency_seconds: float = option(60.0, "latency: time for measuring the network's operations, once a run", low=1)
    population_size: int = option(50, "evolution: subnets a generation", low=1)
    generations: int = option(20, "evolution: generations a budget", low=1)
    top_k: int = option(10, "evolution: the best ones, which have children", low=1)
    mutation_prob: float = option(0.1, "evolution: probability that a unit changes", low=0)
    crossover_prob: float = option(0.5, "evolution: probability that a unit comes from the other parent", low=0)
    seed: int = option(0, "seed of the evolution", low=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.budget:
            raise FastslimValueError("there is no budget: give for example --budget flops=0.5,0.25")


@dataclass(frozen=True)
class ExportOptions(Options):
    """All options of `fastslim export`; each is a YAML key and, with dashes, a flag."""

    NOT_PART_OF_THE_RESULT: ClassVar[tuple[str, ...]] = ("device", "out")

    subnet: tuple[str, ...] = option((), "names that the search gave, or files; unset: all that it found")
    width: tuple[float, ...] = option((), "uniform widths, as ratios of the full one")
    format: tuple[str, ...] = option(
        ("subnet",), "subnet (safetensors and JSON), pt2, onnx; slimmable: all subnets in one file", among=FORMATS
    )
    out: str | None = option(None, "folder of the files; unset: export in the run's folder")
    fold_batch_norm: bool = option(False, "multiply batch norms into the layers before them, in pt2 and onnx")
    images: int = option(64, "held-out images that the outputs are compared on", low=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:1")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths(self.width)
        if not self.format:
            raise FastslimValueError(f"there is no format: choose among {', '.join(FORMATS)}")


@dataclass(frozen=True)
class EvalOptions(Options):
    """All options of `fastslim eval`; each is a YAML key and, with dashes, a flag."""

    widths: tuple[float, ...] = option((), "ratios of the full width; unset: those of the run")
    subnet: tuple[str, ...] = option((), "instead: names that the search gave, or files of subnets")
    checkpoint: str = option("last", "weights of the latest step, or of the best evaluation", among=("last", "best"))
    calibrate: bool = option(True, "compute BN statistics for each subnet first")
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths(self.widths)
        if self.widths and self.subnet:
            raise FastslimValueError("give either widths or subnets to evaluate: they are two tables")


#: What makes the supernet what it is; its subnets can't have other values.
OF_THE_SUPERNET = (
    "data",
    "data_root",
    "image_size",
    "grayscale",
    "num_classes",
    "search_share",
    "model",
    "width_mult",
    "small_images",
    "choices",
    "divisor",
    "exclude",
    "num_samples",
    "random_widths",
    "grad_reduction",
    "eval_widths",
)


@dataclass(frozen=True)
class RetrainConfig(TrainConfig):
    """All options of `fastslim retrain`; what is not given is as in the run."""

    subnet: str = option("", "a name that the search gave, a file of a subnet, or width-0.5")
    start: str = option(
        "supernet", "first weights: the supernet's (or the file's own), or random ones", among=("supernet", "scratch")
    )
    distill: bool = option(False, "learn from the supernet's full width (student_loss: kd, or ce+kd)")


def retrain_config(of_run: TrainConfig, values: Mapping[str, Any], source: str) -> RetrainConfig:
    """The run's options, overridden by those of the retraining.

    Raises:
        FastslimValueError: an unknown key, an impossible value, or one that only the supernet's training decides.
        FastslimTypeError: a value of the wrong type.
    """
    config = RetrainConfig.from_mapping({**of_run.as_dict(), **values}, source)
    for key in OF_THE_SUPERNET:
        if getattr(config, key) != getattr(of_run, key):
            raise FastslimValueError(
                f"{key}={getattr(config, key)!r} in {source}: the supernet was trained with "
                f"{getattr(of_run, key)!r}, and a subnet can't differ in it"
            )
    return config


def check_widths(widths: tuple[float, ...]) -> None:
    """Raises FastslimValueError where a width is not a ratio."""
    for width in widths:
        if not 0 < width <= 1:
            raise FastslimValueError(f"width {width:g} is not a ratio above 0 and up to 1")
