"""Fuse batch norm with the residual add and the activation behind it, in a recorded forward."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastslim.graph.known import is_tensor, shape_of
from fastslim.nn import SlimBatchNorm2d, SwitchableBatchNorm2d

_ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")


def fuse_batch_norms(
    graph: fx.Graph, module_of: Callable[[fx.Node], nn.Module], watched: Callable[[fx.Node], bool]
) -> tuple[int, int, list[str]]:
    """Replaces batch norm, an add and an activation by one call ``bn(x, residual, activation)``, in place.

    Args:
        graph: a recorded forward; nodes carry shapes.
        module_of: the module a call_module node calls.
        watched: whether someone looks at the output of the module that a node calls.

    Returns:
        How many batch norms took an activation in, how many a residual, and why the others are left.
    """
    activations = residuals = 0
    left: list[str] = []
    order = {node: i for i, node in enumerate(graph.nodes)}
    # The later one of two batch norms that are added takes the other as its residual.
    for bn in sorted((n for n in graph.nodes if n.op == "call_module"), key=order.__getitem__, reverse=True):
        module = module_of(bn)
        if type(module) not in (SlimBatchNorm2d, SwitchableBatchNorm2d):
            continue
        if watched(bn) or len(bn.args) != 1 or bn.kwargs:
            left.append(f"{bn.target}: its output is watched by a hook or recorder")
            continue
        last, residual = bn, None
        add = _only_user(last)
        if add is not None and _is_add(add):
            residual, refusal = _residual_of(add, bn)
            if refusal:
                left.append(f"{bn.target}: {refusal}")
            if residual is not None:
                last = add
        activation = "none"
        act = _only_user(last)
        if act is not None and (name := _activation(act, module_of, watched)) is not None:
            last, activation = act, name
        if last is bn:
            continue
        if _changed_between(graph, bn, last, module_of):
            left.append(f"{bn.target}: its input is changed in place before the activation")
            continue
        with graph.inserting_before(last):
            fused = graph.call_module(str(bn.target), (bn.args[0], residual, activation))
        fused.meta = dict(last.meta)
        order[fused] = order[last]
        last.replace_all_uses_with(fused)
        for node in dict.fromkeys((last, add if residual is not None else last, bn)):
            if node is not None:
                graph.erase_node(node)
        activations += activation != "none"
        residuals += residual is not None
    return activations, residuals, left[::-1]


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_add(node: fx.Node) -> bool:
    named = node.op == "call_function" and node.target in _ADD_FUNCTIONS
    return (named or (node.op == "call_method" and node.target in _ADD_METHODS)) and len(node.args) == 2


def _residual_of(add: fx.Node, bn: fx.Node) -> tuple[fx.Node | None, str]:
    """The other operand of an addition, or why it cannot be fused."""
    first, second = add.args
    other = second if first is bn else first
    if not is_tensor(other) or other is bn or add.kwargs:
        return None, ""
    assert isinstance(other, fx.Node)
    if shape_of(other) != shape_of(bn):
        return None, "what is added has another shape"
    in_place = add.target is operator.iadd or str(add.target) == "add_"
    if in_place and first is other and len(other.users) > 1:
        return None, "it is added in place to a tensor that others use"
    return other, ""


def _activation(
    node: fx.Node, module_of: Callable[[fx.Node], nn.Module], watched: Callable[[fx.Node], bool]
) -> str | None:
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    if node.op == "call_module":
        return None if watched(node) else _ACTIVATION_MODULES.get(type(module_of(node)))
    if node.op == "call_function":
        return _ACTIVATION_FUNCTIONS.get(node.target)
    return _ACTIVATION_METHODS.get(str(node.target)) if node.op == "call_method" else None


def _changed_between(graph: fx.Graph, bn: fx.Node, last: fx.Node, module_of: Callable[[fx.Node], nn.Module]) -> bool:
    """Whether a node between the two writes into the batch norm's input, which is read only at `last` when fused."""
    node = bn.next
    while node is not last:
        if bn.args[0] in node.all_input_nodes:
            name = getattr(node.target, "__name__", str(node.target))
            module = module_of(node) if node.op == "call_module" else None
            in_place = node.kwargs.get("inplace") or getattr(module, "inplace", False)
            if in_place or (module is None and (name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv"))):
                return True
        node = node.next
    return False
