"""Follow the channels through a recorded forward: which unit each entry of each dimension of a tensor belongs to."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from fastslim.graph.frame import Captured, Frame
from fastslim.graph.known import (
    Axes,
    Dim,
    Known,
    LayerDraft,
    Layout,
    Size,
    Want,
    argument_at,
    describe,
    number,
    number_paths,
    parts_of,
    shape_of,
)
from fastslim.graph.parts import NotUnderstoodError, Part, Parts, UnitTable
from fastslim.graph.report import Finding

Rule = Callable[["Propagation", fx.Node], Known]


@dataclass
class Propagation:
    """Walks recorded forwards; units, layers and parameters are shared between the walks.

    Args:
        model: the recorded model.
        full: why the outputs of a module must stay at full width, or None when they need not.
    """

    model: nn.Module
    full: Callable[[str], str | None]
    rule_of: Callable[[fx.Node, nn.Module | None], Rule | None]
    units: UnitTable = field(default_factory=UnitTable)
    layers: dict[str, LayerDraft] = field(default_factory=dict)
    wants: list[Want] = field(default_factory=list)
    axes: dict[int, Axes] = field(default_factory=dict)
    reads: list[tuple[Frame, fx.Node, Axes]] = field(default_factory=list)
    opaque: list[Finding] = field(default_factory=list)
    known: dict[fx.Node, Known] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {
            id(tensor): name
            for named in (self.model.named_buffers, self.model.named_parameters)
            for name, tensor in named()
        }
        self.finding = Finding("", "", "")
        self.counting = True

    def walk(self, captured: Captured, *, count_positions: bool) -> None:
        """Follows one recorded forward."""
        self.counting, self._opaque = count_positions, captured.opaque
        self._walk(captured.root)
        finding = Finding("output", type(self.model).__name__, "the model's output")
        for node in captured.outputs:
            self.fix(self.known.get(node), finding)

    def _walk(self, frame: Frame) -> None:
        self.frame = frame
        reason: Any
        for node in frame.graph.nodes:
            if node.op == "output":
                continue
            if node in frame.children:
                self._walk(frame.children[node])
                self.frame = frame
            source = node.meta.get("inner", node.meta.get("outer"))
            if source is not None or node.op == "placeholder" or node in frame.children:
                self.known[node] = self.known.get(source) if source is not None else None
            else:
                self.known[node] = self._apply(node)
            reason = self.full(str(node.meta["module"])) if node.op == "call_module" else None
            if reason is not None:
                self.fix(self.known[node], Finding(str(node.meta["module"]), node.meta["location"], reason))
            if "inner" in node.meta and (reason := self._full_inside(frame, node)) is not None:
                self.fix(self.known[node], reason)

    def _full_inside(self, frame: Frame, node: fx.Node) -> Finding | None:
        call: Any = node
        while call.op != "call_module":
            call = call.args[0]
        reason = self.full(str(call.meta["module"]))
        return None if reason is None else Finding(str(call.meta["module"]), call.meta["location"], reason)

    def _apply(self, node: fx.Node) -> Known:
        module = self.module(node) if node.op == "call_module" else None
        self.finding = Finding(describe(node, module), node.meta.get("location", "unknown line"), "")
        if node.op == "get_attr":
            axes = self.stored(node.meta["constant"], node.meta["tensor"] or str(node.target))
            self.reads.append((self.frame, node, axes))
            return Layout(tuple(axes.dims))
        try:
            rule = self.rule_of(node, module)
            if module is not None and str(node.meta["module"]) in self._opaque:
                reason = self._opaque[str(node.meta["module"])]
                self.opaque.append(Finding(self.finding.subject, self.finding.location, reason))
                raise NotUnderstoodError(reason)
            if rule is None:
                raise NotUnderstoodError("is not understood")
            result = rule(self, node)
            return self._resolved(result)
        except NotUnderstoodError as reason:
            self._give_up(node, module, str(reason))
            return None

    def _give_up(self, node: fx.Node, module: nn.Module | None, reason: str) -> None:
        finding = Finding(self.finding.subject, self.finding.location, reason)
        for value in node.all_input_nodes:
            known = self.known.get(value)
            if not isinstance(known, Size):
                self.fix(known, finding)
        for path, value in number_paths(node):  # its tensors stay full, so its sizes must
            if isinstance(self.known.get(value), Size):
                self.want(node, path, None, value.meta["value"])
        if module is not None:
            for axes in self._of_module(module):
                self.fix(Layout(tuple(axes.dims)), finding)
            if any(True for _ in module.parameters()) and finding not in self.opaque:
                self.opaque.append(finding)

    def _of_module(self, module: nn.Module) -> Iterator[Axes]:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) in self.axes:
                yield self.axes[id(tensor)]

    def _resolved(self, known: Known) -> Known:
        if isinstance(known, Layout):
            return Layout(tuple(map(self.resolved, known.dims)))
        return known

    # -- what rules ask

    def module(self, node: fx.Node) -> nn.Module:
        """The module a call_module node calls."""
        return self.model.get_submodule(str(node.meta["module"]))

    def dims(self, argument: Any) -> tuple[Dim, ...]:
        """The parts along each dimension of a tensor argument."""
        known = self.known.get(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(known, Layout):
            return (None,) * len(shape_of(argument))
        return tuple(map(self.resolved, known.dims))

    def resolved(self, dim: Dim) -> Dim:
        """A dimension in terms of the units as they are now."""
        return None if dim is None else self.units.resolve(dim)

    def stored(self, tensor: Tensor, name: str) -> Axes:
        """The axes of a parameter or buffer; where nothing else is known, each dimension follows what it meets.

        Indices and masks stay as they are.
        """
        axes = self.axes.get(id(tensor))
        if axes is None:
            free = tensor.is_floating_point() or tensor.is_complex()
            dims: list[Dim] = [(self.units.new(size),) if free and size > 1 else None for size in tensor.shape]
            axes = self.axes[id(tensor)] = Axes(tensor, self.names.get(id(tensor), name), dims)
        return axes

    def produce(self, parts: Dim, name: str) -> None:
        """The layer `name` produces the channels of these parts, unless an earlier one does."""
        if parts is not None:
            self.units.set_producer(parts, name)

    def tie(self, one: Dim, other: Dim, size: int) -> Dim:
        """Two dimensions hold the same entries; returns what both are."""
        if one is None and other is None:
            return None
        full = (Part(None, size),)
        finding = Finding(
            self.finding.subject, self.finding.location, "combines slimmable channels with full-width ones"
        )
        return self.units.tie(one or full, other or full, finding)

    def tie_all(self, dims: Iterable[Dim], size: int) -> Dim:
        """All dimensions hold the same entries."""
        dims = list(dims)
        result = dims[0] if dims else None
        for dim in dims[1:]:
            result = self.tie(result, dim, size)
        return result

    def keep_full(self, dim: Dim, reason: str) -> None:
        """The entries of this dimension cannot be slimmed here."""
        if dim is not None:
            self.units.fix(dim, Finding(self.finding.subject, self.finding.location, reason))

    def fix(self, known: Known, finding: Finding) -> None:
        """Keeps all units in a value at full width."""
        for parts in parts_of(known):
            self.units.fix(parts, finding)

    def want(self, node: fx.Node, path: tuple[Any, ...], parts: Dim, value: int) -> None:
        """The argument at `path` must be the active count of `parts`, or `value` when they are None."""
        given = argument_at(node, path)
        if given == -1 or given is None:
            return
        known = self.known.get(given) if isinstance(given, fx.Node) else None
        if parts is None and not isinstance(known, Size):
            return
        if parts is not None and known is None and isinstance(given, fx.Node):
            inner = _repeated(given, parts)
            if inner is not None:  # ``batch * self.heads``: the constant in it
                node, path, parts, given = given, *inner
        self.wants.append(Want(self.frame, node, path, (Part(None, value),) if parts is None else parts, known, given))

    def layer(self, node: fx.Node, kind: str, inputs: Parts, out: Parts, rows: int) -> LayerDraft:
        """Notes a call of a layer that will be replaced by a slim one; `rows`: output positions per channel."""
        name = str(node.meta["module"])
        draft = self.layers.get(name)
        if draft is None:
            draft = self.layers[name] = LayerDraft(name, kind, self.module(node), inputs, out)
        else:
            self.units.tie(draft.inputs, inputs, self.finding)
        if self.counting:
            draft.positions += rows
        return draft

    def attention_layer(self, node: fx.Node, sources: list[Parts], out: Parts, heads: Parts, rows: int) -> None:
        """Notes a call of `nn.MultiheadAttention`: parts of query, key, value, output and inner heads."""
        draft = self.layer(node, "attention", sources[0], out, rows)
        draft.heads, draft.key, draft.value = heads, sources[1], sources[2]


def _repeated(node: fx.Node, parts: Parts) -> tuple[tuple[int], Parts, int] | None:
    """Of a product of a number and a constant, such that the constant counts the parts: where, what and how many."""
    if node.target is not operator.mul:
        return None
    for place, (constant, other) in enumerate((node.args, node.args[::-1])):
        times = number(other)
        if type(constant) is int and isinstance(other, fx.Node) and times and len(parts) % times == 0:
            own = parts[: len(parts) // times]
            if own * times == parts and sum(part.channels for part in own) == constant:
                return (place,), own, constant
    return None
