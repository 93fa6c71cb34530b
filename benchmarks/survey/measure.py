"""Convert one public model and check it: full width bit for bit, narrow widths against two other constructions."""

from __future__ import annotations

import copy
import random
import re
import time
import traceback
from collections import Counter
from typing import Any

import torch
from torch import nn

import fastslim
from fastslim.ops import use_backend
from survey.checks import (
    CheckError,
    difference,
    executed_multiply_adds,
    in_double,
    masked,
    normalized_units,
    run,
    run_at,
    same,
    train,
)
from survey.model import SurveyModel

# Seconds of one forward from which on only one random set of widths is checked, and nothing in float64.
LONG, SLOW = 0.2, 2.0


def measure(entry: SurveyModel) -> dict[str, Any]:
    """Everything the table says about one model.

    Returns:
        ``ok``, or ``stage`` and ``error`` of the first check that failed, beside what was found until then.
    """
    result: dict[str, Any] = {"collection": entry.collection, "name": entry.name, "kind": entry.kind, "ok": False}
    survey = _Survey(entry, result)
    for stage in (survey.build, survey.convert, survey.full_width, survey.widths, survey.copies, survey.exact):
        result["stage"] = stage.__name__
        try:
            stage()
        except Exception as error:
            place = "" if isinstance(error, CheckError) else f" at {_place(error)}"
            return {**result, "error": _short(f"{type(error).__name__}: {error}"[:200] + place)}
    del result["stage"]
    return {**result, "ok": True}


