"""Which rule follows the channels through a node."""

from __future__ import annotations

import operator
from dataclasses import is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastslim.graph import (
    rules_elementwise,
    rules_functional,
    rules_layer,
    rules_matmul,
    rules_reshape,
    rules_shape,
    rules_spatial,
    rules_take,
)
from fastslim.graph.known import Known, Size, is_tensor
from fastslim.graph.parts import NotUnderstoodError, Part, scaled
from fastslim.graph.propagate import Propagation, Rule

_NAMED: dict[str, Rule] = {
    **rules_elementwise.NAMED,
    **rules_reshape.NAMED,
    **rules_shape.NAMED,
    **rules_spatial.NAMED,
    **rules_take.NAMED,
    **rules_matmul.NAMED,
    **rules_functional.NAMED,
}
_ELEMENTWISE_MODULES = (
    "Identity ReLU ReLU6 SiLU Hardswish Hardsigmoid Sigmoid Tanh GELU ELU SELU CELU Mish LeakyReLU RReLU Hardtanh "
    "Softplus Softsign LogSigmoid Tanhshrink Hardshrink Softshrink Threshold Dropout Dropout1d Dropout2d Dropout3d "
    "AlphaDropout FeatureAlphaDropout Softmax LogSoftmax Softmin Softmax2d LocalResponseNorm "
    "Sequential"  # an empty one is a leaf, and an identity
).split()
_MODULES: dict[type[nn.Module], Rule] = {
    **{getattr(nn, name): rules_elementwise.module_first for name in _ELEMENTWISE_MODULES},
    **{
        getattr(nn, f"{name}{n}d"): rules_spatial.pooling(n)
        for name in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "LPPool")
        for n in (1, 2, 3)
        if hasattr(nn, f"{name}{n}d")
    },
    **{
        module: rules_spatial.pooling(n)
        for n in (1, 2, 3)
        for name in ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad")
        if (module := getattr(nn, f"{name}{n}d", None)) is not None
    },
    **rules_reshape.MODULES,
    **rules_spatial.MODULES,
}


def rule_of(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule that follows channels through a node, or None when there is none."""
    if module is not None:
        return rules_layer.layer_rule(module) or _MODULES.get(type(module))
    if not is_tensor(node) and "value" in node.meta:
        return number
    if node.op == "call_function":
        if node.target is operator.getitem:
            return rules_take.getitem
        if node.target is getattr:
            return attribute
        if isinstance(node.target, type) and (issubclass(node.target, tuple) or is_dataclass(node.target)):
            return container
        return _NAMED.get(_function_name(node.target))
    return _NAMED.get(str(node.target)) if node.op == "call_method" else None


def _function_name(function: Any) -> str:
    """The name of a torch function; others are not known by their names."""
    name = getattr(function, "__name__", "")
    home = getattr(function, "__module__", None) or ""
    if function is operator.setitem:
        return "setitem"
    if home.startswith("torch") or any(getattr(m, name, None) is function for m in (torch, F)):
        return name
    return ""


def attribute(p: Propagation, node: fx.Node) -> Known:
    """``x.T``, ``x.data``, or a field of an object."""
    source, name = node.args
    if not is_tensor(source):
        return None
    rule = _NAMED.get(str(name))
    return rule(p, node) if rule is not None else _refuse(str(name))


def _refuse(name: str) -> Known:
    raise NotUnderstoodError(f"Tensor.{name} is not understood")


def container(p: Propagation, node: fx.Node) -> Known:
    """A named tuple or dataclass made of tensors."""
    return tuple(p.known.get(v) for v in (*node.args, *node.kwargs.values()) if isinstance(v, fx.Node))


def number(p: Propagation, node: fx.Node) -> Known:
    """A size, or arithmetic with sizes."""
    if node.op == "call_method" and node.target == "size":
        dim = p.dims(node.args[0])[node.args[1]]
        return None if dim is None else Size(dim)
    operands = [p.known.get(a) if isinstance(a, fx.Node) else a for a in node.args]
    sizes = [k for k in operands if isinstance(k, Size)]
    tracked = [dim for a in node.all_input_nodes if is_tensor(a) for dim in p.dims(a) if dim is not None]  # numel
    if tracked:
        return Size(tuple(part for dim in tracked for part in dim), exact=False)
    if not sizes:
        return None
    values = [a.meta.get("value") if isinstance(a, fx.Node) else a for a in node.args]
    return _arithmetic(node.target, operands, values)


def _arithmetic(operation: Any, operands: list[Any], values: list[Any]) -> Size:
    one, other = operands[0], operands[-1]
    sizes = [operand for operand in operands if isinstance(operand, Size)]
    size, both = sizes[0], len(sizes) > 1
    constant = values[-1] if isinstance(one, Size) else values[0]
    if all(s.exact for s in sizes):
        if operation is operator.add and all(s.divisor == 1 for s in sizes):
            if both:
                return Size(one.parts + other.parts)
            fixed = (Part(None, constant),) if constant > 0 else ()
            if constant >= 0:
                return Size(size.parts + fixed if isinstance(one, Size) else fixed + size.parts)
        if operation is operator.mul and not both and constant > 0:
            if size.divisor == 1:
                return Size(scaled(size.parts, constant))
            if size.divisor % constant == 0:
                return Size(size.parts, size.divisor // constant)
        if operation is operator.floordiv and isinstance(one, Size) and not both and constant > 0:
            return Size(size.parts, size.divisor * constant)
    return Size(tuple(part for s in sizes for part in s.parts), exact=False)
