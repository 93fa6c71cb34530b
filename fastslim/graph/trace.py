"""Trace a model: its channel units, how its layers follow them, and what stays at full width and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.errors import FastslimError, FastslimRuntimeError, FastslimTypeError, FastslimValueError, nearest
from fastslim.graph.capture import bind_inputs, capture
from fastslim.graph.forward_steps import forward_steps
from fastslim.graph.frame import Captured, Frame
from fastslim.graph.known import LayerDraft, Size
from fastslim.graph.leaks import note_leaks
from fastslim.graph.leaves import LAYERS
from fastslim.graph.parts import Part, Parts
from fastslim.graph.propagate import Propagation
from fastslim.graph.report import Finding, Report, make_report
from fastslim.graph.rewrite import Variant, make_variant
from fastslim.graph.rules import rule_of
from fastslim.graph.settle import Needs, settle
from fastslim.graph.steps import ForwardSteps
from fastslim.graph.units import DimSpec, LayerSpec, UnitSpec, active, named_apart

_PRODUCERS = ("conv", "conv_transpose", "linear", "embedding", "attention")


@dataclass
class Trace:
    """The result of `trace`.

    Attributes:
        units: channel units, in the order of the layers that produce them.
        layers: how each layer with weights follows the units, by module name.
        findings: what stays at full width, and why.
        model: the traced model.
        example_inputs: forward's arguments by name, on the model's device.
        tensors: parts of each dimension of every parameter and buffer, by name.
        parameters: names of all parameters, shared ones once.
        rewrites: forwards that narrow widths change, by module name and mode.
        forward: what forward computes in evaluation mode.
    """

    units: tuple[UnitSpec, ...]
    layers: dict[str, LayerSpec]
    findings: tuple[Finding, ...]
    model: nn.Module = field(repr=False)
    example_inputs: dict[str, Any] = field(repr=False)
    tensors: dict[str, tuple[DimSpec, ...]] = field(repr=False)
    parameters: tuple[str, ...] = field(repr=False)
    rewrites: dict[str, dict[bool, Variant]] = field(repr=False)
    forward: ForwardSteps = field(repr=False)

    @property
    def report(self) -> Report:
        """What was found, as a report."""
        return make_report(self)

    @property
    def rewritten(self) -> tuple[Finding, ...]:
        """Modules that run a rewritten forward at narrow widths, and why."""
        return tuple(
            Finding(name or type(self.model).__name__, "", next(iter(variants.values())).reason)
            for name, variants in self.rewrites.items()
        )

    def index_of(self, name: str, widths: Mapping[str, int]) -> list[Tensor | None]:
        """Which entries of a parameter or buffer a subnet uses.

        Args:
            name: of the parameter or buffer.
            widths: by unit name; a unit left out is at full width.

        Returns:
            For each dimension the indices of the active entries, or None for all.
        """
        ordered = [widths.get(unit.name, unit.channels) for unit in self.units]
        result: list[Tensor | None] = []
        for dim in self.tensors[name]:
            count, segments = active(dim, ordered, self.units)
            if count == sum(channels for _, channels in dim):
                result.append(None)
            else:
                ranges = [(0, count)] if segments is None else segments
                result.append(torch.cat([torch.arange(start, start + n) for start, n in ranges]))
        return result


def trace(model: nn.Module, example_inputs: Any, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> Trace:
    """Finds the channel units of a model by following the channels through its forward.

    Forward runs twice, in evaluation and in training mode, without gradients; the model is left exactly as it was.
    What is not understood stays at full width and is listed in the findings.

    Args:
        model: any module built of torch layers.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or one shape such as
            ``(1, 3, 224, 224)``.
        exclude: names or fnmatch patterns of modules whose output channels stay full, with everything inside them.
            A module that cannot be traced is left alone as a whole when it is excluded.
        include: names or patterns of modules; only channels that layers in them produce may change. All, when empty.

    Returns:
        Units, layers and findings.

    Raises:
        FastslimRuntimeError: when forward cannot be run or traced; names module, file and line.
        FastslimTypeError: when example_inputs do not fit forward.
        FastslimValueError: when a pattern matches no module.
    """
    if not isinstance(model, nn.Module):
        raise FastslimTypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    _check_parameters(model)
    names = [name for name, _ in model.named_modules() if name]
    excluded = _matcher(names, exclude, "exclude")
    included = _matcher(names, include, "include") if include else None
    inputs = bind_inputs(model, example_inputs)
    spared = frozenset(name for name in names if excluded(name))
    captures, untrained = _record(model, inputs, spared)

    def full(name: str) -> str | None:
        return "excluded by the caller" if excluded(name) else None

    propagation = Propagation(model, full, rule_of)
    for captured in captures:
        propagation.walk(captured, count_positions=captured is captures[0])
    if included is not None:
        _keep_others_full(propagation, included)
    needs = settle(propagation, captures)
    if needs and note_leaks(model, inputs, captures, needs):
        needs = settle(propagation, captures)
    return _Finish(propagation, model, inputs).trace(needs, untrained, captures[0])


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise FastslimRuntimeError(
                f"{name} is not initialised yet (a lazy module); run the model once on an example before converting it"
            )


def _matcher(names: Sequence[str], patterns: Sequence[str], argument: str) -> Callable[[str], bool]:
    """Tells for a module name whether a pattern matches it or a module it lies in."""
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise FastslimValueError(f"{argument}={pattern!r} matches no module; {nearest(pattern, names)}")

    def matches(name: str) -> bool:
        pieces = name.split(".")
        return any(
            fnmatchcase(".".join(pieces[:n]), pattern) for n in range(1, len(pieces) + 1) for pattern in patterns
        )

    return matches


def _record(model: nn.Module, inputs: dict[str, Any], spared: frozenset[str]) -> tuple[list[Captured], list[Finding]]:
    """Forward in evaluation and training mode; excluded modules are looked into as far as that works."""
    error: FastslimError | None = None
    for opaque in (frozenset(), spared) if spared else (frozenset(),):
        try:
            evaluated = capture(model, inputs, training=False, opaque=opaque)
        except FastslimError as failure:
            error = error or failure
            continue
        try:
            return [evaluated, capture(model, inputs, training=True, opaque=opaque)], []
        except FastslimError as failure:
            if opaque == spared:
                return [evaluated], [Finding("forward in training mode", "", f"not followed: {failure}")]
    assert error is not None
    raise error


def _keep_others_full(p: Propagation, included: Callable[[str], bool]) -> None:
    """Channels that are made by a layer outside of `include`, or by it together with others, stay."""
    for root in p.units.roots():
        unit = p.units[root]
        if unit.producer is not None and not included(unit.producer[0]):
            p.units.fix((Part(root, unit.channels),), Finding(unit.producer[0], "", "not in include"))
    for draft in p.layers.values():
        follows = draft.kind not in _PRODUCERS or getattr(draft.module, "groups", 1) > 1
        if not follows and not included(draft.name):
            p.units.fix((*draft.out, *draft.heads), Finding(draft.name, "", "not in include"))


class _Finish:
    """Turns what the propagation knows into specs with plain indices."""

    def __init__(self, p: Propagation, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.p, self.model, self.inputs = p, model, inputs
        table = p.units
        self.roots = [root for root in table.roots() if table[root].producer is not None]
        self.index = {root: i for i, root in enumerate(self.roots)}

    def dims(self, parts: Parts) -> DimSpec:
        """Parts with indices of units; neighbours that are always present are joined."""
        result: list[tuple[int | None, int]] = []
        for part in self.p.units.resolve(parts):
            unit = None if part.unit is None else self.index.get(part.unit)
            if unit is None and result and result[-1][0] is None:
                result[-1] = (None, result[-1][1] + part.channels)
            else:
                result.append((unit, part.channels))
        return tuple(result)

    def trace(self, needs: dict[str, dict[Frame, Needs]], untrained: list[Finding], evaluated: Captured) -> Trace:
        table = self.p.units
        members: dict[int, list[str]] = {root: [] for root in self.roots}
        for draft in self.p.layers.values():
            for part in dict.fromkeys(part.unit for part in table.resolve((*draft.out, *draft.heads))):
                if part in members:
                    members[part].append(draft.name)
        units = named_apart([self._unit(root, tuple(members[root])) for root in self.roots])
        layers = {draft.name: self._layer(draft, units) for draft in self.p.layers.values()}
        findings = dict.fromkeys(table[root].finding for root in self.roots if table[root].finding is not None)
        findings.update(dict.fromkeys(self.p.opaque))
        findings.update(dict.fromkeys(self._unused(layers)))
        depends = {node for node, known in self.p.known.items() if isinstance(known, Size)}
        rewrites = {
            name: {f.training: make_variant(f, need, self.dims, depends) for f, need in frames.items()}
            for name, frames in needs.items()
        }
        return Trace(
            units,
            layers,
            (*findings, *untrained),
            self.model,
            self.inputs,
            self._tensors(),
            tuple(name for name, _ in self.model.named_parameters()),
            rewrites,
            forward_steps(evaluated, self.p.known, self.dims),
        )

    def _unit(self, root: int, members: tuple[str, ...]) -> UnitSpec:
        unit = self.p.units[root]
        assert unit.producer is not None
        name, start, end, whole = unit.producer
        finding = unit.finding
        # While the graph is analysed a unit may be counted in finer steps than its layer has channels.
        channels = end - start
        return UnitSpec(
            f"{name}_({start}, {end})_{whole}",
            channels,
            members,
            finding is None,
            "" if finding is None else str(finding),
            unit.granularity * channels // unit.channels,
            unit.counted,
        )

    def _layer(self, draft: LayerDraft, units: tuple[UnitSpec, ...]) -> LayerSpec:
        inputs, start = [], 0
        for unit, channels in self.dims(draft.inputs):
            inputs.append((unit, start, channels))
            start += channels
        module: Any = draft.module
        grouped = draft.kind.startswith("conv") and module.groups > 1
        kernel = 1
        for size in getattr(module, "kernel_size", ()) if draft.kind.startswith("conv") else ():
            kernel *= size
        # Of a grouped transposed convolution each output reads a group of the inputs, too.
        return LayerSpec(
            draft.name,
            draft.kind,
            self.dims(draft.out),
            tuple(inputs),
            module.in_channels // module.groups if grouped else None,
            kernel,
            sum(p is not None for name, p in module.named_parameters(recurse=False) if p.dim() == 1),
            draft.positions,
            units,
            self.dims(draft.heads),
            self.dims(draft.key),
            self.dims(draft.value),
            getattr(module, "head_dim", 1),
        )

    def _unused(self, layers: dict[str, LayerSpec]) -> list[Finding]:
        known = {finding.subject.split(" ")[0] for finding in self.p.opaque}
        used = {axes.name for axes in self.p.axes.values()}
        return [
            Finding(name, type(self.model).__name__, "is not used by forward")
            for name, module in self.model.named_modules()
            if type(module) in LAYERS
            and name not in layers
            and not any(name == other or name.startswith(other + ".") for other in known)
            and not any(f"{name}.{key}" in used for key, _ in module.named_parameters())
            and any(True for _ in module.parameters())
        ]

    def _tensors(self) -> dict[str, tuple[DimSpec, ...]]:
        result = {}
        for named in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                axes = self.p.axes.get(id(tensor))
                result[name] = tuple(
                    ((None, size),) if axes is None or axes.dims[d] is None else self.dims(axes.dims[d])
                    for d, size in enumerate(tensor.shape)
                )
        return result