class _Survey:
    """The checks of one model, in the order of `measure`."""

    def __init__(self, entry: SurveyModel, result: dict[str, Any]) -> None:
        self.entry, self.result = entry, result

    def build(self) -> None:
        torch.manual_seed(0)
        self.model, self.inputs = self.entry.build()
        _randomize(self.model)
        self.model.eval()
        self.original = copy.deepcopy(self.model)
        start = time.perf_counter()
        self.expected = run(self.original, self.inputs)
        self.seconds = self.result["forward_seconds"] = time.perf_counter() - start
        self.result["layers"] = sum(not list(m.children()) for m in self.model.modules())
        self.result["parameters"] = sum(p.numel() for p in self.model.parameters())
        self.tolerance = max(1e-3, 50 * self._rounding())
        try:
            self.expected_training = train(copy.deepcopy(self.original), self.inputs)
        except Exception as error:
            self.expected_training = None
            self.result["training"] = f"not checked, the original fails: {type(error).__name__}: {error}"[:200]

    def _rounding(self) -> float:
        """How far the original in float32 is from itself in float64: some networks amplify rounding."""
        if self.seconds > SLOW:
            return 0.0
        try:
            exact = run(copy.deepcopy(self.original).double(), in_double(self.inputs))
        except Exception:
            return 0.0  # some forwards make float32 tensors of their own
        self.result["rounding"] = difference(self.expected, exact)
        return self.result["rounding"]

    def convert(self) -> None:
        keys = list(self.model.state_dict())
        start = time.process_time()  # one thread; other work on the machine does not count
        self.report = fastslim.convert(self.model, self.inputs, divisor=8, seed=0)
        self.result["analysis_seconds"] = time.process_time() - start
        if list(self.model.state_dict()) != keys:
            raise CheckError("the keys of state_dict have changed")
        mutator = self.mutator = self.report.mutator
        self.result["units"], self.result["mutable_units"] = len(mutator.units), len(mutator.mutable_units)
        self.result["full_width"] = _reasons(self.report.full_width)
        self.result["rewritten"] = len(getattr(self.report, "rewritten", ()))
        self.samples = {"max": mutator.max_choices, "min": mutator.min_choices}
        for i in range(1 if self.seconds > LONG else 3):
            self.samples[f"random {i}"] = mutator.sample_choices("random")
        self._count()

    def _count(self) -> None:
        """Multiply-adds as torch executes them, not as the analysis believes."""
        lists = {}
        for name in ("max", "min"):
            self.mutator.set_choices(self.samples[name])
            lists[name] = executed_multiply_adds(lambda: run(self.model, self.inputs))
        full, least = (sum(count for _, count in lists[name]) for name in ("max", "min"))
        self.result |= {"multiply_adds": full, "min_multiply_adds": least}
        if [name for name, _ in lists["max"]] == [name for name, _ in lists["min"]]:
            pairs = zip(lists["max"], lists["min"], strict=True)
            self.result["share"] = sum(a for (_, a), (_, b) in pairs if b < a) / max(full, 1)
        else:  # a narrow forward of other operations: what the analysis says
            self.result["share"] = self.report.share

    def full_width(self) -> None:
        self.mutator.set_max_choices()
        with use_backend("reference"):  # torch's own kernels
            same(run(self.model, self.inputs), self.expected, 0, "at full width, evaluation")
            if self.expected_training is not None:
                found = train(copy.deepcopy(self.model), self.inputs)
                same(found, self.expected_training, 0, "at full width, training")
        same(run(self.model, self.inputs), self.expected, self.tolerance, "at full width, our kernels")

    def widths(self) -> None:
        for name, widths in self.samples.items():
            self.mutator.set_choices(widths)
            found = run(self.model, self.inputs)
            if self.expected_training is not None:
                saved = copy.deepcopy(self.model.state_dict())
                train(self.model, self.inputs)
                self.model.load_state_dict(saved)
                run(self.model, self.inputs)  # where forward keeps tensors, without a graph, which cannot be copied
            plain = fastslim.export_subnet(self.model, widths)
            left = {type(m).__name__ for m in plain.modules() if type(m).__module__.startswith("fastslim")}
            if left:
                raise CheckError(f"the exported subnet still holds {sorted(left)}")
            same(run(plain.eval(), self.inputs), found, self.tolerance, f"against its export, {name}")

    def copies(self) -> None:
        self.mutator.set_min_choices()
        twin = copy.deepcopy(self.model)
        self.mutator.set_max_choices()
        if self.samples["min"] == self.samples["max"]:
            return
        same(run(twin, self.inputs), run_at(self.model, self.mutator, self.samples["min"], self.inputs), 1e-5, "copy")

    def exact(self) -> None:
        """Against the original with all weights of absent channels set to zero, which needs no slim layer."""
        double, tolerance = self.seconds <= SLOW, self.tolerance
        model, mutator, original, inputs = self.model, self.mutator, self.original, self.inputs
        if double:
            try:
                inputs = in_double(inputs)
                run(original.double(), inputs)
                tolerance = 1e-9
            except Exception:
                original, inputs = original.float(), self.inputs  # some forwards make float32 tensors of their own
        if tolerance < 1e-6:
            model = copy.deepcopy(original)
            mutator = fastslim.convert(model, inputs, divisor=8, seed=0).mutator
        self.result["exact_dtype"] = "float64" if tolerance < 1e-6 else "float32"
        if tolerance < 1e-6:
            found = run_at(model, mutator, self.samples["min"], inputs)
            plain = fastslim.export_subnet(model, self.samples["min"])
            same(run(plain.eval(), inputs), found, tolerance, "against its export, float64")
        self.result["masked"] = self.entry.unlike_zero or "equal"
        if self.entry.unlike_zero:
            return
        held = normalized_units(self.original, mutator)
        for name, widths in list(self.samples.items())[1:4]:
            chosen = widths | {unit: self.samples["max"][unit] for unit in held}
            self.result["masked_units"] = len(widths) - len(held)
            found = run_at(model, mutator, chosen, inputs)
            zeroed = run(masked(original, mutator.trace, chosen), inputs)
            same(found, zeroed, tolerance, f"against the original with zeros, {name}")


def _place(error: Exception) -> str:
    """The last lines of our code, and the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/fastslim/" in frame.filename][-2:]
    return ", ".join(f"{frame.filename.split('/fastslim/')[-1]}:{frame.lineno}" for frame in (*ours, frames[-1]))


def _reasons(findings: Any) -> list[list[Any]]:
    """The most common reasons: how each reads the first time, how many are like it, and where the first is."""
    counts: Counter[str] = Counter()
    first: dict[str, list[str]] = {}
    for finding in findings:
        subject, location, reason = map(_short, (finding.subject, finding.location, finding.reason))
        kind = re.sub(r"\d+", "", reason)
        counts[kind] += 1
        first.setdefault(kind, [reason, f"{subject} at {location}" if location else subject])
    return [[first[kind][0], count, first[kind][1]] for kind, count in counts.most_common(6)]


def _short(text: Any) -> str:
    """Without the folders in which packages lie."""
    return re.sub(r"/\S*?/(site-packages|benchmarks)/", "", str(text))[:300]


def _randomize(model: nn.Module) -> None:
    """Random values where initialisation leaves constants, which would hide what is combined with what."""
    generator = random.Random(0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() < 2:
                continue
            vector = parameter.numel() == max(parameter.shape)
            if vector or float(parameter.std()) < 1e-6:
                parameter.add_(torch.randn_like(parameter) * (0.1 if vector else 0.02) * (0.5 + generator.random()))
