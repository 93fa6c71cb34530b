"""SIGKILL and Ctrl-C at random moments of trainings, searches and retrainings: all go on to the same result."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_server import CommandServer
from tiny_run_source import FLAGS, MODULE

from fastslim.engine.checkpoint import load_checkpoint
from fastslim.export import load_subnet

KILLS = 5
SEARCH = ["search", "run", "--budget", "flops=0.5,0.1", "--budget", "parameters=0.3", "--score", "loss"]
EVOLUTION = [*SEARCH, "--method", "evolution", "--population-size", "8", "--generations", "4", "--top-k", "3"]
RETRAIN = ["retrain", "run", "--subnet", "width-0.5", "--epochs", "12", "--distill", "--ema-decay", "0.9"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    """A server in a folder with a trained run."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "tiny_run.py").write_text(MODULE)
    with CommandServer(folder) as server:
        code, _ = server.run(["train", "--run", "run", *FLAGS])
        assert code == 0, server.output()
        yield server


def killed_often(server: CommandServer, words: list[str], result: Path, seed: int) -> int:
    """Kills a command at random moments until it is done; how often it was killed."""
    chance = random.Random(seed)
    code, seconds = server.run(words)
    assert code == 0, server.output()
    shutil.move(result, result.with_name("whole"))
    kills = 0
    for _ in range(KILLS):
        code, _ = server.run(go_on(words, result), signal=signal.SIGKILL, after=chance.uniform(0, 0.6 * seconds))
        assert code in (0, -signal.SIGKILL), server.output()
        kills += code != 0
    code, _ = server.run(go_on(words, result))
    assert code == 0, server.output()
    return kills


def go_on(words: list[str], result: Path) -> list[str]:
    """The command that continues; a training that has saved nothing yet begins."""
    return words if words[0] == "train" and not (result / "last.pt").exists() else [*words, "--resume"]


@pytest.mark.parametrize("words", [SEARCH, EVOLUTION], ids=["greedy", "evolution"])
def test_killed_search_ends_with_the_same_result(server: CommandServer, words: list[str]) -> None:
    folder = server.folder / "run" / "search"
    whole = folder.with_name("whole")
    try:
        assert killed_often(server, words, folder, seed=len(words)) >= 2
        for name in ("report.json", "results.json"):
            assert json.loads((folder / name).read_text()) == json.loads((whole / name).read_text())
        lines = [(path / "evaluated.jsonl").read_text().splitlines() for path in (folder, whole)]
        assert sorted(lines[0]) == sorted(lines[1])
        assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    finally:
        for left in (folder, whole):
            shutil.rmtree(left, ignore_errors=True)


def test_killed_retraining_ends_with_the_same_result(server: CommandServer) -> None:
    folder = server.folder / "run" / "retrain" / "width-0.5"
    whole = folder.with_name("whole")
    assert killed_often(server, RETRAIN, folder, seed=1) >= 2
    assert_same_training(folder, whole, ("model", "average"))
    ours, theirs = (load_subnet(path / "subnet").state_dict() for path in (folder, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_killed_training_ends_with_the_same_result(server: CommandServer) -> None:
    folder = server.folder / "another"
    words = ["train", "--run", "another", *FLAGS, "--epochs", "20", "--eval-every", "5", "--ema-decay", "0.9"]
    assert killed_often(server, words, folder, seed=2) >= 2
    assert_same_training(folder, folder.with_name("whole"), ("model", "average"))


def assert_same_training(folder: Path, whole: Path, weights: tuple[str, ...]) -> None:
    """Results, weights and metrics of two trainings are the same, but for their time."""
    results = [json.loads((path / "results.json").read_text()) for path in (folder, whole)]
    for result in results:
        result.pop("training_seconds")
    assert results[0] == results[1]
    for name in weights:
        ours, theirs = (load_checkpoint(path / "last.pt")[name] for path in (folder, whole))
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in theirs)
    records: list[list[dict[str, Any]]] = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (folder, whole)
    ]
    for record in (record for one in records for record in one):
        record.pop("images_per_second", None)
    assert records[0] == records[1]
    assert not [path for path in folder.rglob("*.tmp")]


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.is_file() else 0


@pytest.mark.parametrize(
    ("words", "grows", "done"),
    [
        ([*EVOLUTION, "--generations", "20"], "search/evaluated.jsonl",
         "stopped, what is evaluated is kept; go on with: fastslim search run --resume"),
        ([*RETRAIN, "--name", "again", "--epochs", "3000"], "retrain/again/metrics.jsonl",
         "complete epochs, everything is saved; go on with: fastslim retrain run --name again --resume"),
    ],
    ids=["search", "retrain"],
)  # fmt: skip
def test_ctrl_c_keeps_everything_and_says_how_to_go_on(
    server: CommandServer, words: list[str], grows: str, done: str
) -> None:
    file = server.folder / "run" / grows
    code, _ = server.run(words, signal=signal.SIGINT, when=lambda: lines_of(file) > 3)
    assert code == 130, server.output()
    assert done in server.output() and "Traceback" not in server.output()
    assert lines_of(file) > 3
    refused, _ = server.run(words)
    assert refused == 2 and "continue it with --resume" in server.output()
    if words[0] == "search":
        code, _ = server.run(["search", "run", "--resume"])
        assert code == 0 and json.loads((server.folder / "run/search/results.json").read_text())["finished"]
