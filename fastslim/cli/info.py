"""`fastslim info`."""

from __future__ import annotations

import click


@click.command("info", short_help="Show versions, what is built, what is usable and why not.")
def info_command() -> None:
    """Show versions, what is built, what is usable and, where something is not, why."""
    from fastslim.info import describe

    click.echo(describe())
