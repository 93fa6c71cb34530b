"""Trace a model: its channel units, how its layers follow them, and what stays at full width and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError, nearest
from fastslim.graph.capture import Captured, bind_inputs, capture
from fastslim.graph.propagate import Channels, LayerDraft, Propagation
from fastslim.graph.report import Finding, Report, make_report
from fastslim.graph.rules import rule_of
from fastslim.graph.units import LayerSpec, UnitSpec


@dataclass
class Trace:
    """The result of `trace`.

    Attributes:
        units: channel units, in the order of the layers that produce them.
        layers: how each convolution, linear and batch-norm layer follows the units, by module name.
        findings: what stays at full width, and why.
        model: the traced model.
        example_inputs: forward's arguments by name, on the model's device.
        other_parameters: parameters of all other modules; they are there at any width.
    """

    units: tuple[UnitSpec, ...]
    layers: dict[str, LayerSpec]
    findings: tuple[Finding, ...]
    model: nn.Module = field(repr=False)
    example_inputs: dict[str, Any] = field(repr=False)
    other_parameters: int = 0

    @property
    def report(self) -> Report:
        """What is slimmable, what is not, and why."""
        return make_report(self)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The recorded forward over the model's present submodules (recorded anew at each access)."""
        return fx.GraphModule(self.model, capture(self.model, self.example_inputs).graph)


def trace(model: nn.Module, example_inputs: Any, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> Trace:
    """Finds the channel units of a model by following the channels through its forward.

    Forward runs once, without gradients; the model is left exactly as it was. What is not understood stays at full
    width and is listed in the report.

    Args:
        model: any module built of torch layers.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or one shape such as
            ``(1, 3, 224, 224)``.
        exclude: names or fnmatch patterns of modules whose output channels stay full, with everything inside them.
            A module that cannot be traced is left alone as a whole when it is excluded.
        include: names or patterns of modules; only channels that layers in them produce may change. All, when empty.

    Returns:
        Units, layers and report.

    Raises:
        FastslimRuntimeError: when forward cannot be run or traced; names module, file and line.
        FastslimTypeError: when example_inputs do not fit forward.
        FastslimValueError: when a pattern matches no module.
    """
    if not isinstance(model, nn.Module):
        raise FastslimTypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    names = [name for name, _ in model.named_modules() if name]
    excluded = _matcher(names, exclude, "exclude")
    included = _matcher(names, include, "include") if include else None
    inputs = bind_inputs(model, example_inputs)
    spared = frozenset(name for name in names if excluded(name))
    evaluated, trained, untrained = _record(model, inputs, spared)
    graphs = [evaluated.graph] if trained is None else [evaluated.graph, trained.graph]
    propagation = Propagation(excluded, _shared_parameters(model, graphs))
    propagation.walk(evaluated, rule_of, count_positions=True)
    if trained is not None and str(evaluated.graph) != str(trained.graph):
        propagation.walk(trained, rule_of, count_positions=False)
    propagation.findings.extend(untrained)
    for draft in propagation.layers.values() if included else ():
        if not included(draft.name):
            made = tuple(p for p in draft.out if p.unit is not None and propagation.units.names[p.unit] == draft.name)
            propagation.fix([Channels(1, made)], Finding(draft.name, "", "not in include"))
    return _finish(propagation, model, inputs)


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


def _record(
    model: nn.Module, inputs: dict[str, Any], spared: frozenset[str]
) -> tuple[Captured, Captured | None, list[Finding]]:
    """Forward in evaluation and training mode; the excluded modules are looked into as far as that works."""
    error: FastslimRuntimeError | None = None
    for opaque in (frozenset(), spared) if spared else (frozenset(),):
        try:
            evaluated = capture(model, inputs, training=False, opaque=opaque)
        except FastslimRuntimeError as failure:
            error = error or failure
            continue
        try:
            return evaluated, capture(model, inputs, training=True, opaque=opaque), []
        except FastslimRuntimeError as failure:
            if opaque == spared:
                return evaluated, None, [Finding("forward in training mode", "not followed", str(failure))]
    assert error is not None
    raise error


def _shared_parameters(model: nn.Module, graphs: Sequence[fx.Graph]) -> frozenset[int]:
    """Parameters that more than one module holds, or that forward takes out of their module."""
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    taken = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "get_attr"}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    return frozenset(
        {key for key, count in holders.items() if count > 1} | {id(by_name[name]) for name in taken if name in by_name}
    )


def _finish(propagation: Propagation, model: nn.Module, inputs: dict[str, Any]) -> Trace:
    table, drafts = propagation.units, propagation.layers
    roots = table.roots()
    index = {root: i for i, root in enumerate(roots)}
    members: dict[int, list[str]] = {root: [] for root in roots}
    for draft in drafts.values():
        for root in dict.fromkeys(table.find(part.unit) for part in draft.out if part.unit is not None):
            members[root].append(draft.name)
    units = tuple(
        UnitSpec(
            f"{table.names[root]}_(0, {table.channels[root]})_{table.channels[root]}",
            table.channels[root],
            tuple(members[root]),
            not table.reasons[root],
            table.reasons[root],
            table.granularity[root],
        )
        for root in roots
    )

    def position(unit: int | None) -> int | None:
        return None if unit is None else index[table.find(unit)]

    layers = {}
    for draft in drafts.values():
        inputs_of, start = [], 0
        for part in draft.inputs:
            inputs_of.append((position(part.unit), start, part.channels))
            start += part.channels
        layers[draft.name] = LayerSpec(
            draft.name,
            draft.kind,
            tuple((position(part.unit), part.channels) for part in draft.out),
            tuple(inputs_of),
            *_weights(draft),
            draft.positions,
            units,
        )
    counted = {id(p) for draft in drafts.values() for p in draft.module.parameters()}
    unused = [
        Finding(name, type(model).__name__, "is not used by forward")
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
        and name not in layers
        and not any(finding.subject.startswith(name + " ") for finding in propagation.findings)
    ]
    return Trace(
        units,
        layers,
        (*propagation.findings, *unused),
        model,
        inputs,
        sum(p.numel() for p in model.parameters() if id(p) not in counted),
    )


def _weights(draft: LayerDraft) -> tuple[int | None, int, bool]:
    """(input channels per group, kernel positions, has a bias or affine part) of a layer."""
    module = draft.module
    if isinstance(module, nn.Conv2d):
        per_group = None if module.groups == 1 else module.in_channels // module.groups
        return per_group, module.kernel_size[0] * module.kernel_size[1], module.bias is not None
    if isinstance(module, nn.Linear):
        return None, 1, module.bias is not None
    assert isinstance(module, nn.BatchNorm2d)
    return None, 1, module.affine
