"""docs/cost.md keeps up with the code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from cost_nets import Grouped

import fastslim
from fastslim.cost import Cost

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "cost.md").read_text()


def test_its_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTSLIM_CACHE", str(tmp_path))
    found = re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    algo = fastslim.AutoSlim(architecture=Grouped().eval(), example_inputs=torch.zeros(1, 3, 8, 8))
    code = found.group(1).replace("seconds=60", "seconds=2")
    exec(compile(code, "docs/cost.md", "exec"), {"algo": algo, "subnet": algo.mutator.min_choices})
    assert "10 subnets on " in capsys.readouterr().out
    assert list((tmp_path / "latency").glob("*.json"))


def test_every_cost_is_explained() -> None:
    assert {field.name for field in fields(Cost) if f"| `{field.name}` |" not in DOCUMENT} == set()
