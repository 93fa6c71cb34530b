"""`fastslim report`."""

from __future__ import annotations

from pathlib import Path

import click

from fastslim.cli.options import run_argument

EXAMPLES = """\b
Examples:
  fastslim report runs/demo      and open the page it names in a browser
"""


@click.command("report", epilog=EXAMPLES, short_help="Gather all that came of a run in one page.")
@run_argument
def report_command(run: Path) -> None:
    """Write a page (HTML, without links to elsewhere) about all that is in the folder RUN so far.

    It shows training, search, exports and retraining, whichever there are.
    """
    from fastslim.engine.report import make_report

    click.echo(f"report: {make_report(run)}")
