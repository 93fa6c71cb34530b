"""The command group: its subcommands, and how errors are shown."""

from __future__ import annotations

from typing import Any

import click

from fastslim.cli.bench import bench_command
from fastslim.cli.convert import convert_command
from fastslim.cli.eval import eval_command
from fastslim.cli.export import export_command
from fastslim.cli.info import info_command
from fastslim.cli.options import STOPPED_BY_SIGNAL
from fastslim.cli.report import report_command
from fastslim.cli.retrain import retrain_command
from fastslim.cli.search import search_command
from fastslim.cli.train import train_command
from fastslim.errors import FastslimError

EXAMPLES = """\b
Examples:
  fastslim train --config digits --run runs/demo    train the embedded demo
  fastslim search runs/demo --budget flops=0.5      the best widths for a budget
  fastslim export runs/demo --format onnx           what was found, as files
  fastslim retrain runs/demo --subnet flops-0.5     train it by itself
  fastslim report runs/demo                         all of it in one page
  fastslim eval runs/demo                           evaluate the supernet again
  fastslim convert fastslim.models:resnet18 --input-shape 1,3,224,224
                                                    how a network becomes slimmable
  fastslim bench resnet18                           what a step costs on this machine
  fastslim info                                     what is built and usable here
"""


class FriendlyGroup(click.Group):
    """Shows errors that fastslim raises on purpose as one red line and exits with 2; with 130 after Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a subcommand."""
        try:
            return super().invoke(ctx)
        except FastslimError as error:
            if ctx.params.get("debug"):
                raise
            click.secho(f"error: {' '.join(str(error).split())}", fg="red", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("\nstopped; the same command begins again", err=True)
            ctx.exit(STOPPED_BY_SIGNAL)


@click.group(cls=FriendlyGroup, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastslim")
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
def fastslim(debug: bool) -> None:
    """Train one network that runs at any width, and take small networks from it."""


for command in (
    train_command,
    search_command,
    export_command,
    retrain_command,
    eval_command,
    report_command,
    convert_command,
    bench_command,
    info_command,
):
    fastslim.add_command(command)
