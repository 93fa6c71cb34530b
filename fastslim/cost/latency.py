"""`LatencyTable`: how long a subnet takes on a machine, from times of its layers that are measured once."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastslim.cost.calls import Calls
from fastslim.cost.grid import LEVELS, StepGrid, step_grids
from fastslim.cost.latency_report import LatencyReport, LatencyRow
from fastslim.cost.networks import POSITIONS, Networks, fitted
from fastslim.cost.place import Place, present_device
from fastslim.cost.progress import Show, showing
from fastslim.cost.source import Source, mutator_behind, widths_of
from fastslim.cost.stopwatch import Stopwatch, stopwatch_for
from fastslim.cost.table_file import TableFile, cache_folder, table_key
from fastslim.errors import FastslimRuntimeError, FastslimValueError
from fastslim.graph import count_cost

#: What is measured in which order: levels of the grid up to this one, with so many measurements each.
STAGES = ((0, 1), (1, 1), (1, 3), (2, 3), (2, 5), (3, 5))


class LatencyTable:
    """Predicts how long a subnet's inference takes on this machine.

    Each operation of the exported network (convolutions, batch norm, activations, additions, ...) is timed alone, at a
    grid of widths; between them the time is bilinear in the channels. The sum over the operations, times a factor and
    plus a constant, is the prediction; both are fitted to three whole networks (the narrowest, one half as wide and
    the widest).

    Args:
        source: an AutoSlim, a mutator, or a model that `fastslim.convert` has converted; it stays as it is.
        device: where networks run: "cpu", "cuda" or "cuda:1".
        batch_size: samples at a time.
        dtype: of weights and activations; the model's by default.
        channels_last: run with images that lie in memory pixel by pixel.
        cache: a folder for measured times, True for the usual one (``$FASTSLIM_CACHE`` or ``~/.cache/fastslim``), or
            False to keep them in memory. They are kept by hardware, threads, data type, batch size and torch version.
        stopwatch: how calls are timed.

    Attributes:
        key: what the times depend on besides the network.
        copied: operations that could not be called alone; a copy of their result is timed in their place.

    Raises:
        FastslimTypeError: when source holds no subnets.
        FastslimValueError: no such device here, a batch size below 1, or a model on the meta device.
    """

    def __init__(
        self,
        source: Source,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        cache: bool | str | Path = True,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.mutator = mutator_behind(source, "LatencyTable")
        if type(batch_size) is not int or batch_size < 1:
            raise FastslimValueError(f"batch_size={batch_size!r}: must be a whole number of at least 1")
        weights = list(self.mutator.trace.model.parameters())
        if any(weight.is_meta for weight in weights):
            raise FastslimValueError(
                "the model lies on the meta device and has no weights to run with: build it on the CPU (costs that are "
                "counted, fastslim.cost.cost_of, need no weights)"
            )
        own_dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)
        self.place = Place(present_device(device), dtype or own_dtype, batch_size, channels_last)
        self.stopwatch = stopwatch or stopwatch_for(self.place.device)
        self.key = table_key(self.place, self.stopwatch.name)
        folder = None if cache is False else cache_folder() if cache is True else Path(cache)
        self._file = TableFile(self.key, folder)
        self._calls = Calls(self.mutator, self.place)
        units = self.mutator.units
        ends = [[unit.candidate_widths[end] for unit in units] for end in (0, -1)]
        steps = self.mutator.trace.forward.steps
        signatures = {
            number: (self._calls.signature(step, ends[0]), self._calls.signature(step, ends[1]))
            for number, step in enumerate(steps)
        }
        self._grids = step_grids(self.mutator, signatures)
        network = hashlib.sha256(json.dumps(signatures).encode()).hexdigest()[:16]
        self._networks = Networks(self.mutator, self.place)
        self._names = [f"network {network} at {position}" for position in POSITIONS]
        self._full = {unit.name: unit.num_channels for unit in units}
        self.copied: set[str] = set()
        self._fit: tuple[float, float] | None = None
        self._take_what_is_known()

    @property
    def level(self) -> int:
        """How fine the grid is by now: 0 before anything can be predicted, at most 4."""
        return min((grid.complete for grid in self._grids), default=len(LEVELS)) if self._fit else 0

    def measure(self, seconds: float = 60.0, progress: bool | Show = False) -> LatencyTable:
        """Times whole networks and layers, the rough grid first, until it is finest or the time is up.

        What was measured before, also for other networks or by other processes, is not measured again; the file is
        written at the end, and on Ctrl-C too.

        Args:
            seconds: time to spend; a measurement that has begun is finished.
            progress: True shows a bar; a function is called with the part that is done, 0 to 1, and what was timed.

        Returns:
            The table itself.

        Raises:
            FastslimRuntimeError: the number of torch's threads is no longer the table's.
            FastslimValueError: a time that is not above 0.
            FastslimFileError: the measured times cannot be written.
        """
        if not seconds > 0:
            raise FastslimValueError(f"seconds={seconds}: must be above 0")
        self._check_threads()
        end = time.monotonic() + seconds
        try:
            with showing(progress, "measuring") as show:
                self._measure(end, lambda what: show(max(0.0, min(1.0, 1 - (end - time.monotonic()) / seconds)), what))
                show(1.0, "all of it")
        finally:
            self._file.save()
        self._take_what_is_known()
        return self

    def predict(self, subnet: Mapping[str, Any]) -> float:
        """Milliseconds of one inference of a batch; takes less than one itself.

        Args:
            subnet: width by unit name; a unit left out is at full width.

        Raises:
            FastslimRuntimeError: before everything was measured roughly.
            FastslimValueError: for a unit that does not exist, or a width that is no choice of it.
        """
        if self._fit is None or not self.level:
            missing = sum(not grid.complete for grid in self._grids)
            raise FastslimRuntimeError(
                f"not everything is measured yet ({missing} of {len(self._grids)} kinds of operations are missing); "
                "call measure(), or call it again with more seconds: what was measured is kept"
            )
        widths = {**self._full, **widths_of(self.mutator, subnet)}
        factor, constant = self._fit
        return 1000 * (factor * self._sum(list(widths.values())) + constant)

    def time_network(self, subnet: Mapping[str, Any]) -> float:
        """Milliseconds of one inference of the exported subnet, measured now.

        Raises:
            FastslimValueError: when subnet does not fit.
        """
        return 1000 * self.stopwatch.seconds(self._networks.call(subnet))

    def check(self, subnets: int = 10, *, seed: int = 0, rounds: int = 3) -> LatencyReport:
        """Compares predictions with whole networks: random subnets, spread from narrow to wide.

        The networks that the table is fitted to run in turns with them, to tell how much of the error is the machine's,
        which is slower or faster now than it was.

        Args:
            subnets: how many.
            seed: of the subnets.
            rounds: measurements of each, in turns with the others; their median counts.

        Raises:
            FastslimRuntimeError: before `measure`.
            FastslimValueError: fewer than two subnets.
        """
        if subnets < 2 or rounds < 1:
            raise FastslimValueError(f"subnets={subnets}, rounds={rounds}: at least 2 subnets and 1 round")
        rng = random.Random(seed)
        chosen = [self._networks.random(rng, (i + 0.5) / subnets) for i in range(subnets)]
        predicted = [self.predict(subnet) for subnet in chosen]
        self._check_threads()
        calls = [self._networks.call(subnet) for subnet in (*self._networks.uniform(), *chosen)]
        rows_of_times = [[1000 * self.stopwatch.seconds(call) for call in calls] for _ in range(rounds)]
        times = [statistics.median(own) for own in zip(*rows_of_times, strict=True)]
        then = [1000 * (self._file.seconds(name) or 0.0) for name in self._names]
        drift = statistics.median(now / before for now, before in zip(times, then, strict=False))
        rows = [
            LatencyRow(subnet, count_cost(self.mutator.trace, subnet).multiply_adds, guess, measured)
            for subnet, guess, measured in zip(chosen, predicted, times[len(then) :], strict=True)
        ]
        return LatencyReport(tuple(sorted(rows, key=lambda row: row.measured)), self.describe(), drift)

    def describe(self) -> str:
        """Machine and way to run, in a line."""
        key = self.key
        threads = f", {key['threads']} threads" if key["device"] == "cpu" else ""
        layout = ", channels last" if key["channels_last"] else ""
        return f"{key['hardware']}{threads}, {key['dtype']}, batch {key['batch_size']}{layout}, torch {key['torch']}"

    def _check_threads(self) -> None:
        if self.place.device.type == "cpu" and torch.get_num_threads() != self.key["threads"]:
            raise FastslimRuntimeError(
                f"this table is for {self.key['threads']} threads, and torch now has {torch.get_num_threads()}: make a "
                "new table, or call torch.set_num_threads"
            )

    def _sum(self, widths: Sequence[int]) -> float:
        return sum([grid.estimate(widths) for grid in self._grids])

    def _measure(self, end: float, show: Callable[[str], None]) -> None:
        """All there is to time, again and again: what else the machine does comes and goes, and the median is kept."""
        for level, rounds in STAGES:
            todo = dict(self._layers(level))
            for done in range(rounds):
                for name, call in (*self._whole(), *todo.items()):
                    if len(self._file.samples.get(name, ())) <= done:
                        if time.monotonic() >= end:
                            return
                        self._file.add(name, call())
                        show(name)

    def _whole(self) -> Iterator[tuple[str, Callable[[], float]]]:
        for name, subnet in zip(self._names, self._networks.uniform(), strict=True):
            yield name, lambda subnet=subnet: self.stopwatch.seconds(self._networks.call(subnet))  # type: ignore[misc]

    def _layers(self, level: int) -> Iterator[tuple[str, Callable[[], float]]]:
        for number in range(level + 1):
            for grid in self._grids:
                for widths in grid.samples(self.mutator, number):
                    name = self._calls.signature(grid.step, widths)
                    yield name, lambda grid=grid, widths=widths: self._time_step(grid, widths)  # type: ignore[misc]

    def _time_step(self, grid: StepGrid, widths: Sequence[int]) -> float:
        run, is_itself = self._calls.make(grid.step, widths)
        if not is_itself:
            self.copied.add(grid.step.module or grid.step.function or "an unnamed function")
        with torch.inference_mode():
            return self.stopwatch.seconds(run)

    def _take_what_is_known(self) -> None:
        """Fills the grids from the file's times, and fits their sum to the whole networks."""
        for grid in self._grids:
            grid.forget()
            for level in range(len(LEVELS)):
                samples = list(grid.samples(self.mutator, level))
                times = {
                    grid.point(widths): self._file.seconds(self._calls.signature(grid.step, widths))
                    for widths in samples
                }
                if not grid.finish_level(times):
                    break
        whole = [seconds for seconds in map(self._file.seconds, self._names) if seconds is not None]
        if all(grid.complete for grid in self._grids) and len(whole) == len(self._names):
            subnets = self._networks.uniform()
            self._fit = fitted([self._sum(list({**self._full, **subnet}.values())) for subnet in subnets], whole)
