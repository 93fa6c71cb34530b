"""Searched widths against uniform ones of the same cost: digits, several seeds, before and after retraining.

    python benchmarks/search_digits.py --out benchmarks/results

A supernet is trained as the demo's, without a tenth of the training images, which subnets are compared on. For each of
two budgets (the multiply-adds of a uniform width) there are three subnets: that uniform width, what greedy slimming
finds and what evolution finds. Each is evaluated on the held-out images with calibrated statistics, then retrained as a
plain torch network from the supernet's weights on all training images, and evaluated again. Writes search_digits.md
and .json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accuracy_digits import machine, mean_and_range
from torch import nn

import fastslim
from fastslim.data import ImageData, make_loader, start_epoch
from fastslim.engine.build import load_all_data
from fastslim.engine.config import TrainConfig, load_config
from fastslim.engine.evaluate import evaluate_named, format_count
from fastslim.engine.run import load_run, train
from fastslim.engine.schedule import make_optimizer, make_scheduler
from fastslim.engine.search_run import minus_loss
from fastslim.engine.split import search_part
from fastslim.files import write_atomically

UNIFORM = (0.75, 0.5)  # whose multiply-adds are the budgets
METHODS = ("uniform", "greedy", "evolution")


def retrained(config: TrainConfig, data: ImageData, network: nn.Module) -> float:
    """Held-out accuracy after a plain training loop on all training images."""
    loader = make_loader(data.train, config.batch_size, shuffle=True, seed=config.seed)
    optimizer = make_optimizer(network, config)
    scheduler = make_scheduler(optimizer, config, len(loader))
    network.train()
    for epoch in range(config.epochs):
        start_epoch(loader, epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            scheduler.step()
    network.eval()
    with torch.no_grad():
        held_out = make_loader(data.val, 512, shuffle=False)
        correct = sum((network(images).argmax(1) == labels).sum().item() for images, labels in held_out)
    return correct / len(data.val)  # type: ignore[arg-type]


def run_seed(config: TrainConfig, again: TrainConfig) -> list[dict[str, Any]]:
    """One row for each budget and method."""
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run")
        _, data, algo = load_run(Path(folder) / "run")
    everything = load_all_data(config)
    images = make_loader(search_part(everything, config.search_share), 512, shuffle=False)
    calibration = make_loader(data.calibration, config.batch_size, shuffle=False)
    uniform = {ratio: algo.uniform_subnet(ratio) for ratio in UNIFORM}
    budgets = {"flops": [float(algo.subnet_cost(subnet).multiply_adds) for subnet in uniform.values()]}
    common: dict[str, Any] = {"calibration": calibration, "metric": minus_loss, "progress": False}
    found = {
        "greedy": fastslim.search.greedy(algo, images, budgets, **common),
        "evolution": fastslim.search.evolution(algo, images, budgets, seed=config.seed, **common),
    }
    rows = []
    for ratio, budget in zip(UNIFORM, budgets["flops"], strict=True):
        for method in METHODS:
            subnet = uniform[ratio] if method == "uniform" else dict(found[method].best("flops", budget))
            held_out = make_loader(everything.val, 512, shuffle=False)
            result = evaluate_named(algo, held_out, {method: subnet}, calibration=calibration)[0]
            algo.set_subnet(subnet)
            network = fastslim.export_subnet(algo, subnet)
            after = retrained(again, everything, network)
            rows.append(
                {
                    "seed": config.seed,
                    "budget": ratio,
                    "method": method,
                    "multiply_adds": result.multiply_adds,
                    "parameters": result.parameters,
                    "before": result.accuracy,
                    "after": after,
                    "subnet": subnet,
                }
            )
            print(f"seed {config.seed}  {ratio:.2f}x  {method:9}  {result.accuracy:.4f}  {after:.4f}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """All seeds as markdown."""
    lines = [
        "| budget: multiply-adds of | widths | multiply-adds | parameters | in the supernet, % | retrained, % |",
        "|---|---|---|---|---|---|",
    ]
    for budget in UNIFORM:
        for method in METHODS:
            own = [row for row in rows if row["budget"] == budget and row["method"] == method]
            costs = [format_count(sum(row[name] for row in own) / len(own)) for name in ("multiply_adds", "parameters")]
            accuracies = [mean_and_range([row[name] for row in own]) for name in ("before", "after")]
            lines.append(f"| {budget:.2f}x | {method} | {' | '.join([*costs, *accuracies])} |")
    return "\n".join(lines)


def main() -> None:
    """Trains, searches and retrains everything, and writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=60, help="of the supernet")
    parser.add_argument("--retrain-epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    eighths = tuple(i / 8 for i in range(2, 9))
    config = load_config(
        "digits",
        tensorboard=False,
        epochs=arguments.epochs,
        eval_every=arguments.epochs,
        choices=eighths,
        search_share=0.1,
    )
    again = config.replace(epochs=arguments.retrain_epochs, lr=0.02, search_share=0.0)
    started = time.perf_counter()
    where = machine()
    rows = [row for seed in arguments.seeds for row in run_seed(config.replace(seed=seed), again.replace(seed=seed))]
    minutes = (time.perf_counter() - started) / 60
    caption = (
        f"{config.model} x{config.width_mult:g} on {config.data}, supernet {config.epochs} epochs, retraining "
        f"{again.epochs}, seeds {arguments.seeds}; mean (lowest to highest) of the accuracy on the held-out images. "
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit']}, "
        f"{minutes:.0f} minutes."
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"rows": rows, "machine": where, "config": config.as_dict(), "retraining": again.as_dict()}
    write_atomically(arguments.out / "search_digits.json", json.dumps(result, indent=1) + "\n")
    write_atomically(arguments.out / "search_digits.md", f"{table(rows)}\n\n{caption}\n")
    print(f"\n{table(rows)}\n\n{caption}")


if __name__ == "__main__":
    main()
