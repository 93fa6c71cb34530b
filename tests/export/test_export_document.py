"""docs/export.md keeps its word."""

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "export.md"


def test_the_examples_run_in_their_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        exec(compile(code, "docs/export.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"half", "half.pt2", "half.onnx", "net.safetensors"}
    assert names["net"].width == "fast"
    assert "batches of 64, 1, 2, 7" in capsys.readouterr().out
