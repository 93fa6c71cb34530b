"""`fastslim train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from fastslim.cli.options import STOPPED_BY_SIGNAL, option_flags
from fastslim.engine.config import TrainConfig

EXAMPLES = """\b
Examples:
  fastslim train --config digits --run runs/demo
      handwritten digits, a few minutes on two CPU cores; --config also takes
      a YAML file of your own, with the options above as keys
  fastslim train --data folder --data-root photos --model mobilenet_v2 --run runs/photos
      your own images, in photos/train/CLASS/ and photos/val/CLASS/
  fastslim train --data my_data:load --model my_net:build --run runs/mine
      my_data.load() returns (train, val) datasets of (image, label),
      my_net.build(num_classes=...) a torch.nn.Module
  fastslim train --run runs/photos --resume
      go on after Ctrl-C, a crash or a power cut, as if nothing had happened
"""


@click.command("train", epilog=EXAMPLES, short_help="Train a supernet.")
@click.option("--config", "config_name", help="YAML file, or a shipped configuration: digits. Flags override it.")
@click.option("--run", required=True, type=click.Path(path_type=Path), help="Folder for all that comes of the run.")
@click.option("--resume", is_flag=True, help="Go on with the run in that folder.")
@click.option("--overwrite", is_flag=True, help="Replace the run in that folder.")
@option_flags(TrainConfig)
def train_command(config_name: str | None, run: Path, resume: bool, overwrite: bool, **flags: Any) -> None:
    """Train one network at many widths, then evaluate and draw accuracy against cost.

    Each step trains the full width, the narrowest and random ones on the same images (the sandwich rule). The run
    folder gets config.yaml, metrics.jsonl, last.pt, best.pt, results.json, report.png and curves.png.
    """
    from fastslim.engine.evaluate import format_table
    from fastslim.engine.run import train

    config = choose_config(config_name, run, resume, {key: value for key, value in flags.items() if value is not None})
    result = train(config, run, resume=resume, overwrite=overwrite)
    if result.status == "stopped":
        again = f"fastslim train --run {shlex.quote(str(run))} --resume"
        click.echo(f"stopped after {result.epoch} complete epochs, everything is saved; go on with: {again}")
        sys.exit(STOPPED_BY_SIGNAL)
    if result.status == "finished before":
        click.echo(f"{run} is finished and was trained with these options; --overwrite trains it again\n")
    else:
        click.echo()
    click.echo(format_table(result.widths))
    for picture in result.pictures:
        click.echo(f"\npicture: {picture}", nl=False)
    click.echo("" if result.pictures else "\nno pictures: pip install 'fastslim[cli]' brings matplotlib")


def choose_config(config_name: str | None, run: Path, resume: bool, flags: dict[str, Any]) -> Any:
    """The file's options, or when resuming those of the run, overridden by flags."""
    from fastslim.engine.config import load_config
    from fastslim.engine.run_folder import RunFolder

    if config_name is not None:
        return load_config(config_name, **flags)
    saved = RunFolder(run).saved_config() if resume else None
    return saved.replace(**flags) if saved else TrainConfig.from_mapping(flags, "the flags")
