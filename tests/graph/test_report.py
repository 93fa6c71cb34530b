"""What the report says, how it looks, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastslim.graph import Finding, LayerRow, Report, UnitSpec, count_cost, make_report, trace


def row(name: str, out: int, reads: int, multiply_adds: int, unit: str | None = None, **changes: object) -> LayerRow:
    slims = {"slims_out": True, "slims_in": True, "reason": "", "kind": "conv", **changes}
    return LayerRow(name=name, out_channels=out, in_channels=reads, multiply_adds=multiply_adds, unit=unit, **slims)


def example() -> Report:
    """A stem, three blocks that look the same and a head."""
    here = str(Path.cwd() / "net.py")
    units = [UnitSpec("stem_(0, 8)_8", 8, ("stem",))]
    layers = [row("stem", 8, 3, 100, units[0].name, slims_in=False)]
    for i in range(3):
        units.append(UnitSpec(f"blocks.{i}.a_(0, 16)_16", 16, (f"blocks.{i}.a",)))
        layers += [
            row(f"blocks.{i}.a", 16, 8, 200, units[-1].name),
            row(f"blocks.{i}.norm.bn", 16, 16, 0, units[-1].name, kind="bn"),
            row(f"blocks.{i}.b", 8, 16, 200, None, slims_out=False, reason=f"blocks.{i}.b is odd ({here}:7)"),
        ]
    units.append(UnitSpec("head_(0, 4)_4", 4, ("head",), False, "output: the model's output (Net)"))
    layers.append(row("head", 4, 8, 700, units[-1].name, slims_in=False, slims_out=False, reason=units[-1].reason))
    return Report(
        "Net",
        tuple(units),
        tuple(layers),
        full_width=(
            *(Finding(f"blocks.{i}.b", f"{here}:7", "is odd") for i in range(3)),
            Finding("torch.fft", "/elsewhere/fft.py:3", "is not understood"),
            Finding("torch.fft", "/elsewhere/fft.py:3", "is not understood"),
        ),
        rewritten=(Finding("head", f"{here}:9", "mentions 8 channels"),),
        plan=("nothing to fuse",),
        seconds=0.25,
    )


def test_tree_shows_every_layer_once_and_equal_blocks_together():
    assert (
        str(example())
        == """\
Net: 4 channel units, 10 of 11 layers change their width, 65.0 % of 2 k multiply-adds, 0.25 s

layer           kind  channels  unit        multiply-adds
stem            conv  3 -> 8    u0                  5.0 %
blocks
  0 ... 2 (x3)
    a           conv  8 -> 16   u1, u2, u3         10.0 %
    norm
      bn        bn    16        u1, u2, u3
    b           conv  16 -> 8                      10.0 %  full: blocks.0.b is odd (net.py:7)
head            conv  8 -> 4    u4                 35.0 %  full: output: the model's output (Net)

stays at full width:
  blocks.0.b, blocks.1.b, blocks.2.b: is odd (net.py:7), 3 times
  torch.fft: is not understood (/elsewhere/fft.py:3), 2 times

runs a rewritten forward at narrow widths:
  head: mentions 8 channels (net.py:9)

