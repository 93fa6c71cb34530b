"""What every figure is reported with."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from fastslim.engine.report_provenance import commit


def machine() -> dict[str, str]:
    """CPU, GPU, versions and the commit of fastslim."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit() or "unknown",
    }
