"""`fastslim retrain`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from fastslim.cli.options import (
    STOPPED_BY_SIGNAL,
    config_option,
    given,
    option_flags,
    overwrite_option,
    resume_option,
    run_argument,
    show,
    values_from,
)
from fastslim.engine.config import TrainConfig
from fastslim.engine.stage_options import OF_THE_SUPERNET, RetrainConfig

EXAMPLES = """\b
Examples:
  fastslim retrain runs/demo --subnet flops-0.5 --epochs 20 --lr 0.02
      go on with the supernet's weights; what is not given is as in the run
  fastslim retrain runs/demo --subnet flops-0.5 --from-scratch --name scratch
      as the paper does, with the run's own epochs and learning rate
  fastslim retrain runs/demo --subnet width-0.5 --distill
      learn the predictions of the full width instead of the labels;
      --student-loss ce+kd learns both
  fastslim retrain runs/demo --name flops-0.5 --resume
      go on after Ctrl-C, a crash or a power cut, as if nothing had happened
"""


def default_of(entry: dataclasses.Field[Any]) -> str:
    """What the help says about a default."""
    own = {field.name for field in dataclasses.fields(RetrainConfig)} - {
        f.name for f in dataclasses.fields(TrainConfig)
    }
    return show(RetrainConfig.default(entry)) if entry.name in own else "the run's"


@click.command("retrain", epilog=EXAMPLES, short_help="Train a subnet by itself.")
@run_argument
@config_option
@click.option("--name", help="Of the folder in RUN/retrain. [the subnet's]")
@resume_option
@overwrite_option
@click.option("--from-scratch", "start", flag_value="scratch", help="Begin with random weights.")
@click.option("--from-supernet", "start", flag_value="supernet", help="Begin with the supernet's weights. [default]")
@option_flags(RetrainConfig, without=(*OF_THE_SUPERNET, "start"), default=default_of)
def retrain_command(
    run: Path, config: Path | None, name: str | None, resume: bool, overwrite: bool, **flags: Any
) -> None:
    """Train a subnet of the supernet in the folder RUN by itself, on all training images.

    RUN/retrain/NAME gets what a run's folder has, accuracy before and after in results.json, and the network in
    subnet/. Options that are not given are those of the run.
    """
    from fastslim.engine.evaluate import format_evaluations
    from fastslim.engine.retrain import default_name, retrain, retrain_folder, retrain_options

    values, source = values_from(config, flags)
    if resume and config is None:
        saved = retrain_folder(run, name or default_name(run, str(values.get("subnet", "")))).saved_config()
        values = {**saved.as_dict(), **given(flags)} if saved else values
    options = retrain_options(run, values, source)
    name = name or default_name(run, options.subnet)
    again = f"fastslim retrain {shlex.quote(str(run))} --name {shlex.quote(name)} --resume"
    try:
        result = retrain(run, options, name=name, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:  # before the training, or the second one
        begun = retrain_folder(run, name).last.is_file()
        go_on = f", the last checkpoint is kept; go on with: {again}" if begun else " before the training began"
        click.echo(f"\nstopped{go_on}")
        sys.exit(STOPPED_BY_SIGNAL)
    if result.status == "stopped":
        click.echo(f"stopped after {result.epoch} complete epochs, everything is saved; go on with: {again}")
        sys.exit(STOPPED_BY_SIGNAL)
    if result.status == "finished before":
        click.echo(f"{result.folder.path} is finished and was trained with these options; --overwrite trains it again")
    assert result.after is not None
    rows = [dataclasses.replace(result.before, name="before"), dataclasses.replace(result.after, name="retrained")]
    table = format_evaluations(rows, name, result.full.multiply_adds)
    click.echo(f"\n{table}\n\nthe network: {result.saved}")
