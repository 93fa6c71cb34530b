"""The whole sandwich step of ResNet-50 and MobileNetV2 against its rivals, once it is proved to be right.

python benchmarks/gpu/step.py [--dry-run] [--seconds 500] [--only NETWORK] [--batches 64,128,256]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import rivals
import torch
from contest import COLUMNS, compare
from results import Stage
from rivals import Step, Workload

import fastslim


def contenders(load: Workload, algo: fastslim.AutoSlim, randoms: list[Any]) -> dict[str, Callable[[], Step]]:
    """All sides but the compiled one; on a CPU there are no graphs and streams."""
    own = partial(rivals.ours, load, algo, randoms)
    options = {
        "ours, graphs": partial(own, cuda_graphs=True),
        "ours, graphs, streams": partial(own, cuda_graphs=True, overlap_students=True),
    }
    return {
        "ours": own,
        "plain": partial(rivals.plain, load),
        "slices": partial(rivals.slices, load),
        "masks": partial(rivals.slices, load, rivals.Masks),
        **(options if load.batches[0][0].is_cuda else {}),
    }


def check(load: Workload, algo: fastslim.AutoSlim) -> str | None:
    """What :func:`fastslim.verify` objects to, or None."""
    images, labels = load.batches[0]
    with load.autocast():
        report = fastslim.verify(copy.deepcopy(algo), (images[:8, :, :64, :64], labels[:8]))
    return None if report else str(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, help="the result file to add to")
    parser.add_argument("--dry-run", action="store_true", help="narrow networks, small images, on the CPU")
    parser.add_argument("--seconds", type=float, default=500, help="for everything")
    parser.add_argument("--only", default="", help="the network")
    parser.add_argument("--batches", default="64,128,256")
    options = parser.parse_args()
    dry = options.dry_run
    device, dtype = torch.device("cpu" if dry else "cuda"), torch.bfloat16
    names = [name for name in rivals.FORWARDS if options.only in name]
    batches = [8] if dry else [int(batch) for batch in options.batches.split(",")]
    stage = Stage(options.result, "step")
    stage.note("bf16 autocast, channels_last, cudnn.benchmark off; SGD; a step is max + min + 2 random subnets")
    if dry:
        stage.note("torch.compile is not rehearsed: it takes minutes on a CPU")
    start, wrong, failed = time.monotonic(), [], []
    networks: dict[str, rivals.Compiled | None] = {}
    cells = [(name, batch) for batch in batches for name in names]
    for index, (name, batch) in enumerate(cells):
        remaining = options.seconds - (time.monotonic() - start)
        share = remaining / (len(cells) - index)
        if remaining < 10 and not dry:
            stage.note(f"left out, the stage's time was up: {name} at N = {batch}")
            continue
        try:
            load, algo, randoms = rivals.prepare(
                name, batch, 64 if dry else 224, device, dtype, 0.25 if dry else 1.0, 4 if dry else 8
            )
            if index < len(names) and (problem := check(load, algo)):
                wrong.append(name)
                stage.note(f"{name}: no speed of a wrong step\n{problem}")
            if name in wrong:
                continue
            sides, caps = contenders(load, algo, randoms), {}
            if not dry and name not in networks:
                networks[name] = rivals.Compiled(load.model)
            if compiled := networks.get(name):  # once compiled, it takes any batch size
                sides["compiled"] = partial(compiled.step, load)
                caps["compiled"] = (0.3 if index < len(names) else 0.05) * options.seconds
            rows, numbers, problems = compare(sides, device, 0.3 * share, caps)
            if "compiled" in sides and "compiled" not in numbers:
                networks[name] = None  # it will not come up later either
        except Exception as error:  # one cell's failure leaves the others
            failed.append(f"{name} at N = {batch}")
            stage.note(f"{name} at N = {batch} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
            continue
        finally:
            load = algo = sides = None
        stage.table(f"{name}, N = {batch}", COLUMNS, rows)
        stage.data(f"{name}, N = {batch}", numbers)
        for problem in problems:
            stage.note(f"{name}, N = {batch}: {problem}")
    if wrong or failed:
        raise SystemExit(f"failed: {', '.join([*wrong, *failed])}")


if __name__ == "__main__":
    main()
