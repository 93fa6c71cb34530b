"""`fastslim export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastslim.cli.options import config_option, option_flags, options_from, overwrite_option, run_argument
from fastslim.engine.stage_options import ExportOptions

EXAMPLES = """\b
Examples:
  fastslim export runs/demo --format subnet,pt2,onnx
      every subnet that `fastslim search` found, into runs/demo/export
  fastslim export runs/demo --subnet flops-0.5 --format onnx --out product
  fastslim export runs/demo --subnet retrain/flops-0.5 --format onnx --out product
      the network that `fastslim retrain` has trained; a path of a file works, too
  fastslim export runs/demo --width 0.25,0.5,1 --format slimmable --out product
      one file that switches between three uniform widths while it runs
"""


@click.command("export", epilog=EXAMPLES, short_help="Write subnets as files for PyTorch, ONNX and others.")
@run_argument
@config_option
@overwrite_option
@option_flags(ExportOptions)
def export_command(run: Path, config: Path | None, overwrite: bool, **flags: Any) -> None:
    """Write subnets of the supernet in the folder RUN as files, and compare each with the supernet on real images.

    The folder of the files also gets export.json: sizes, differences, accuracies.
    """
    from fastslim.engine.export_run import export_run, format_files

    outcome = export_run(run, options_from(ExportOptions, config, flags), overwrite=overwrite)
    if outcome.status == "finished before":
        click.echo(f"{outcome.folder} holds this export already; --overwrite writes it again\n")
    click.echo(format_files(outcome))
    click.echo(f"\nall of it: {outcome.folder}")
