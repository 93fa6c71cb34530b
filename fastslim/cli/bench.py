"""`fastslim bench`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fastslim.cli.network import network_options

if TYPE_CHECKING:
    from fastslim.bench import Task

EXAMPLES = """\b
Examples:
  fastslim bench resnet18 --batch 16 --pixels 112
  fastslim bench mobilenet_v2 --dtype bf16 --random 4 --json bench.json
  fastslim bench my_net:build --kwargs depth=4 --input-shape 32,3,64,64
      build(depth=4) of my_net.py in this folder returns the torch.nn.Module,
      which returns logits (N, classes, ...)
  fastslim bench my_net:build --inputs my_net:batch --exclude 'encoder.*'
      batch() returns what forward is called with, a whole batch of it
  fastslim bench --pairs 40 digits
      a file as `fastslim train --config` takes it, or one that is shipped

\b
How to read it:
  A step trains several networks: the full width, the narrowest and random
  ones. Multiply-adds say how much more arithmetic that is than a plain step
  of the full width; a time below them means that passes share work or that
  kernels are faster than torch's. Random widths are new in every step, as in
  a training. Close other programs: quartiles far apart mean a busy machine.
"""


@click.command("bench", epilog=EXAMPLES, short_help="Measure a sandwich step of a network against a plain one.")
@click.argument("network", metavar="MODEL|MODULE:FUNCTION|CONFIG")
@click.option("--dtype", type=click.Choice(("fp32", "bf16")), help="What steps compute in. [fp32, or the config's]")
@click.option("--batch", type=click.IntRange(min=2), help="Images a batch. [16, or the config's]")
@click.option("--pixels", type=click.IntRange(min=1), help="Of a side of the images. [112, or the config's data's]")
@click.option(
    "--pairs", type=click.IntRange(min=1), default=20, show_default=True, help="How often the two take turns."
)
@click.option("--random", type=click.IntRange(min=0), help="Random subnets, besides max and min. [2, or the config's]")
@click.option("--json", "json_file", metavar="FILE", help="Write the numbers as JSON to FILE as well.")
@network_options
def bench_command(network: str, pairs: int, json_file: str | None, **options: Any) -> None:
    """Measure what a sandwich step of a network costs, in plain steps of the same network.

    NETWORK is one of fastslim's, a function that returns a torch.nn.Module, or a configuration of `fastslim train`.
    The two steps take turns on random images, on the CPU; the plain step runs in NCHW and in channels_last, and the
    faster one counts. Before, the step is compared with the plain loop (fastslim.verify); a step that is not exact is
    not timed.
    """
    # torch's profiler, which memory is measured with, else writes lines about itself.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from fastslim.bench import machine, measure_step
    from fastslim.cli.bench_task import make_task
    from fastslim.cost.progress import showing
    from fastslim.engine.stage_folder import origin
    from fastslim.files import write_atomically

    where = {**machine(), "fastslim": origin()["versions"]["fastslim"]}
    if click.get_current_context().get_parameter_source("divisor") is ParameterSource.DEFAULT:
        options["divisor"] = None  # the config's
    task = make_task(network, **options)
    passes = f"max + min + {task.algo.num_samples} random subnets"
    what = f"{network}, {describe(task)}, {passes}"
    with showing(True, "fastslim bench") as show:
        report = measure_step(task, pairs, show)
    versions = ", ".join(f"{name} {where[name]}" for name in ("fastslim", "torch", "python", "commit"))
    click.echo(f"{what}\n{where['cpu']}\n{versions}\nexact: equal to the plain loop (fastslim.verify)\n\n{report}")
    if json_file is not None:
        result = {"machine": where, "what": what, **report.as_dict()}
        write_atomically(Path(json_file), json.dumps(result, indent=1) + "\n")


def describe(task: Task) -> str:
    """Precision and sizes."""
    from fastslim.bench import each_tensor

    shapes: list[str] = []
    each_tensor(task.inputs, lambda value: shapes.append("x".join(map(str, value.shape))))
    return f"{str(task.dtype).removeprefix('torch.')}, {', '.join(shapes)}"
