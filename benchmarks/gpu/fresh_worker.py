"""pytest plugin for tests on a GPU under pytest-xdist: a worker whose GPU a kernel has left unusable is replaced.

Without it, one illegal memory access would fail every later test of the process.
"""

from __future__ import annotations

import os

import pytest
import torch


def usable() -> bool:
    """Whether this process can still use the GPU."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Leaves the worker; xdist reports the test as the one that crashed it and starts another."""
    if os.environ.get("PYTEST_XDIST_WORKER") and not usable():
        print(f"{nodeid} left the GPU unusable", flush=True)
        os._exit(1)
