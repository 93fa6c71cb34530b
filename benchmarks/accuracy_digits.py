"""Each width of one supernet against the same subnet trained alone: digits, several seeds, equal epochs.

    python benchmarks/accuracy_digits.py --out benchmarks/results

The supernet is the demo (`fastslim train --config digits`), with half its epochs to keep the script short. A subnet
alone is a plain torch network of the same layer sizes, trained by a plain loop with the same images, optimizer,
schedule and epochs. Writes accuracy_digits.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastslim import AutoSlim
from fastslim.data import ImageData, make_loader, start_epoch
from fastslim.engine.build import build_data, build_model, build_supernet
from fastslim.engine.config import TrainConfig, load_config
from fastslim.engine.evaluate import WidthResult, format_count
from fastslim.engine.plot import plot_widths
from fastslim.engine.run import train
from fastslim.engine.schedule import make_optimizer, make_scheduler
from fastslim.files import write_atomically


def plain_subnet(config: TrainConfig, data: ImageData, width: float) -> nn.Module:
    """A plain torch network with the layer sizes of a subnet, freshly initialised."""
    algo = build_supernet(config, data, torch.device("cpu")).eval()
    sizes = layer_sizes(algo, algo.uniform_subnet(width), data)
    model = build_model(config, data)
    for name, (c_in, c_out) in sizes.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, resized(model.get_submodule(name), c_in, c_out))
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == algo.subnet_cost(algo.uniform_subnet(width)).parameters
    return model


def layer_sizes(algo: AutoSlim, subnet: dict[str, int], data: ImageData) -> dict[str, tuple[int, int]]:
    """Input and output channels of every layer with weights, seen on a forward pass of the subnet."""
    sizes: dict[str, tuple[int, int]] = {}
    handles = [
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: sizes.update({name: (inputs[0].shape[1], output.shape[1])})
        )
        for name, layer in algo.architecture.named_modules()
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]
    algo.train().set_subnet(subnet)
    algo(torch.zeros(2, *data.image_shape))
    for handle in handles:
        handle.remove()
    return sizes


def resized(layer: nn.Module, c_in: int, c_out: int) -> nn.Module:
    """A new layer like the given one, with other channel counts and the models' initialisation."""
    if isinstance(layer, nn.Conv2d):
        conv = nn.Conv2d(c_in, c_out, layer.kernel_size, layer.stride, layer.padding, bias=layer.bias is not None)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return conv
    return nn.Linear(c_in, c_out) if isinstance(layer, nn.Linear) else nn.BatchNorm2d(c_out)


def train_alone(config: TrainConfig, data: ImageData, width: float) -> float:
    """Held-out accuracy of a subnet trained by itself."""
    model = plain_subnet(config, data, width).train()
    loader = make_loader(data.train, config.batch_size, shuffle=True, seed=config.seed)
    optimizer = make_optimizer(model, config)
    scheduler = make_scheduler(optimizer, config, len(loader))
    for epoch in range(config.epochs):
        start_epoch(loader, epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            scheduler.step()
    model.eval()
    with torch.no_grad():
        held_out = make_loader(data.val, 512, shuffle=False)
        correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in held_out)
    return correct / len(data.val)  # type: ignore[arg-type]


def run_seed(config: TrainConfig) -> tuple[list[WidthResult], list[float]]:
    """The supernet's widths, and the accuracies of the same subnets alone."""
    with tempfile.TemporaryDirectory() as folder:
        together = train(config, Path(folder) / "run").widths
    data = build_data(config)
    alone = []
    for row in together:
        alone.append(train_alone(config, data, row.width))
        print(f"seed {config.seed}  {row.width:.2f}x  supernet {row.accuracy:.4f}  alone {alone[-1]:.4f}", flush=True)
    return together, alone


def mean_and_range(values: list[float]) -> str:
    """Percent: the mean, and the lowest and highest value."""
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * statistics.mean(values):.2f} ({low:.1f} to {high:.1f})"


def table(widths: list[dict[str, Any]]) -> str:
    """The comparison as markdown."""
    lines = [
        "| width | multiply-adds | parameters | in the supernet, % | trained alone, % | difference, points |",
        "|---|---|---|---|---|---|",
    ]
    for row in reversed(widths):
        difference = 100 * (statistics.mean(row["supernet"]) - statistics.mean(row["alone"]))
        lines.append(
            f"| {row['width']:.2f}x | {format_count(row['multiply_adds'])} | {format_count(row['parameters'])} "
            f"| {mean_and_range(row['supernet'])} | {mean_and_range(row['alone'])} | {difference:+.2f} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown",
    }


def main() -> None:
    """Trains everything and writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="digits", help="YAML file or shipped configuration")
    parser.add_argument("--epochs", type=int, default=30, help="of the supernet and of each subnet alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    # One evaluation at the end, as the subnets alone have it.
    config = load_config(arguments.config, tensorboard=False, epochs=arguments.epochs, eval_every=arguments.epochs)

    started = time.perf_counter()
    runs = [run_seed(config.replace(seed=seed)) for seed in arguments.seeds]
    widths = [
        {
            "width": row.width,
            "multiply_adds": row.multiply_adds,
            "parameters": row.parameters,
            "supernet": [together[index].accuracy for together, _ in runs],
            "alone": [alone[index] for _, alone in runs],
        }
        for index, row in enumerate(runs[0][0])
    ]
    where = machine()
    minutes = (time.perf_counter() - started) / 60
    caption = (
        f"{config.model} x{config.width_mult:g} on {config.data}, {config.epochs} epochs, seeds {arguments.seeds}; "
        f"mean (lowest to highest). {where['cpu']}, {where['threads']} threads, torch {where['torch']}, "
        f"commit {where['commit']}, {minutes:.0f} minutes."
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"widths": widths, "seeds": arguments.seeds, "machine": where, "config": config.as_dict()}
    write_atomically(arguments.out / "accuracy_digits.json", json.dumps(result, indent=2) + "\n")
    write_atomically(arguments.out / "accuracy_digits.md", f"{table(widths)}\n\n{caption}\n")
    rows = [
        replace(row, accuracy=statistics.mean(data["supernet"])) for row, data in zip(runs[0][0], widths, strict=True)
    ]
    alone = [replace(row, accuracy=statistics.mean(data["alone"])) for row, data in zip(rows, widths, strict=True)]
    plot_widths(
        arguments.out / "accuracy_digits.png",
        rows,
        data=f"{config.data}, mean of {len(runs)} seeds",
        model=config.model,
        alone=alone,
    )
    print(f"\n{table(widths)}\n\n{caption}")


if __name__ == "__main__":
    main()
