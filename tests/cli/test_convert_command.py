"""`fastslim convert` and `fastslim info --model`: the report on the screen and in a file, and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from fastslim.cli.commands import fastslim

NET = """
import torch
from torch import nn

prebuilt, number = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)), 3

class Net(nn.Module):
    def __init__(self, width, name="tiny"):
        super().__init__()
        assert name.isalpha(), "letters only"
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, image):
        image = torch.fft.fft2(self.b(torch.relu(self.a(image)))).real
        return self.head(image.mean((2, 3)))

def example():
    return {"image": torch.zeros(1, 3, 8, 8)}

def dictionary():
    return {}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with my_net.py, whose modules are forgotten afterwards."""
    import sys

    (tmp_path / "my_net.py").write_text(NET)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "my_net", raising=False)
    return tmp_path


def call(*arguments: object) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(fastslim, [str(argument) for argument in arguments])


MINE = ("my_net:Net", "--kwargs", "width=16", "--input-shape", "1,3,8,8")


def test_the_example_of_the_help_text_works():
    text = call("convert", "--help").output
    command = "fastslim convert fastslim.models:resnet18 --input-shape 1,3,224,224 --report"
    assert command in text
    result = call(*command.replace("224,224", "64,64").split()[1:])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("ResNet: 12 channel units, 41 of 41 layers change their width, 100.0 % of ")
    assert "batch norm fused with 17 activations and 8 residual adds" in result.output


def test_what_stays_full_is_shown_with_file_and_line():
    result = call("convert", *MINE)
    assert result.exit_code == 0, result.output
    line = 1 + NET.splitlines().index(next(line for line in NET.splitlines() if "fft2" in line))
    assert f"(my_net.py:{line})" in result.output.split("stays at full width:")[1]


def test_json_goes_to_a_file_or_to_the_screen(folder: Path):
    quiet = call("convert", *MINE, "--json", "report.json")
    assert quiet.exit_code == 0 and quiet.output == ""
    written = json.loads((folder / "report.json").read_text())
    assert [layer["name"] for layer in written["layers"]] == ["a", "b", "head"]
    shown = json.loads(call("convert", *MINE, "--json", "-").output)
    assert shown["layers"] == written["layers"]
    both = call("convert", *MINE, "--json", "-", "--report")
    assert json.loads(both.stdout)["layers"] == written["layers"] and both.stderr.startswith("Net: ")
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []


def test_inputs_may_come_from_a_function():
    result = call("convert", "my_net:Net", "--kwargs", "width=16", "--inputs", "my_net:example")
    assert result.exit_code == 0 and result.output.startswith("Net: ")


def test_a_network_that_is_there_already_is_taken():
    assert call("convert", "my_net:prebuilt", "--input-shape", "1,3,8,8").exit_code == 0


def test_options_reach_the_units():
    options = ("--choices", "0.25,1", "--divisor", "2", "--exclude", "b", "--json", "-")
    units = {unit["name"]: unit for unit in json.loads(call("convert", *MINE, *options).output)["units"]}
    assert units["a_(0, 16)_16"]["mutable"] and "excluded by the caller" in units["b_(0, 16)_16"]["reason"]
    included = json.loads(call("convert", *MINE, "--include", "b", "--json", "-").output)["units"]
    assert included[0]["reason"] == "a: not in include"


def test_info_shows_the_cost_of_a_network():
    result = call("info", "--model", "fastslim.models:resnet18", "--input-shape", "1,3,224,224")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("41 layers, 13 channel units\n")
    assert "widest     11.7 M      1.81 G" in result.output
    assert "\nResNet: 12 channel units" in result.output
    assert "package" in call("info").output
    assert "add --model module:function" in call("info", "--input-shape", "1,3,8,8").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("my_net", "--input-shape", "1,3,8,8"), "not of the form module:function, such as fastslim.models:resnet18"),
        (("my_nett:Net", "--input-shape", "1,3,8,8"), "cannot import 'my_nett'"),
        (("my_net:Nett", "--input-shape", "1,3,8,8"), "has no function 'Nett': did you mean 'Net'?"),
        (("my_net:number", "--input-shape", "1,3,8,8"), "has no function 'number'"),
        (("my_net:dictionary", "--input-shape", "1,3,8,8"), "must return a torch.nn.Module, but returned a dict"),
        (("my_net:Net", "--input-shape", "1,3,8,8"), "missing a required argument: 'width'; give its arguments with"),
        (("broken:Net", "--input-shape", "1,3,8,8"), "importing 'broken' failed: ZeroDivisionError"),
        ((*MINE, "--kwargs", "name=4x"), "my_net:Net failed: AssertionError: letters only"),
        ((*MINE, "--kwargs", "name=true"), "write name=True"),
        ((*MINE, "--kwargs", "name"), "is not of the form NAME=VALUE"),
        ((*MINE, "--inputs", "my_net:example"), "give either --input-shape 1,3,224,224 or --inputs"),
        (("my_net:Net", "--kwargs", "width=16"), "give either --input-shape 1,3,224,224 or --inputs"),
        (("my_net:Net", "--kwargs", "width=16", "--input-shape", "1,x"), "--input-shape takes numbers"),
        ((*MINE, "--choices", "half"), "--choices takes numbers"),
        ((*MINE, "--json", "missing/report.json"), "cannot write missing/report.json"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments: tuple[str, ...], message: str):
    result = call("convert", *arguments)
    assert result.exit_code == 2
    assert message in result.output and result.output.count("\n") == 1
