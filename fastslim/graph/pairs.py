"""Convolutions and the batch norms behind them as one call each, in a graph that is about to become code."""

from __future__ import annotations

from torch import fx, nn

from fastslim.nn import SlimBatchNorm2d, SlimConv2d
from fastslim.nn.conv_batch_norm import conv_batch_norm_of
from fastslim.ops.shared_gradient import SharedGradient


def with_pairs(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """A copy of the graph in which a batch norm that alone reads a convolution is called together with it."""
    copied = fx.Graph()
    output = copied.graph_copy(graph, {})
    if output is not None:
        copied.output(output)
    pairs: list[fx.Node] = []
    layers = {n: model.get_submodule(str(n.target)) for n in copied.nodes if n.op == "call_module"}
    for node, norm in layers.items():
        conv = node.args[0] if node.args else None
        if type(norm) is not SlimBatchNorm2d or node.kwargs or not isinstance(conv, fx.Node):
            continue
        module = layers.get(conv)
        if type(module) is not SlimConv2d or len(conv.users) > 1 or len(conv.args) != 1 or conv.kwargs:
            continue
        if not _only_layers_between(conv, node, layers):
            continue
        with copied.inserting_before(node):
            pair = copied.call_function(conv_batch_norm_of(module, norm), (conv.args[0], *node.args[1:]))
        node.replace_all_uses_with(pair)
        copied.erase_node(node)
        copied.erase_node(conv)
        pairs.append(pair)
    for pair in pairs:
        _share_gradient(copied, pair, pairs)
    return copied


def _share_gradient(graph: fx.Graph, end: fx.Node, pairs: list[fx.Node]) -> None:
    """Lets the pair that ends a residual block hand its input's gradient to the one that begins it.

    Only pairs lie between the two, so that the beginning's backward always follows the end's.
    """
    entry = end.args[1] if len(end.args) > 1 else None
    if not isinstance(entry, fx.Node) or len(entry.users) != 2:
        return
    between, begin = [], end.args[0]
    while begin in pairs and isinstance(begin, fx.Node) and len(begin.users) == 1:
        if begin.args[0] is entry:
            break
        between.append(begin)
        begin = begin.args[0]
    else:
        return
    if begin is entry or begin.args[1:2] == (entry,):
        return
    with graph.inserting_before(begin):
        shared = graph.call_function(SharedGradient)
    begin.kwargs = {**begin.kwargs, "of_input": shared}
    end.kwargs = {**end.kwargs, "of_residual": shared}
    for pair in between:
        pair.kwargs = {**pair.kwargs, "between": shared}


def _only_layers_between(conv: fx.Node, norm: fx.Node, layers: dict[fx.Node, nn.Module]) -> bool:
    """Whether what runs between the two, which now runs before both, leaves the convolution's input alone."""
    node = conv.next
    while node is not norm:
        ours = type(layers.get(node)) in (SlimConv2d, SlimBatchNorm2d)
        if not ours and getattr(node.target, "__name__", "") != "conv_batch_norm_call":
            return False
        node = node.next
    return True
