"""Forwards that a width changes: a module's recorded forward with its channel counts as inputs and its tensors cut."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from fastslim.errors import FastslimRuntimeError
from fastslim.graph.frame import Frame, flatten_arguments
from fastslim.graph.known import argument
from fastslim.graph.norm_calls import norm_call, own_batch_norm
from fastslim.graph.packed import pack_graph, unpack_graph
from fastslim.graph.rewrite_calls import check_number, put_back, take
from fastslim.graph.settle import Needs
from fastslim.graph.units import DimSpec, Segments, UnitSpec, active


@dataclass
class Variant:
    """The rewritten forward of one mode.

    Attributes:
        graph: its inputs are the frame's tensors and sizes, then one for each of `values`.
        binding: how forward's arguments, by name, are nested.
        leaves: the arguments' leaves; None in the place of the graph's inputs.
        is_input: which leaves are inputs.
        values: what the width decides: an entry count of a dimension, or the dimensions of a stored tensor.
        watched: dimensions at whose narrow widths the module's own forward is wrong.
        reason: why the forward is rewritten.
        normalises: the module is a batch norm with a forward of its own; the graph's last input is the module.
        switches_gradients: it computes some of it without gradients.
    """

    graph: fx.Graph
    binding: Any
    leaves: list[Any]
    is_input: list[bool]
    values: list[DimSpec | tuple[DimSpec, ...]]
    watched: list[DimSpec]
    reason: str
    normalises: bool = False
    switches_gradients: bool = False
    source: str = ""
    imports: str = ""
    function: Callable[..., Any] | None = field(default=None, repr=False)

    def compute(self, widths: Sequence[int], units: Sequence[UnitSpec]) -> tuple[Any, ...]:
        """The extra inputs for these widths."""
        return tuple(_value(spec, widths, units) for spec in self.values)

    def is_narrow(self, widths: Sequence[int], units: Sequence[UnitSpec]) -> bool:
        """Whether some of the watched channels are not active."""
        return any(widths[unit] < units[unit].channels for dim in self.watched for unit, _ in dim if unit is not None)

    def __getstate__(self) -> dict[str, Any]:
        """Compiled code is not pickled, its source is; the graph as a list, with torch's functions by their names."""
        return {**self.__dict__, "function": None, "graph": pack_graph(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graph=unpack_graph(state["graph"]))


def _value(spec: Any, widths: Sequence[int], units: Sequence[UnitSpec]) -> Any:
    if spec and isinstance(spec[0][0], tuple):
        full = tuple(sum(channels for _, channels in dim) for dim in spec)
        own = tuple(active(dim, widths, units) for dim in spec)
        return tuple(None if part[0] == size else part for part, size in zip(own, full, strict=True))
    return active(spec, widths, units)[0]


def make_variant(frame: Frame, needs: Needs, dims_of: Callable[[Any], DimSpec], depends: set[fx.Node]) -> Variant:
    """Rewrites the forward of a frame.

    Args:
        frame: the recording.
        needs: what has to change.
        dims_of: turns parts into indices of the trace's units.
        depends: sizes that depend on widths; guards on them are what is rewritten, all others are checked.

    Returns:
        The variant; not compiled yet.
    """
    graph, environment = fx.Graph(), {}
    values: list[Any] = []
    inputs = [leaf for leaf in frame.leaves if isinstance(leaf, fx.Node)]
    for node in inputs:
        environment[node] = graph.placeholder(node.name)
    wants: dict[fx.Node, list[tuple[tuple, fx.Node]]] = {}
    reads: dict[fx.Node, fx.Node] = {}
    for number, want in enumerate(needs.wants):
        values.append(dims_of(want.parts))
        wants.setdefault(want.node, []).append((want.path, graph.placeholder(f"count_{number}")))
    for number, (node, axes) in enumerate(needs.reads):
        sizes = axes.tensor.shape
        values.append(
            tuple(((None, size),) if dim is None else dims_of(dim) for dim, size in zip(axes.dims, sizes, strict=True))
        )
        reads[node] = graph.placeholder(f"ranges_{number}")
    norm = norm_call(frame.graph, frame.module) if reads else None
    vectors = set() if norm is None else {n for n in norm.all_input_nodes if n.op == "get_attr"}
    own_module = None if norm is None else graph.placeholder("module")
    guards = {guard.node: guard for guard in frame.guards if guard.node not in depends}
    taken: list[tuple[fx.Node, fx.Node, fx.Node]] = []

    def check(node: fx.Node) -> None:
        if node in guards:
            graph.call_function(check_number, (environment[node], guards[node].value, guards[node].location))

    for node in inputs:
        check(node)
    needed = _needed(frame.graph, set(guards) | set(wants))
    for node in frame.graph.nodes:
        if node.op == "placeholder" or node not in needed or node in vectors:
            continue
        if node is norm:
            ranges = next(reads[vector] for vector in node.all_input_nodes if vector in reads)
            training = bool(argument(node, 5, "training", False))
            x = environment[argument(node, 0, "input")]
            environment[node] = graph.call_function(own_batch_norm, (own_module, x, ranges, training))
            continue
        copy = environment[node] = graph.node_copy(node, lambda n: environment[n])
        copy.meta = {}
        for path, value in wants.get(node, ()):
            _replace(copy, path, value)
        if node in reads:
            environment[node] = graph.call_function(take, (copy, reads[node]))
            if isinstance(node.meta.get("constant"), Tensor) and not isinstance(node.meta["constant"], nn.Parameter):
                taken.append((copy, environment[node], reads[node]))
        check(node)
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        for whole, part, ranges in taken:
            graph.call_function(put_back, (whole, part, ranges))
    is_input = [isinstance(leaf, fx.Node) for leaf in frame.leaves]
    leaves = [None if own else leaf for leaf, own in zip(frame.leaves, is_input, strict=True)]
    watched = [dims_of(parts) for parts in needs.parts()]
    switches = any(node.target is torch._C._set_grad_enabled for node in graph.nodes)
    reason = needs.reason()
    return Variant(graph, frame.binding, leaves, is_input, values, watched, reason, norm is not None, switches)


def _needed(graph: fx.Graph, wanted: set[fx.Node]) -> set[fx.Node]:
    """All nodes but sizes and elements that nobody uses."""
    needed = set()
    for node in reversed(graph.nodes):
        pure = node.op == "get_attr" or "value" in node.meta or node.target in (operator.getitem, getattr)
        if not pure or node in wanted or any(user in needed for user in node.users):
            needed.add(node)
    return needed


def _replace(node: fx.Node, path: tuple, value: fx.Node) -> None:
    def changed(argument: Any, rest: tuple) -> Any:
        if not rest:
            return value
        key = rest[0]
        if isinstance(argument, slice):
            return slice(
                *(
                    changed(getattr(argument, name), rest[1:]) if name == key else getattr(argument, name)
                    for name in ("start", "stop", "step")
                )
            )
        items = [changed(item, rest[1:]) if i == key else item for i, item in enumerate(argument)]
        return tuple(items) if isinstance(argument, tuple) else items

    if isinstance(path[0], int):
        node.args = tuple(changed(a, path[1:]) if i == path[0] else a for i, a in enumerate(node.args))
    else:
        node.kwargs = {k: changed(a, path[1:]) if k == path[0] else a for k, a in node.kwargs.items()}


class RewrittenForward:
    """Stands in a module's ``forward``: at full width its own, at narrow widths the rewritten one.

    Args:
        module: the module.
        variants: rewritten forward by mode (``module.training``).
        units: of the trace, to which the variants' values refer.
    """

    def __init__(self, module: nn.Module, variants: dict[bool, Variant], units: tuple[UnitSpec, ...]) -> None:
        self.module, self.variants, self.units = module, variants, units
        self.before = module.__dict__.get("forward")
        self.narrow = False
        self.values: dict[bool, tuple[Any, ...]] = {}

    def set_widths(self, widths: Sequence[int]) -> None:
        """Takes one width per unit."""
        self.values = {mode: variant.compute(widths, self.units) for mode, variant in self.variants.items()}
        self.narrow = any(variant.is_narrow(widths, self.units) for variant in self.variants.values())

    @property
    def normalises(self) -> bool:
        """Whether the module is a batch norm, which may have calibrated statistics."""
        return any(variant.normalises for variant in self.variants.values())

    @property
    def segments(self) -> Segments | None:
        """Of a batch norm: which of its channels are active, when they are not the first."""
        ranges = [value for value in self.values[self.module.training] if isinstance(value, tuple)]
        return ranges[0][0][1] if ranges and ranges[0][0] is not None else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What forward returns."""
        module = self.module
        if not self.narrow and (module.training or module.__dict__.get("calibrated") is None):
            return (self.before or type(module).forward.__get__(module))(*args, **kwargs)
        variant = self.variants.get(module.training)
        if variant is None:
            raise FastslimRuntimeError(
                f"the forward of {type(module).__name__} could not be recorded in "
                f"{'training' if module.training else 'evaluation'} mode, and at this width it must be rewritten"
            )
        if variant.function is None:
            _compile(variant)
        inputs, own = self._inputs(variant, args, kwargs), (module,) if variant.normalises else ()
        if not variant.switches_gradients:
            return variant.function(module, *inputs, *self.values[module.training], *own)
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # as it was, also when it fails in between
            return variant.function(module, *inputs, *self.values[module.training], *own)

    def _inputs(self, variant: Variant, args: tuple, kwargs: dict) -> list[Any]:
        """The tensors and sizes among the arguments; all else must be what was recorded."""
        leaves, binding = bound_leaves(self.module, args, kwargs)
        if binding != variant.binding:
            raise FastslimRuntimeError(self._other("arguments of another structure"))
        inputs = []
        for leaf, recorded, is_input in zip(leaves, variant.leaves, variant.is_input, strict=True):
            if is_input:
                inputs.append(leaf)
            elif leaf is not recorded and (isinstance(leaf, Tensor) or leaf != recorded):
                raise FastslimRuntimeError(self._other(f"{_short(leaf)} where the example had {_short(recorded)}"))
        return inputs

    def _other(self, what: str) -> str:
        return (
            f"{type(self.module).__name__} is called with {what}: at narrow widths it runs a forward that was recorded "
            "with the example inputs. Convert with example inputs like those you use, or exclude the module"
        )

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def bound_leaves(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Values and nesting of forward's arguments by name, defaults included."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    del arguments[next(iter(arguments))]  # self
    return flatten_arguments(arguments)


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _compile(variant: Variant) -> None:
    if not variant.source:
        code = variant.graph.python_code(root_module="self")
        variant.source, variant.imports = code.src, _format_import_block(code.globals, sys_importer)
    namespace: dict[str, Any] = {}
    exec(compile(f"{variant.imports}\n{variant.source}", "<rewritten forward>", "exec"), namespace)
    variant.function = namespace["forward"]