execution plan of the training step:
  nothing to fuse"""
    )


def test_a_block_that_differs_anywhere_is_not_collapsed():
    report = example()
    layers = list(report.layers)
    layers[4] = row("blocks.1.a", 16, 8, 201, report.units[2].name)
    text = str(Report("Net", report.units, tuple(layers)))
    assert "(x" not in text and text.count("norm\n") == 3


def test_many_subjects_and_units_are_abbreviated():
    units = [UnitSpec(f"u{i}", 8, (f"layers.{i}",)) for i in range(9)]
    report = Report(
        "Net",
        tuple(units),
        tuple(row(f"layers.{i}", 8, 8, 1, unit.name) for i, unit in enumerate(units)),
        tuple(Finding(f"layers.{i}", "", "not in include") for i in range(9)),
    )
    assert "0 ... 8 (x9)  conv  8 -> 8    u0, u1 .. u8" in str(report)
    assert "layers.0, layers.1, layers.2, 6 more: not in include, 9 times" in str(report)


def test_a_unit_explains_itself_once():
    unit = UnitSpec("a_(0, 8)_8", 8, ("a", "b"), False, "because")
    full = {"slims_out": False, "reason": "because"}
    text = str(Report("Net", (unit,), (row("a", 8, 3, 1, unit.name, **full), row("b", 8, 8, 2, unit.name, **full))))
    assert text.count("because") == 1 and text.endswith("full")


def test_numbers_of_the_header():
    report = example()
    assert report.multiply_adds == 2000
    assert report.slimmable_multiply_adds == 1300
    assert report.share == 0.65
    assert set(report.slimmable) == {row.name for row in report.layers} - {"head"}
    assert Report("Empty", (), ()).share == 0.0
    assert repr(report) == f"<Report of {report.header()}>"


def test_json_holds_everything_but_the_model():
    report = example()
    report.mutator = report.model = nn.Identity()
    found = json.loads(report.to_json())
    assert list(found) == [
        "model",
        "seconds",
        "multiply_adds",
        "slimmable_multiply_adds",
        "share",
        "units",
        "layers",
        "full_width",
        "rewritten",
        "plan",
    ]
    assert found["units"][4] == {
        "name": "head_(0, 4)_4",
        "channels": 4,
        "members": ["head"],
        "mutable": False,
        "reason": "output: the model's output (Net)",
        "granularity": 1,
        "counted": False,
    }
    assert found["layers"][1]["unit"] == found["units"][1]["name"]
    assert found["full_width"][0] == {"subject": "blocks.0.b", "location": "net.py:7", "reason": "is odd"}


def test_files_outside_the_current_folder_keep_their_path(tmp_path, monkeypatch):
    report = example()
    inside = str(Path.cwd() / "net.py:7")
    assert inside not in str(report)
    monkeypatch.chdir(tmp_path)
    assert inside in str(report) and inside in report.to_json()


def test_rich_shows_the_same_lines():
    console = pytest.importorskip("rich.console").Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(example())
    lines = capture.get().splitlines()
    assert lines[0] == example().header()
    columns = [line.index("conv") for line in lines if " conv " in line]
    assert len(columns) == 4 and len(set(columns)) == 1
    assert "full: blocks.0.b is odd (net.py:7)" in capture.get() and "  nothing to fuse" in lines


def test_print_tree_is_plain_where_there_is_no_terminal(capsys):
    example().print_tree()
    assert capsys.readouterr().out == str(example()) + "\n"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.b, self.unused = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.b(self.bn(self.a(x)).relu()).mean((2, 3)))


def test_report_of_a_trace_agrees_with_its_cost():
    found = trace(Net(), (1, 3, 10, 10))
    report = make_report(found, seconds=1.5, plan=["fused"])
    assert report.multiply_adds == count_cost(found, {}).multiply_adds == 3 * 16 * 9 * 64 + 16 * 8 * 64 + 8 * 4
    assert [(r.name, r.kind, r.in_channels, r.out_channels) for r in report.layers] == [
        ("a", "conv", 3, 16),
        ("bn", "bn", 16, 16),
        ("b", "conv", 16, 8),
        ("head", "linear", 8, 4),
    ]
    first, last = report.layers[0], report.layers[-1]
    assert first.slims_out and not first.slims_in and first.unit == report.units[0].name and first.reason == ""
    assert last.slims_in and not last.slims_out and "the model's output" in last.reason
    assert any(finding.subject == "unused" for finding in report.full_width)
    assert (report.seconds, report.plan, report.model) == (1.5, ("fused",), found.model)


def test_units_left_without_a_choice_are_full_in_the_report():
    found = trace(Net(), (1, 3, 10, 10))
    name = found.units[1].name
    report = make_report(found, still={name: "has 8 channels"})
    assert [unit.mutable for unit in report.units] == [True, False, False]
    rows = {row.name: row for row in report.layers}
    assert not rows["b"].slims_out and rows["b"].reason == "has 8 channels" and not rows["head"].slims_in
    assert Finding(name, "", "has 8 channels") in report.full_width
    assert [unit.mutable for unit in found.units] == [True, True, False]


def test_only_what_include_names_may_change():
    found = trace(Net(), (1, 3, 10, 10), include=["b"])
    assert [(unit.members[0], unit.mutable) for unit in found.units] == [("a", False), ("b", True), ("head", False)]
    assert Finding("a", "", "not in include") in found.findings
    both = trace(Net(), (1, 3, 10, 10), include=["a", "b"], exclude=["b"])
    assert [unit.mutable for unit in both.units] == [True, False, False]


def test_one_producer_outside_include_keeps_a_shared_unit_full():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.out(x + torch.relu(self.block(x)))

    assert not trace(Residual(), (1, 3, 4, 4), include=["block"]).units[0].mutable
    assert trace(Residual(), (1, 3, 4, 4), include=["block", "stem"]).units[0].mutable


def test_an_include_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"include='headd' matches no module; did you mean 'head'\?"):
        trace(Net(), (1, 3, 10, 10), include="headd")


def test_include_wants_every_producer_of_a_unit():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 1)
            self.head = nn.Conv2d(16, 5, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.out(self.inner(x)))

    for include, slim in ((["stem"], []), (["stem", "out"], ["stem"]), (["inner"], ["inner"])):
        units = trace(Block(), (1, 3, 4, 4), include=include).units
        assert [unit.members[0] for unit in units if unit.mutable] == slim
