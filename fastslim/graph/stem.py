"""The stem of a recorded forward: its first calls, whose result at a narrow width is a prefix of that at a wide one."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastslim.graph.capture import unchanged
from fastslim.graph.flat import as_function
from fastslim.graph.known import describe, is_tensor, shape_of
from fastslim.nn import SlimBatchNorm2d, SlimConv2d

# Every output channel is made of the same channel of the input alone.
_CHANNELWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid,
    nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Identity, nn.ZeroPad2d, nn.MaxPool2d, nn.AvgPool2d,
)  # fmt: skip
_CHANNELWISE_FUNCTIONS: tuple[Any, ...] = (
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.softplus, F.sigmoid, torch.sigmoid,
    F.tanh, torch.tanh, F.hardtanh, F.hardsigmoid, F.hardswish, F.max_pool2d, torch.max_pool2d, F.avg_pool2d,
)  # fmt: skip
_CHANNELWISE_METHODS = ("relu", "sigmoid", "tanh")
_ARITHMETIC: tuple[Any, ...] = (
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div,
    "add", "sub", "mul", "div",
)  # fmt: skip

#: The dense convolutions whose width a value has; none where it has all channels at any width.
Width = tuple[SlimConv2d, ...]


@dataclass(frozen=True, eq=False)
class Stem:
    """A forward in two parts.

    Attributes:
        calls: what the stem consists of, for people.
        run: ``run(model, *inputs)``, the values that the rest of the network reads.
        rest: ``rest(model, *values, *inputs)``, the output.
        widths: of the values.
        convs: the convolutions, depthwise ones too.
        norms: the batch norms, and the width of each.
        modules: all layers of the stem.
        reads: positions of the inputs that it reads, all images ``(N, C, H, W)``.
    """

    calls: tuple[str, ...]
    run: Callable[..., tuple[Tensor, ...]]
    rest: Callable[..., Any]
    widths: tuple[Width, ...]
    convs: tuple[SlimConv2d, ...]
    norms: tuple[tuple[SlimBatchNorm2d, Width], ...]
    modules: tuple[nn.Module, ...]
    reads: tuple[int, ...]


def split_stem(graph: fx.Graph, model: nn.Module, watched: Callable[[fx.Node], bool]) -> Stem | str:
    """The stem of a fused forward, or why there is none.

    Args:
        graph: nodes carry shapes.
        model: whose layers it calls.
        watched: whether someone looks at the output of the module that a node calls.
    """
    widths, refusal = _Search(graph, model, watched).found()
    if not any(widths.values()):
        return refusal or "no convolution reads the network's input"
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    needed: set[fx.Node] = set()  # what has all channels at any width is worth sharing on the way to a convolution only
    for node in reversed(graph.nodes):
        if node in widths and (widths[node] or any(user in needed for user in node.users)):
            needed.add(node)
    stem = [node for node in graph.nodes if node in needed and node not in inputs]
    ends = [node for node in stem if any(user not in needed for user in node.users)]
    if not ends:
        return "nothing reads it"
    modules: dict[str, Any] = {
        str(node.target): model.get_submodule(str(node.target)) for node in stem if node.op == "call_module"
    }

    def width_of(node: fx.Node) -> Width:
        return tuple(modules[name] for name in sorted(widths[node]))

    return Stem(
        calls=tuple(call for node in stem for call in _calls(node)),
        run=_part(model, inputs, [], stem, tuple(ends)),
        rest=_part(model, inputs, ends, [node for node in graph.nodes if node not in needed], None),
        widths=tuple(width_of(node) for node in ends),
        convs=tuple(module for module in modules.values() if isinstance(module, SlimConv2d)),
        norms=tuple(
            (modules[str(node.target)], width_of(node))
            for node in stem
            if node.op == "call_module" and isinstance(modules[str(node.target)], SlimBatchNorm2d)
        ),
        modules=tuple(modules.values()),
        reads=tuple(position for position, node in enumerate(inputs) if node in needed),
    )


class _Search:
    """Follows the network's input as far as the stem goes."""

    def __init__(self, graph: fx.Graph, model: nn.Module, watched: Callable[[fx.Node], bool]) -> None:
        self.graph, self.model, self.watched = graph, model, watched
        self.count = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        #: Names of the convolutions whose width a value has; none where it has all channels at any width.
        self.widths: dict[fx.Node, frozenset[str]] = {}

    def found(self) -> tuple[dict[fx.Node, frozenset[str]], str]:
        """All values of the stem, and why the first call behind the network's input is not one, if it is not."""
        refusal = ""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if is_tensor(node) and len(shape_of(node)) == 4:
                    self.widths[node] = frozenset()
            elif node.op != "output" and node.all_input_nodes and all(n in self.widths for n in node.all_input_nodes):
                width = self._width(node)
                if isinstance(width, str):
                    refusal = refusal or width
                else:
                    self.widths[node] = width
        return self.widths, refusal

    def _width(self, node: fx.Node) -> frozenset[str] | str:
        """The width of a value that is made of values of the stem, or why it is none."""
        given = [self.widths[source] for source in node.all_input_nodes]
        follows = frozenset().union(*given)
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        name = describe(node, None) if module is None else str(node.target)
        if module is not None and self.watched(node):
            return f"{name} is watched by a hook or recorder"
        if module is not None and "forward" in vars(module):
            return f"{name} has a forward of its own"
        if not is_tensor(node) or len(shape_of(node)) != 4 or (follows and not all(given)) or _overwrites(node, module):
            return f"{name} is not followed"
        if type(module) is SlimConv2d:
            return self._width_of_conv(node, module, follows)
        if type(module) is SlimBatchNorm2d:
            return f"{name} is called {self.count[name]} times" if self.count[name] > 1 else follows
        if type(module) in _CHANNELWISE_MODULES or _is_channelwise(node):
            return follows
        return f"{name} may need all channels" if module is None else f"{name} ({type(module).__name__})"

    def _width_of_conv(self, node: fx.Node, conv: SlimConv2d, follows: frozenset[str]) -> frozenset[str] | str:
        if conv.groups == 1:
            return f"{node.target} reads channels that are sliced" if follows else frozenset({str(node.target)})
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        return follows if depthwise and follows else f"{node.target} has groups"


