"""One of the processes that search together on the CPU: ``search_rank.py RANK SIZE FILE FOLDER CASE``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import search_cases as cases
import torch
import torch.distributed as dist

from fastslim.search import evolution, greedy

BUDGETS = {"flops": [0.6, 0.2], "parameters": 0.3}
EVOLUTION = {"population_size": 10, "generations": 3, "top_k": 3}


def main(rank: int, size: int, file: str, folder: Path, case: str) -> None:
    """Searches, and leaves the report, what it evaluated itself, or the error."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    calls: list[tuple[int, ...]] = []
    data = cases.toy_data(seed=rank if case == "other data" else 1)

    def metric(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(algo.mutator.current_choices.values()))
        if case == "failing" and rank == 1 and len(calls) == 9:
            raise ArithmeticError("the second process fails")
        if case == "interrupted" and len(calls) == 15:
            raise KeyboardInterrupt
        return (output.argmax(1) == targets).float()

    algo = cases.toy_algo()
    method = {"evolution": evolution}.get(case, greedy)
    options = EVOLUTION if case == "evolution" else {}
    # Each process has a folder of its own; only the first one may write.
    run = folder / f"run{rank}"
    result: dict[str, object] = {}
    try:
        report = method(algo, data, BUDGETS, metric=metric, run=run, resume=True, progress=False, **options)
        result["report"] = report.as_dict()
    except (Exception, KeyboardInterrupt) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["calls"] = len(calls)
    (folder / f"{case}-{rank}.json").write_text(json.dumps(result))
    # Without a farewell: gloo's threads end a process with an error where another one has gone already.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5])
