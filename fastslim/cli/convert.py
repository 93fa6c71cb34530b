"""`fastslim convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastslim.cli.network import network_options

EXAMPLES = """\b
Examples:
  fastslim convert fastslim.models:resnet18 --input-shape 1,3,224,224 --report
  fastslim convert my_net:build --kwargs depth=4 --input-shape 1,3,32,32 --choices 0.25,0.5,1
      build(depth=4) of my_net.py in this folder returns the torch.nn.Module
  fastslim convert my_net:build --inputs my_net:example --exclude 'encoder.*' --json report.json
      example() returns what forward is called with
"""


@click.command("convert", epilog=EXAMPLES, short_help="Show how a network becomes slimmable, and what stays full.")
@click.argument("network", metavar="MODULE:FUNCTION")
@network_options
@click.option("--report", is_flag=True, help="Print the report as a tree. [on, unless --json is given]")
@click.option("--json", "json_file", metavar="FILE", help="Write the report as JSON to FILE, or to the screen: -")
def convert_command(network: str, report: bool, json_file: str | None, **options: Any) -> None:
    """Convert the network that MODULE:FUNCTION returns, and report what becomes of each layer.

    The tree shows every layer with its channels, the unit whose width it follows, its part of the multiply-adds,
    and why it stays at full width if it does. Nothing is trained or saved; in Python the same is
    fastslim.convert(model, example_inputs).
    """
    from fastslim.cli.network import convert_network
    from fastslim.files import write_atomically

    found = convert_network(network, **options)
    if json_file is not None and json_file != "-":
        write_atomically(Path(json_file), found.to_json() + "\n")
    if report and json_file == "-":
        click.echo(str(found), err=True)
    elif report or json_file is None:
        found.print_tree()
    if json_file == "-":
        click.echo(found.to_json())
