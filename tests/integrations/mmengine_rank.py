"""One of two processes that train together on the CPU: ``mmengine_rank.py RANK PORT FOLDER``; leaves results there."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine_toys import DISTILLER, MUTATOR, ModeToy, PlainToy, batch, make, start

import fastslim
from fastslim.integrations.mmengine import AutoSlimDDP, SlimmableNetwork, SlimmableNetworkDDP

STEPS, SGD = 4, dict(type="SGD", lr=0.05, momentum=0.9)


def spoil(algo: torch.nn.Module, rank: int) -> None:
    """The second process starts from other weights, statistics and random widths; none of them may matter."""
    if rank:
        with torch.no_grad():
            for tensor in (*algo.parameters(), *algo.buffers()):
                tensor.add_(1)
        algo.mutator.rng.seed(1234)


def record_widths(algo: Any) -> list[Any]:
    drawn, draw = [], algo.sample_subnet

    def recorded() -> dict[str, int]:
        drawn.append(draw())
        return drawn[-1]

    algo.__dict__["sample_subnet"] = recorded
    return drawn


def wrapped(rank: int, counts: int) -> dict[str, Any]:
    algo, _ = make(ModeToy, distiller=DISTILLER)
    spoil(algo, rank)
    model = AutoSlimDDP(module=algo, find_unused_parameters=True, device_ids=[rank])
    assert not model._optim_wrapper_count_status_reinitialized
    drawn = record_widths(algo)
    wrapper = build_optim_wrapper(model, dict(optimizer=SGD, accumulative_counts=counts))
    for step in range(STEPS):
        losses = model.train_step(batch(seed=2 * step + rank), optim_wrapper=wrapper)
    assert model._optim_wrapper_count_status_reinitialized
    assert algo._optim_wrapper_count_status_reinitialized
    return dict(state=algo.architecture.state_dict(), widths=drawn, losses=losses)


def plain_torch(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    algo = fastslim.AutoSlim(
        architecture=PlainToy().double(), example_inputs=torch.zeros(1, 1, 8, 8).double(), divisor=2, seed=1
    )
    spoil(algo, rank)
    algo.distribute()
    drawn = record_widths(algo)
    start_state = {key: value.clone() for key, value in algo.architecture.state_dict().items()}
    optimizer = torch.optim.SGD(algo.parameters(), 0.05, 0.9)
    for step in range(STEPS):
        data = batch(seed=2 * step + rank)
        algo.train_step((data["inputs"], data["data_samples"]), optimizer)
    return dict(start=start_state, state=algo.architecture.state_dict(), widths=drawn)


def slimmable(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    unit = dict(type="SlimmableChannelUnit", default_args=dict(candidate_choices=[0.5, 1.0], choice_mode="ratio"))
    mutator = dict(type="SlimmableChannelMutator", channel_unit_cfg=unit, parse_cfg=MUTATOR["parse_cfg"])
    algo = SlimmableNetwork(ModeToy(), mutator)
    spoil(algo, rank)
    model = SlimmableNetworkDDP(algo)
    wrapper = build_optim_wrapper(model, dict(optimizer=SGD, accumulative_counts=2))
    model.train_step(batch(torch.float32, seed=rank), optim_wrapper=wrapper)
    return dict(state=algo.architecture.state_dict())


def plain_wrapper(rank: int) -> str:
    model = MMDistributedDataParallel(make(ModeToy, distiller=DISTILLER)[0], device_ids=None)
    wrapper = build_optim_wrapper(model, dict(optimizer=SGD))
    try:
        model.train_step(batch(seed=rank), optim_wrapper=wrapper)
    except fastslim.FastslimError as error:
        return str(error)
    return "trained"


def runner(rank: int, folder: Path) -> dict[str, Any]:
    from test_mmengine_runner import config

    settings = config(launcher="pytorch", model_wrapper_cfg=dict(type="fastslim.AutoSlimDDP", broadcast_buffers=False))
    settings.train_cfg.update(max_epochs=2, val_begin=99)
    settings.default_hooks.checkpoint.interval = 2
    settings.test_cfg = dict(type="fastslim.AutoSlimGreedySearchLoop", target_flops=0.03)
    one = start(settings, folder / "run", "ranks")
    drawn = record_widths(one.model.module)
    one.train()
    return dict(
        model=type(one.model).__name__,
        parameters=dict(one.model.module.named_parameters()),
        widths=drawn,
        metrics=one.val_loop.run(),
        scores=one.test(),
        found=one.test_loop.searched_subnet,
    )


def main() -> None:
    rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    results = dict(
        {f"wrapped {counts}": wrapped(rank, counts) for counts in (1, 4, 8)},
        plain=plain_torch(rank),
        slimmable=slimmable(rank),
        refused=plain_wrapper(rank),
        runner=runner(rank, folder),
    )
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