def _overwrites(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an activation changes its input in place; or a pool has a second output."""
    options = (*node.args, node.kwargs.get("inplace"), node.kwargs.get("return_indices"))
    return any(option is True for option in options) or any(
        getattr(module, name, False) for name in ("inplace", "return_indices")
    )


def _is_channelwise(node: fx.Node) -> bool:
    """Whether a function or method computes every channel by itself."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _ARITHMETIC:  # with numbers, or values of one shape: nothing is spread over channels
        return len({shape_of(source) for source in node.all_input_nodes}) == 1
    if node.op == "call_method":
        return node.target in _CHANNELWISE_METHODS
    return node.target in _CHANNELWISE_FUNCTIONS and len(node.all_input_nodes) == 1


def _calls(node: fx.Node) -> list[str]:
    """How people call what a node does."""
    fused = str(node.args[2]) if node.op == "call_module" and len(node.args) == 3 else "none"
    return [describe(node) if node.op != "call_module" else str(node.target), *([fused] if fused != "none" else [])]


def _part(
    model: nn.Module,
    inputs: Sequence[fx.Node],
    values: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    output: tuple[fx.Node, ...] | None,
) -> Callable[..., Any]:
    """A function of the values and inputs that runs some of the nodes; without an output, the last node is it."""
    part, new = fx.Graph(), {}
    for node in (*values, *inputs):
        new[node] = part.placeholder(node.name)
    for node in nodes:
        if node.op != "placeholder":
            new[node] = part.node_copy(node, new.__getitem__)
    if output is not None:
        part.output(tuple(new[node] for node in output))
    return as_function(part, model)


def overwritten(stem: Stem, model: nn.Module, inputs: Sequence[Any]) -> str:
    """Why the stem's values cannot be shared, found by running it once: something behind it writes into them."""
    with unchanged(model), torch.no_grad():
        model.train()
        values = stem.run(model, *inputs)
        before = [value._version for value in values]
        stem.rest(model, *values, *inputs)
    changed = any(value._version != version for value, version in zip(values, before, strict=True))
    return "the network changes the stem's output in place" if changed else ""
