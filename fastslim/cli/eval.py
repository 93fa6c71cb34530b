"""`fastslim eval`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastslim.cli.options import Listed

EXAMPLES = """\b
Examples:
  fastslim eval runs/demo
  fastslim eval runs/demo --widths 0.25,0.5,1 --checkpoint best
  fastslim eval runs/demo --no-calibrate     see why narrow widths need calibration
"""


@click.command("eval", epilog=EXAMPLES, short_help="Evaluate a trained supernet at several widths.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--widths", type=Listed(), help="Ratios of the full width. [those of the run]")
@click.option("--checkpoint", type=click.Choice(["last", "best"]), default="last", show_default=True)
@click.option("--calibrate/--no-calibrate", default=True, help="Compute BN statistics for each width first. [true]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def eval_command(
    run: Path, widths: list[str] | None, checkpoint: str, calibrate: bool, device: str, as_json: bool
) -> None:
    """Evaluate the supernet in the folder RUN on its held-out data."""
    from fastslim.engine.evaluate import format_table
    from fastslim.engine.run import evaluate_run
    from fastslim.errors import FastslimValueError

    try:
        ratios = [float(width) for width in widths] if widths else None
    except ValueError as error:
        raise FastslimValueError(f"--widths takes numbers with commas between them: {error}") from error
    results = evaluate_run(run, widths=ratios, checkpoint=checkpoint, calibrate=calibrate, device=device)
    click.echo(json.dumps([row.as_dict() for row in results]) if as_json else format_table(results))
