"""Measured times on disk: one JSON file for each machine and way to run, shared by all networks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch

from fastslim.cost.place import Place
from fastslim.errors import FastslimFileError
from fastslim.files import write_atomically

#: Grows when times of older files are no longer comparable.
VERSION = 1


def cache_folder() -> Path:
    """Where measured times are kept: ``$FASTSLIM_CACHE``, else ``~/.cache/fastslim`` (or ``$XDG_CACHE_HOME``)."""
    own = os.environ.get("FASTSLIM_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastslim"


def hardware_name(device: torch.device) -> str:
    """The processor's or GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def table_key(place: Place, clock: str) -> dict[str, Any]:
    """What times depend on besides the call."""
    return {
        "version": VERSION,
        "device": place.device.type,
        "hardware": hardware_name(place.device),
        "threads": torch.get_num_threads() if place.device.type == "cpu" else 1,
        "dtype": str(place.dtype).removeprefix("torch."),
        "batch_size": place.batch_size,
        "channels_last": place.channels_last,
        "torch": torch.__version__,
        "clock": clock,
    }


class TableFile:
    """Seconds by what was timed, each several times.

    Args:
        key: what they depend on, see `table_key`.
        folder: where the file lies; None keeps the times in memory.
    """

    def __init__(self, key: dict[str, Any], folder: Path | None) -> None:
        self.key = key
        self.path = None if folder is None else folder / "latency" / f"{_file_name(key)}.json"
        self.samples: dict[str, list[float]] = self._read()

    def seconds(self, what: str) -> float | None:
        """The median of what was measured; None where nothing was."""
        samples = self.samples.get(what)
        return statistics.median(samples) if samples else None

    def add(self, what: str, seconds: float) -> None:
        """Notes a measurement."""
        self.samples.setdefault(what, []).append(seconds)

    def _read(self) -> dict[str, list[float]]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["key"] != self.key:
                raise ValueError("it is of another machine or version")
            return {what: [_time(value) for value in samples] for what, samples in content["seconds"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(
                f"the measured times in {self.path} cannot be used ({type(error).__name__}: {error}); they are "
                "measured again and the file is replaced",
                stacklevel=4,
            )
            return {}

    def save(self) -> None:
        """Replaces the file, with what other processes have measured meanwhile.

        Raises:
            FastslimFileError: the folder or the disk refuses.
        """
        if self.path is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a damaged file, which was said when it was opened
            found = self._read()
        for what, samples in found.items():
            if len(samples) > len(self.samples.get(what, ())):
                self.samples[what] = samples
        text = json.dumps({"key": self.key, "seconds": dict(sorted(self.samples.items()))}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, text)
        except OSError as error:
            raise FastslimFileError(
                f"measured times cannot be kept in {self.path.parent} ({error}); choose another folder with cache=, or "
                "keep them in memory with cache=False"
            ) from error


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no time")
    return float(value)


def _file_name(key: dict[str, Any]) -> str:
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{key['hardware']} {key['threads']}t {key['dtype']} b{key['batch_size']}")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    return f"{words.strip('-')}-{digest}"
