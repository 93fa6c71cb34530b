"""`export_run`: subnets of a run as files, each compared with the supernet on real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from fastslim.algorithms import AutoSlim
from fastslim.algorithms.calibrate import calibrate_batch_norm
from fastslim.data import ImageData, make_loader
from fastslim.data.folder import MEAN, STD
from fastslim.engine.config import TrainConfig
from fastslim.engine.evaluate import SubnetResult, accuracy_and_loss, aligned
from fastslim.engine.run import calibration_loader, held_out_loader, load_run
from fastslim.engine.run_folder import existing_run
from fastslim.engine.stage_folder import StageFolder, digest_of
from fastslim.engine.stage_options import ExportOptions
from fastslim.engine.subnets import ChosenSubnet, choose_subnet, found_subnets, subnet_key, uniform
from fastslim.errors import FastslimValueError
from fastslim.export import (
    Equality,
    check_export,
    export_onnx,
    export_subnet,
    export_torch,
    fold_batch_norm,
    save_slimmable,
    save_subnet,
)


@dataclass(frozen=True)
class WrittenFile:
    """A file that was exported.

    Attributes:
        subnet: its name; "all" where several share the file.
        format: of the file.
        path: in the folder of the export.
        bytes: its size, or that of all files of a folder.
        difference: largest absolute difference of an output from the supernet's or the network's, on real images.
        scale: largest absolute output.
        tolerance: which part of the scale the difference may be; a larger one is an error.
    """

    subnet: str
    format: str
    path: str
    bytes: int
    difference: float
    scale: float
    tolerance: float


@dataclass(frozen=True)
class ExportOutcome:
    """How a call of `export_run` ended.

    Attributes:
        folder: of the files.
        status: ``"exported"``, or ``"finished before"`` (nothing was written).
        files: what lies there.
        subnets: accuracy and cost of each subnet.
    """

    folder: Path
    status: Literal["exported", "finished before"]
    files: list[WrittenFile]
    subnets: list[SubnetResult]


def export_run(run: Path | str, options: ExportOptions, *, overwrite: bool = False) -> ExportOutcome:
    """Writes subnets as files and compares each with the supernet, on held-out images.

    Args:
        run: the run's folder.
        options: all options.
        overwrite: replace files that are there.

    Raises:
        FastslimError: anything that cannot work; the message names the fix.
    """
    run, train_folder = Path(run), existing_run(run)
    folder = StageFolder(Path(options.out) if options.out else run / "export", "export.json", "export", "--out")
    if not (options.subnet or options.width):
        options = options.replace(subnet=list(found_subnets(run)))
        if not options.subnet:
            raise FastslimValueError(
                f"which subnet? `fastslim search {run}` has found none yet; give --width 0.5, or --subnet FILE"
            )
    made_of = {"supernet": digest_of(train_folder.last), "subnets": [subnet_key(run, t) for t in options.subnet]}
    results = folder.finished(options, made_of, resume=False, overwrite=overwrite, again=True)
    if results is not None:
        files = [WrittenFile(**row) for row in results["files"]]
        subnets = [SubnetResult(**row) for row in results["subnets"]]
        return ExportOutcome(folder.path, "finished before", files, subnets)
    config, data, algo = load_run(run, device=options.device)
    chosen = [choose_subnet(run, algo, text) for text in options.subnet]
    chosen += [uniform(algo, width) for width in options.width]
    check_together(chosen, options)
    folder.begin(options, made_of)
    device = next(algo.parameters()).device
    images = next(iter(make_loader(data.val, options.images, shuffle=False)))[0].to(device)
    own = [subnet.choices for subnet in chosen if subnet.network is None]
    if own:
        calibrate_batch_norm(algo, calibration_loader(config, data), own, config.calibration_batches or None)
    exporter = Exporter(config, data, algo, images, folder.path, options)
    files = [file for subnet in chosen for file in exporter.files(subnet)]
    if "slimmable" in options.format:
        files.append(exporter.slimmable(chosen))
    rows = list(exporter.results.values())
    folder.write(
        options,
        made_of,
        finished=True,
        files=[asdict(file) for file in files],
        subnets=[row.as_dict() for row in rows],
    )
    return ExportOutcome(folder.path, "exported", files, rows)


def check_together(chosen: list[ChosenSubnet], options: ExportOptions) -> None:
    """Raises FastslimValueError for two subnets of one name, or weights of their own in a shared file."""
    names = [subnet.name for subnet in chosen]
    for name in names:
        if names.count(name) > 1:
            raise FastslimValueError(f"two subnets are called {name!r}: export them into folders of their own, --out")
    own = [subnet.name for subnet in chosen if subnet.network is not None]
    if own and "slimmable" in options.format:
        raise FastslimValueError(
            f"{own[0]} has weights of its own, and a slimmable file holds those of the supernet: leave it out"
        )


class Exporter:
    """Writes the files of an export.

    Args:
        config: of the run.
        data: of the run.
        algo: the supernet, calibrated for the subnets.
        images: that outputs are compared on.
        folder: of the files.
        options: of the export.

    Attributes:
        results: accuracy and cost of the subnets so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        algo: AutoSlim,
        images: Tensor,
        folder: Path,
        options: ExportOptions,
    ) -> None:
        self.algo, self.images, self.folder, self.options = algo, images, folder, options
        self.normalisation = normalisation_of(config)
        self.held_out = held_out_loader(config, data)
        self.results: dict[str, SubnetResult] = {}

    def files(self, subnet: ChosenSubnet) -> list[WrittenFile]:
        """The files of one subnet."""
        network = subnet.network
        if network is None:
            network = export_subnet(self.algo, subnet.choices)
            equality = check_export(self.algo, network, subnet.choices, self.images)
        else:
            equality = Equality(0.0, float(network.eval()(self.images).detach().abs().max()), 0.0)
        network = network.eval()
        self.results[subnet.name] = self.result(subnet, network)
        written = []
        if "subnet" in self.options.format:
            path = self.folder / subnet.name
            save_subnet(
                path,
                self.algo.mutator,  # says what the units are; the weights are the network's
                subnet.choices,
                module=network,
                normalisation=self.normalisation,
                metrics=self.metrics(subnet.name),
                overwrite=True,
            )
            written.append(self.written(subnet.name, "subnet", path, equality))
        if self.options.fold_batch_norm:
            network = fold_batch_norm(network, self.images)
        for name, write in (("pt2", export_torch), ("onnx", export_onnx)):
            if name in self.options.format:
                path = self.folder / f"{subnet.name}.{name}"
                file = write(path, network, self.images, overwrite=True)
                written.append(self.written(subnet.name, name, path, file.equality))
        return written

    def slimmable(self, chosen: list[ChosenSubnet]) -> WrittenFile:
        """All subnets in one file, read back and compared with the supernet."""
        from fastslim.export import load_slimmable

        path = self.folder / "slimmable.safetensors"
        subnets = {subnet.name: subnet.choices for subnet in chosen}
        save_slimmable(
            path,
            self.algo,
            subnets,
            normalisation=self.normalisation,
            metrics={name: self.metrics(name) for name in subnets},
            overwrite=True,
        )
        network = load_slimmable(path, full_network(self.algo)).to(self.images.device)
        found = []
        for name, choices in subnets.items():
            network.set_width(name)
            found.append(check_export(self.algo, network, choices, self.images))
        return self.written("all", "slimmable", path, max(found, key=lambda equality: equality.relative))

    def result(self, subnet: ChosenSubnet, network: nn.Module) -> SubnetResult:
        """Accuracy of the exported network and its cost."""
        cost = self.algo.subnet_cost(subnet.choices)
        scores = accuracy_and_loss(network, self.held_out)
        return SubnetResult(subnet.name, cost.multiply_adds, cost.parameters, *scores)

    def metrics(self, name: str) -> dict[str, float]:
        """What a file says about a subnet's quality."""
        return {"accuracy": self.results[name].accuracy, "loss": self.results[name].loss}

    def written(self, name: str, kind: str, path: Path, equality: Equality) -> WrittenFile:
        """The row of a file."""
        parts = path.iterdir() if path.is_dir() else [path]
        size = sum(part.stat().st_size for part in parts)
        place = path.relative_to(self.folder).as_posix()
        return WrittenFile(name, kind, place, size, equality.difference, equality.scale, equality.tolerance)


def full_network(algo: AutoSlim) -> nn.Module:
    """A plain copy of the full-size network."""
    algo.set_max_subnet()
    return export_subnet(algo.mutator)


def normalisation_of(config: TrainConfig) -> Mapping[str, Any] | None:
    """How a folder's images are prepared; other data prepare their own."""
    if config.data != "folder":
        return None
    mean, std = ([sum(values) / 3] if config.grayscale else list(values) for values in (MEAN, STD))
    return {"scale": 1 / 255, "mean": mean, "std": std, "image_size": config.image_size}


def format_files(outcome: ExportOutcome) -> str:
    """Files with their sizes and differences as aligned text."""
    accuracy = {row.name: f"{100 * row.accuracy:.2f} %" for row in outcome.subnets}
    lines: list[tuple[str, ...]] = [("subnet", "accuracy", "file", "size", "largest difference", "of outputs up to")]
    for file in outcome.files:
        lines.append(
            (
                file.subnet,
                accuracy.get(file.subnet, ""),
                file.path,
                format_bytes(file.bytes),
                f"{file.difference:.1e}",
                f"{file.scale:.3g}",
            )
        )
    return aligned(lines)


def format_bytes(size: int) -> str:
    """Three digits and a unit: 1 234 567 is 1.23 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
