"""From training to the report on the command line, all of it again, and mistakes on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from tiny_run_source import FLAGS

from fastslim.export import load_subnet

Call = Callable[..., Result]

WAY = (
    ("train", "--run", "run", *FLAGS),
    ("search", "run", "--budget", "flops=0.5,0.25", "--score", "loss"),
    ("export", "run", "--format", "subnet,pt2,onnx,slimmable"),
    ("retrain", "run", "--subnet", "flops-0.5", "--epochs", "2", "--distill"),
    ("retrain", "run", "--subnet", "flops-0.25", "--epochs", "2", "--from-scratch"),
    ("report", "run"),
)


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_whole_way_and_again(home: Path, call: Call) -> None:
    texts = []
    for words in WAY:
        result = call(*words)
        assert result.exit_code == 0, result.output
        texts.append(result.output)
    assert re.search(r"compared on 12 images left out of the training; accuracy on the held-out images", texts[1])
    assert re.search(
        r"\n +subnet +multiply-adds +parameters +cost +accuracy +uniform width +cost +accuracy\n", texts[1]
    )
    assert re.search(r"flops-0\.5 +\S+ k +\S+ k +\d\d\.\d % of flops .* of flops .* %\n", texts[1])
    assert "all of it: run/search" in texts[1]
    assert re.search(r"flops-0\.25\.onnx +\S+ kB +\S+e-\d+ ", texts[2]) and "slimmable.safetensors" in texts[2]
    for text, name in ((texts[3], "flops-0.5"), (texts[4], "flops-0.25")):
        assert re.search(r"before .*\n *retrained .*\n", text) and f"the network: run/retrain/{name}/subnet" in text
    page = Path(texts[5].removeprefix("report: ").strip())
    assert page.is_file() and "flops-0.5" in page.read_text()
    files = {path.relative_to(home / "run").as_posix() for path in (home / "run").rglob("*")}
    assert {
        "search/report.json", "export/flops-0.5/subnet.json", "export/flops-0.25.pt2", "retrain/flops-0.5/results.json",
    } <= files  # fmt: skip

    before = tree(home / "run")
    for words in WAY[:-1]:
        again = call(*words)
        assert again.exit_code == 0 and "--overwrite" in again.output.splitlines()[0], again.output
    assert tree(home / "run") == before

    rows = json.loads(call("eval", "run", "--subnet", "flops-0.5,retrain/flops-0.5", "--json").output)
    assert [row["name"] for row in rows] == ["full", "flops-0.5", "retrain/flops-0.5"]
    assert rows[2]["accuracy"] == load_subnet("run/retrain/flops-0.5/subnet").metrics["accuracy"]
    exported = call("export", "run", "--subnet", "retrain/flops-0.5", "--format", "onnx", "--out", "product")
    assert exported.exit_code == 0 and (home / "product" / "flops-0.5-retrained.onnx").is_file(), exported.output


def test_files_say_the_same_as_flags(run: str, home: Path, call: Call) -> None:
    assert call("search", run, "--budget", "flops=0.5", "--score", "loss", "--images", 8).exit_code == 0
    (home / "search.yaml").write_text("budget: {flops: 0.5}\nscore: accuracy\nimages: 8\n")
    again = call("search", run, "--config", "search.yaml", "--score", "loss")
    assert again.exit_code == 0 and "is finished and was searched with these options" in again.output

    (home / "export.yaml").write_text("width: [0.5]\nformat: [subnet]\nout: product\n")
    assert call("export", run, "--config", "export.yaml").exit_code == 0 and (home / "product" / "width-0.5").is_dir()
    (home / "retrain.yaml").write_text("subnet: width-0.5\nstart: scratch\nepochs: 2\n")
    result = call("retrain", run, "--config", "retrain.yaml", "--lr", "0.01")
    assert result.exit_code == 0, result.output
    saved = yaml.safe_load((home / run / "retrain" / "width-0.5" / "config.yaml").read_text())
    assert (saved["start"], saved["epochs"], saved["lr"], saved["batch_size"]) == ("scratch", 2, 0.01, 12)
    (home / "eval.yaml").write_text("widths: [0.5]\njson: true\n")
    assert [row["width"] for row in json.loads(call("eval", run, "--config", "eval.yaml").output)] == [0.5]


def test_resuming_needs_no_options(run: str, call: Call) -> None:
    assert call("search", run, "--budget", "parameters=0.5").exit_code == 0
    assert "is finished" in call("search", run, "--resume").output
    assert call("retrain", run, "--subnet", "width-0.5", "--epochs", 2, "--name", "half").exit_code == 0
    again = call("retrain", run, "--name", "half", "--resume")
    assert again.exit_code == 0 and "run/retrain/half is finished" in again.output, again.output


@pytest.mark.parametrize("command", ["search", "export", "retrain", "eval", "report"])
def test_help_teaches_with_examples(call: Call, command: str) -> None:
    text = call(command, "--help").output
    assert f"fastslim {command} " in text.split("Examples:")[1]
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("search nowhere --budget flops=0.5", "no run folder nowhere: `fastslim train --run nowhere` makes one"),
        ("search run", "there is no budget: give for example --budget flops=0.5,0.25"),
        ("search run --budget flops=0.001", "is below the smallest subnet, which has "),
        ("search run --budget flop=0.5", "no cost is called 'flop'; did you mean 'flops'?"),
        ("search run --budget 0.5", "budget takes names with numbers, such as flops=0.5,0.25, not '0.5'"),
        ("search run --budget flops=0.5 --images 13", "images=13: there are 12 to search on"),
        ("search run --budget flops=0.5 --device cuda:7", "device: 'cuda:7' is not here"),
        ("search run --budget flops=0.5 --config none.yaml", "none.yaml cannot be read"),
        ("search run --budget flops=0.5 --resume --overwrite", "choose one"),
        ("export run", "which subnet? `fastslim search run` has found none yet; give --width 0.5, or --subnet FILE"),
        ("export run --width 0.5 --format onxx", "format: 'onxx' is not possible: did you mean 'onnx'?"),
        ("export run --width 0.5 --out .", "exists already and holds no export to go on with: choose another --out"),
        ("export run --subnet flops-0.5", "there is no subnet or file 'flops-0.5'"),
        ("retrain run", "which subnet? give --subnet NAME"),
        ("retrain run --subnet width-0.5 --config bad.yaml", "unknown key 'epoch' in bad.yaml: did you mean 'epochs'?"),
        ("retrain nowhere --subnet width-0.5", "there is no run folder nowhere"),
        ("eval run --subnet best", "there is no subnet or file 'best'"),
        ("eval run --widths 0.5 --subnet best", "give either widths or subnets to evaluate"),
        ("report nowhere", "there is no run folder nowhere"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(run: str, home: Path, call: Call, words: str, message: str) -> None:
    (home / "bad.yaml").write_text("epoch: 3\n")
    before = tree(home)
    result = call(*words.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert tree(home) == before


@pytest.mark.parametrize(
    ("words", "place", "message"),
    [
        ("export run --width 0.5", "export_run.load_run", "stopped; the same command begins again"),
        ("search run --budget flops=0.5", "search_run.load_run", "stopped before the search began; the same command"),
        ("search run --budget flops=0.5", "search_run.greedy", "what is evaluated is kept; go on with: fastslim"),
        ("retrain run --subnet width-0.5", "retrain.load_run", "stopped before the training began"),
        ("retrain run --subnet width-0.5", "retrain.save_subnet", "the last checkpoint is kept; go on with: "),
    ],
)  # fmt: skip
def test_ctrl_c_at_any_place_exits_with_130(
    run: str, call: Call, monkeypatch: pytest.MonkeyPatch, words: str, place: str, message: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fastslim.engine.{place}", interrupted)
    result = call(*words.split())
    assert result.exit_code == 130 and message in result.output, result.output
