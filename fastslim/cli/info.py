"""`fastslim info`."""

from __future__ import annotations

from typing import Any

import click

from fastslim.cli.network import network_options

EXAMPLES = """\b
Examples:
  fastslim info
  fastslim info --model fastslim.models:resnet18 --input-shape 1,3,224,224
"""


@click.command("info", epilog=EXAMPLES, short_help="Show what is built and usable, or what a network consists of.")
@click.option("--model", metavar="MODULE:FUNCTION", help="Show this network instead: layers, units, cost, report.")
@network_options
def info_command(model: str | None, **options: Any) -> None:
    """Show versions, what is built, what is usable and, where something is not, why.

    With --model: a network's layers, channel units, parameters and multiply-adds, and what can be slimmed. The other
    options belong to it.
    """
    from fastslim.cli.network import convert_network
    from fastslim.errors import FastslimValueError
    from fastslim.info import describe, describe_costs

    if model is not None:
        report = convert_network(model, **options)
        click.echo(f"{len(report.layers)} layers, {len(report.units)} channel units\n")
        click.echo(f"{describe_costs(report)}\n")
        report.print_tree()
    elif options.pop("divisor") != 8 or any(options.values()):
        raise FastslimValueError("these options describe a network: add --model module:function")
    else:
        click.echo(describe())
