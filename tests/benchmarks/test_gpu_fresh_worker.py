"""A GPU test that leaves the GPU unusable costs one worker, not the tests behind it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import fresh_worker
import pytest
import torch

TESTS = """
import fresh_worker, pytest, torch

broken = []
fresh_worker.usable = lambda: not broken

@pytest.mark.parametrize("index", range(6))
def test_one(index):
    assert not broken
    if index == 2:
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def test_gpu_that_reports_an_error_is_unusable(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert fresh_worker.usable()  # nothing has used a GPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert fresh_worker.usable()
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not fresh_worker.usable()


@pytest.mark.skipif(not importlib.util.find_spec("xdist"), reason="pytest-xdist is not installed")
def test_worker_is_replaced(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "fresh_worker", "-q", "test_it.py"]
    path = os.pathsep.join([str(Path(fresh_worker.__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "5 passed" in done.stdout, done.stdout + done.stderr
    assert "crashed while running 'test_it.py::test_one[2]'" in done.stdout
