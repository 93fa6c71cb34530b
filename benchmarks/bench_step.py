"""The sandwich step (max + min + 2 random subnets) against a plain full-width step and a hand-written slicing loop.

The slicing loop is tests/plain_loop.py: `torch.nn.functional` on `weight[:o, :i]`, as one would write it.
Each side runs in the memory format, and with the form of torch's SGD, that is faster for it. Random widths are new in
every step, the same for both that have any.
"""

from __future__ import annotations

import copy
import statistics
from functools import partial

import plain_loop
import pytest
from step_task import make_task

from conftest import judged
from fastslim.bench import FORMATS, Side, in_faster_format, in_format, peak_of_training, plain_side, sandwich_side, sgd

FORWARDS = {  # by hand
    "resnet18": partial(plain_loop.resnet18, small_images=False),
    "resnet50": plain_loop.resnet50,
    "mobilenet_v2": partial(plain_loop.mobilenet_v2, small_images=False),
}
CASES = [  # network, dtype, batch, pixels, the largest ratio to the plain step that is wanted
    ("resnet18", "fp32", 16, 112, 1.75),
    ("resnet18", "bf16", 16, 112, None),
    ("resnet50", "fp32", 8, 128, 1.9),
    ("resnet50", "bf16", 8, 128, 1.7),
    ("mobilenet_v2", "fp32", 16, 112, 1.8),
    ("mobilenet_v2", "bf16", 16, 112, 1.3),
    ("resnet18", "fp32", 16, 64, 2.0),  # what is not arithmetic weighs most here
]
PEAK_MEMORY = 1.05


def slicing_loop(task, forward, memory_format):
    """The step by hand, on the task's draws."""
    net, images = in_format(task, task.network, memory_format)
    view, optimizer, choose = plain_loop.Net(net), sgd(net.parameters()), copy.deepcopy(task.algo)
    layers = {n: m for n, m in choose.architecture.named_modules() if hasattr(m, "active_out")}

    def widths(choices):
        choose.set_subnet(choices)
        return {n: layer.active_out for n, layer in layers.items()}

    ends = [widths(choose.mutator.max_choices), widths(choose.mutator.min_choices)]
    draws = task.draws.in_turn()

    def step():
        optimizer.zero_grad()
        random = [widths(next(draws)) for _ in range(task.algo.num_samples)]
        with task.precision():
            plain_loop.sandwich_passes(view, forward, images, task.targets, [*ends, *random])
        optimizer.step()

    return Side(net, step)


@pytest.mark.parametrize(
    ("name", "dtype", "batch", "pixels", "bar"), CASES, ids=["-".join(map(str, case[:4])) for case in CASES]
)
def test_sandwich_step(against, benchmark, name, dtype, batch, pixels, bar):
    task = make_task(name, dtype, batch, pixels)
    makes = partial(sandwich_side, task), partial(plain_side, task), partial(slicing_loop, task, FORWARDS[name])
    sides = [in_faster_format(make) for make in makes]
    bars = {} if bar is None else {"plain_step": bar}
    against(sides[0][0].step, bars, plain_step=sides[1][0].step, slicing_loop=sides[2][0].step)
    formats = [memory_format for _, memory_format in sides]
    del sides
    ours, plain = (peak_of_training(partial(make, FORMATS[f])) for make, f in zip(makes[:2], formats[:2], strict=True))
    benchmark.extra_info["peak memory / plain_step"] = judged(ours / plain, f"{ours / plain:.2f}", PEAK_MEMORY)
    benchmark.extra_info["multiply-adds / plain_step"] = f"{statistics.median(task.draws.multiply_adds()):.2f}"
    benchmark.extra_info["formats"] = "/".join(formats)
