"""What a conversion found: which layers change their width, what stays full and why, as objects, text and JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastslim.graph.products import multiply_adds_by_layer
from fastslim.graph.units import LayerSpec, UnitSpec

if TYPE_CHECKING:
    from fastslim.graph.trace import Trace


@dataclass(frozen=True)
class Finding:
    """Something that stays at full width, or that runs differently at narrow ones.

    Attributes:
        subject: the module or operation.
        location: file and line of the user's code.
        reason: why.
    """

    subject: str
    location: str
    reason: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}" + (f" ({self.location})" if self.location else "")


@dataclass(frozen=True)
class LayerRow:
    """One layer as the report shows it.

    Attributes:
        name: module name.
        kind: as in `LayerSpec`: "conv", "linear", "bn", ...
        out_channels: at full width.
        in_channels: at full width.
        multiply_adds: of one sample at full width; 0 for normalisation.
        slims_out: whether the number of output channels changes.
        slims_in: whether the number of input channels changes.
        unit: name of the unit its output belongs to, several joined by " + " (behind a concat); None if it has none.
        reason: why the output stays at full width; empty if it does not.
    """

    name: str
    kind: str
    out_channels: int
    in_channels: int
    multiply_adds: int
    slims_out: bool
    slims_in: bool
    unit: str | None
    reason: str


@dataclass(repr=False)
class Report:
    """What a conversion found. ``print(report)`` shows it as a tree.

    Attributes:
        model_name: class of the model.
        units: all channel units; the tree calls ``units[3]`` u3.
        layers: all layers that were followed, in the order of the forward.
        full_width: what stays at full width, and why.
        rewritten: modules that run a rewritten forward at narrow widths, and why.
        plan: what the execution plan of the training step fuses, what it does not, and why.
        seconds: duration of the conversion.
        mutator: the prepared mutator; not in the JSON.
        model: the converted model; not in the JSON.
    """

    model_name: str
    units: tuple[UnitSpec, ...]
    layers: tuple[LayerRow, ...]
    full_width: tuple[Finding, ...] = ()
    rewritten: tuple[Finding, ...] = ()
    plan: tuple[str, ...] = ()
    seconds: float = 0.0
    mutator: Any = field(default=None, compare=False)
    model: Any = field(default=None, compare=False)

    @property
    def slimmable(self) -> tuple[str, ...]:
        """Names of the layers with at least one side that changes its width."""
        return tuple(row.name for row in self.layers if row.slims_out or row.slims_in)

    @property
    def multiply_adds(self) -> int:
        """Of all followed layers, for one sample at full width."""
        return sum(row.multiply_adds for row in self.layers)

    @property
    def slimmable_multiply_adds(self) -> int:
        """Of the layers with at least one side that changes its width."""
        return sum(row.multiply_adds for row in self.layers if row.slims_out or row.slims_in)

    @property
    def share(self) -> float:
        """Part of the multiply-adds that get fewer with the width, 0 to 1."""
        return self.slimmable_multiply_adds / self.multiply_adds if self.multiply_adds else 0.0

    def header(self) -> str:
        """The report in one line."""
        changing = sum(unit.mutable for unit in self.units)
        return (
            f"{self.model_name}: {changing} channel {'unit' if changing == 1 else 'units'}, "
            f"{len(self.slimmable)} of {len(self.layers)} layers change their width, "
            f"{100 * self.share:.1f} % of {count(self.multiply_adds)} multiply-adds, {self.seconds:.2f} s"
        )

    def __repr__(self) -> str:
        return f"<Report of {self.header()}>"

    def __str__(self) -> str:
        from fastslim.graph.report_tree import as_text  # it needs this module's classes

        return as_text(self)

    def __rich__(self) -> Any:
        from fastslim.graph.report_tree import as_rich

        return as_rich(self)

    def print_tree(self) -> None:
        """Prints the tree: in colours on a terminal when rich is installed, else as plain text."""
        if sys.stdout.isatty() and importlib.util.find_spec("rich"):
            from rich.console import Console

            Console().print(self)
        else:
            print(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values.

        Returns:
            ``model``, ``seconds``, ``multiply_adds``, ``slimmable_multiply_adds`` and ``share``; ``units`` and
            ``layers``, lists of dicts with the fields of `UnitSpec` and `LayerRow`; ``full_width`` and ``rewritten``,
            lists of dicts with ``subject``, ``location`` and ``reason``; ``plan``, a list of lines. Files are written
            relative to the current folder where they lie in it.
        """
        return local(
            {
                "model": self.model_name,
                "seconds": round(self.seconds, 3),
                "multiply_adds": self.multiply_adds,
                "slimmable_multiply_adds": self.slimmable_multiply_adds,
                "share": self.share,
                "units": [{**asdict(unit), "members": list(unit.members)} for unit in self.units],
                "layers": [asdict(row) for row in self.layers],
                "full_width": [asdict(finding) for finding in self.full_width],
                "rewritten": [asdict(finding) for finding in self.rewritten],
                "plan": list(self.plan),
            }
        )

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)


def make_report(
    trace: Trace, seconds: float = 0.0, plan: Sequence[str] = (), still: Mapping[str, str] | None = None
) -> Report:
    """The report of a trace.

    Args:
        trace: of the model.
        seconds: what the conversion took.
        plan: lines about the execution plan.
        still: units that the choices leave a single width, by name, with the reason.
    """
    still = still or {}
    units = tuple(
        replace(unit, mutable=False, reason=still[unit.name]) if unit.mutable and unit.name in still else unit
        for unit in trace.units
    )
    findings = (*trace.findings, *(Finding(unit.name, "", still[unit.name]) for unit in units if unit.name in still))
    counts = multiply_adds_by_layer(trace)
    return Report(
        type(trace.model).__name__,
        units,
        tuple(_row(layer, units, findings, counts.get(name, 0)) for name, layer in trace.layers.items()),
        findings,
        tuple(getattr(trace, "rewritten", ())),
        tuple(plan),
        seconds,
        model=trace.model,
    )


def _row(layer: LayerSpec, units: Sequence[UnitSpec], findings: Sequence[Finding], multiply_adds: int) -> LayerRow:
    out = [units[unit] for unit in dict.fromkeys(unit for unit, _ in layer.out) if unit is not None]
    slims_out = any(unit.mutable for unit in out)
    reason = ""
    if not slims_out:
        reasons = [unit.reason for unit in out] or [f.reason for f in findings if f.subject.split(" ")[0] == layer.name]
        reason = next(filter(None, reasons), "its output channels do not follow a unit")
    return LayerRow(
        layer.name,
        layer.kind,
        sum(channels for _, channels in layer.out),
        sum(channels for _, _, channels in layer.inputs),
        multiply_adds,
        slims_out,
        any(unit is not None and units[unit].mutable for unit, _, _ in layer.inputs),
        " + ".join(unit.name for unit in out) or None,
        reason,
    )


def count(number: int) -> str:
    """A large number in three digits: ``1.81 G``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def local(value: Any) -> Any:
    """The value with the current folder taken out of the paths in its texts."""
    here = f"{Path.cwd()}/"

    def walk(part: Any) -> Any:
        if isinstance(part, str):
            return part.replace(here, "") if len(here) > 2 else part
        if isinstance(part, dict):
            return {key: walk(item) for key, item in part.items()}
        return [walk(item) for item in part] if isinstance(part, (list, tuple)) else part

    return walk(value)
