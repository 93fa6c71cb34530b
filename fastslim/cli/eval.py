"""`fastslim eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fastslim.cli.options import config_option, option_flags, options_from, run_argument
from fastslim.engine.stage_options import EvalOptions

EXAMPLES = """\b
Examples:
  fastslim eval runs/demo
  fastslim eval runs/demo --widths 0.25,0.5,1 --checkpoint best
  fastslim eval runs/demo --no-calibrate     see why narrow widths need calibration
  fastslim eval runs/demo --subnet flops-0.5,retrain/flops-0.5
      what `fastslim search` found, and the same after `fastslim retrain`;
      a file counts with its own weights
"""


@click.command("eval", epilog=EXAMPLES, short_help="Evaluate a trained supernet, or subnets of it.")
@run_argument
@config_option
@option_flags(EvalOptions)
def eval_command(run: Path, config: Path | None, **flags: Any) -> None:
    """Evaluate the supernet in the folder RUN on its held-out data, at uniform widths or at given subnets."""
    from fastslim.engine.evaluate import format_evaluations, format_table
    from fastslim.engine.run import evaluate_run, evaluate_run_subnets

    options = options_from(EvalOptions, config, flags)
    how: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "calibrate": options.calibrate,
        "device": options.device,
    }
    if options.subnet:
        rows = evaluate_run_subnets(run, options.subnet, **how)
        table = format_evaluations(rows, "subnet", rows[0].multiply_adds)
        values = [row.as_dict() for row in rows]
    else:
        widths = evaluate_run(run, widths=list(options.widths) or None, **how)
        table, values = format_table(widths), [row.as_dict() for row in widths]
    click.echo(json.dumps(values) if options.json else table)
