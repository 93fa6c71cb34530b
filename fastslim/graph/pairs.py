"""Convolutions and the batch norms behind them as one call each, in a graph that is about to become code."""

from __future__ import annotations

from torch import fx, nn

from fastslim.nn import SlimBatchNorm2d, SlimConv2d
from fastslim.nn.conv_batch_norm import conv_batch_norm_of


def with_pairs(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """A copy of the graph in which a batch norm that alone reads a convolution is called together with it."""
    copied = fx.Graph()
    output = copied.graph_copy(graph, {})
    if output is not None:
        copied.output(output)
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
    return copied


def _only_layers_between(conv: fx.Node, norm: fx.Node, layers: dict[fx.Node, nn.Module]) -> bool:
    """Whether what runs between the two, which now runs before both, leaves the convolution's input alone."""
    node = conv.next
    while node is not norm:
        ours = type(layers.get(node)) in (SlimConv2d, SlimBatchNorm2d)
        if not ours and getattr(node.target, "__name__", "") != "conv_batch_norm_call":
            return False
        node = node.next
    return True
