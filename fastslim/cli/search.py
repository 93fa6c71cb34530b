"""`fastslim search`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from fastslim.cli.options import (
    STOPPED_BY_SIGNAL,
    config_option,
    option_flags,
    options_from,
    overwrite_option,
    resume_option,
    run_argument,
)
from fastslim.engine.stage_options import SearchOptions

EXAMPLES = """\b
Examples:
  fastslim search runs/demo --budget flops=0.5,0.25
      the best widths with a half and with a quarter of the multiply-adds
  fastslim search runs/demo --budget flops=0.5 --budget parameters=300000
      up to 1 a budget is a part of the full cost, above it an absolute one
  fastslim search runs/demo --config search.yaml
      a file with the options above as keys, such as budget: {flops: [0.5, 0.25]}
  fastslim search runs/demo --resume
      go on after Ctrl-C, a crash or a power cut, to the same result
"""


@click.command("search", epilog=EXAMPLES, short_help="Find the best widths of a trained supernet for a budget.")
@run_argument
@config_option
@resume_option
@overwrite_option
@option_flags(SearchOptions)
def search_command(run: Path, config: Path | None, resume: bool, overwrite: bool, **flags: Any) -> None:
    """Find the best widths of the supernet in the folder RUN for one or several budgets.

    Subnets are compared on training images that the run left out for it (train with --search-share), or on those it
    was trained with; never on the held-out ones, which the table at the end is measured on. RUN/search gets
    evaluated.jsonl, state.json, report.json and results.json.
    """
    from fastslim.engine.search_outcome import format_outcome
    from fastslim.engine.search_run import search_folder, search_run

    saved = search_folder(run).saved_options(SearchOptions) if resume else None
    options = options_from(SearchOptions, config, flags, saved)
    try:
        outcome = search_run(run, options, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        if search_folder(run).read() is None:
            click.echo("\nstopped before the search began; the same command begins again")
        else:
            again = f"fastslim search {shlex.quote(str(run))} --resume"
            click.echo(f"\nstopped, what is evaluated is kept; go on with: {again}")
        sys.exit(STOPPED_BY_SIGNAL)
    if outcome.status == "finished before":
        click.echo(f"{outcome.folder} is finished and was searched with these options; --overwrite searches again\n")
    else:
        click.echo(f"\ncompared on {outcome.scored_on}; accuracy on the held-out images, calibrated:\n")
    click.echo(format_outcome(outcome))
    click.echo(f"\nall of it: {outcome.folder}")
