"""`fastslim bench`: what it prints and writes, what it refuses, and that a wrong step has no speed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from fastslim.algorithms import verify as original_verify
from fastslim.bench import report as bench_report
from fastslim.cli.commands import fastslim

NET = """
import torch
from torch import nn

def build(width=16):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build()

    def forward(self, image):
        return self.net(image)

class NoLogits(Named):
    def forward(self, image):
        return {"logits": self.net(image)}

def batch():
    return {"image": torch.randn(6, 3, 8, 8)}
"""
MINE = ("my_bench_net:build", "--input-shape", "4,3,8,8", "--pairs", "2")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_bench_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_bench_net", raising=False)
    return tmp_path


def call(*arguments: object) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(fastslim, ["bench", *map(str, arguments)])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_table_and_the_file_say_the_same(folder: Path, dtype: str) -> None:
    result = call(*MINE, "--dtype", dtype, "--random", "1", "--json", "bench.json")
    assert result.exit_code == 0, result.output
    saved = json.loads((folder / "bench.json").read_text())
    assert f"{saved['step']['low']:.2f} to {saved['step']['high']:.2f}" in result.output
    for name, key in (("multiply-adds", "multiply_adds"), ("peak memory", "peak_memory")):
        assert re.search(rf"^{name} +{saved[key]:.2f}$", result.output, re.MULTILINE), name
    assert "max + min + 1 random subnets" in saved["what"] and saved["what"] in result.output
    assert {"torch", "cpu", "commit", "fastslim"} <= saved["machine"].keys()
    assert set(saved["plain"]) == {"NCHW", "channels_last"}
    assert saved["step"] == saved["plain"][saved["formats"]["plain step"]]
    assert saved["milliseconds"][saved["formats"]["plain step"]] == min(
        saved["milliseconds"][f] for f in saved["plain"]
    )
    assert 1.0 < saved["multiply_adds"] < 3.0
    assert 0.5 < saved["peak_memory"] < 5.0
    assert saved["plan"] and all(line in result.output for line in saved["plan"])
    assert result.output.index("exact") < result.output.index("sandwich step / plain step")


def test_a_wrong_step_has_no_speed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def red(*arguments: object) -> object:
        found = original_verify(*arguments)
        found.comparisons[0].exact = 1.0
        return found

    monkeypatch.setattr(bench_report, "verify", red)
    result = call(*MINE, "--json", "bench.json")
    assert result.exit_code == 2
    assert "no speed is reported of a step that is not exact" in result.stderr and "gradients" in result.stderr
    assert " ms" not in result.output and not (folder / "bench.json").exists()


def test_inputs_may_be_named_arguments() -> None:
    result = call("my_bench_net:Named", "--inputs", "my_bench_net:batch", "--pairs", "1", "--random", "0")
    assert result.exit_code == 0, result.output
    assert "6x3x8x8, max + min + 0 random subnets" in result.output


def test_a_configuration_says_network_batch_and_widths(folder: Path) -> None:
    (folder / "small.yaml").write_text(
        "{data: digits, model: my_bench_net:build, width_mult: 1.0, batch_size: 6, num_samples: 1, choices: [0.5, 1.0]}"
    )
    text = NET.replace("def build(width=16)", "def build(width=16, in_channels=1)").replace(
        "Conv2d(3,", "Conv2d(in_channels,"
    )
    (folder / "my_bench_net.py").write_text(text)
    result = call("small.yaml", "--pairs", "1")
    assert result.exit_code == 0, result.output
    assert "small.yaml, float32, 6x1x8x8, max + min + 1 random subnets" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet17",), "'resnet17' is no model (did you mean 'resnet18'?)"),
        (("my_bench_net:NoLogits", "--batch", "2", "--pixels", "8"), "but NoLogits returns dict; wrap it"),
        ((*MINE, "--batch", "8"), "--batch and --pixels are for images"),
        (("my_bench_net:build", "--kwargs", "depth=1"), "cannot be called like this"),
        ((*MINE, "--choices", "half"), "--choices takes numbers"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_help_teaches() -> None:
    text = call("--help").output
    assert "fastslim bench my_net:build" in text and "How to read it:" in text
    assert max(map(len, text.splitlines())) <= 80
