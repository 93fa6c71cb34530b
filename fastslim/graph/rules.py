"""Rules for operations without channels of their own: elementwise, pooling, concatenation, reductions, arithmetic."""

from __future__ import annotations

import operator
from dataclasses import is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastslim.graph import layer_rules, shape_rules
from fastslim.graph.propagate import Channels, Known, NotUnderstoodError, Propagation, Rule, is_tensor, shape_of
from fastslim.graph.shape_rules import argument, no_counts
from fastslim.graph.units import Part


@no_counts
def unary(p: Propagation, node: fx.Node) -> Known:
    """Elementwise in its first argument: channels stay where they are."""
    x = p.channels(node.args[0] if node.args else node.kwargs.get("input"))
    others = [n for n in node.all_input_nodes[1:] if is_tensor(n) and max(shape_of(n), default=1) > 1]
    if others:
        raise NotUnderstoodError("combines several tensors in a way that is not followed")
    return x


@no_counts
def first_like(p: Propagation, node: fx.Node) -> Known:
    """Takes dtype or device from its second tensor only."""
    return p.channels(node.args[0])


@no_counts
def spatial(p: Propagation, node: fx.Node) -> Known:
    """Pooling, interpolation, 2-d dropout: acts inside each channel of (N, C, H, W)."""
    x = p.channels(node.args[0] if node.args else node.kwargs.get("input"))
    if x is not None and (x.dim != 1 or len(shape_of(node)) != len(shape_of(node.all_input_nodes[0]))):
        raise NotUnderstoodError("works across the channels")
    return x


@no_counts
def pad(p: Propagation, node: fx.Node) -> Known:
    """Padding that leaves the channel dimension alone."""
    x = p.channels(node.args[0])
    if x is not None and shape_of(node)[x.dim] != shape_of(node.args[0])[x.dim]:
        raise NotUnderstoodError("pads channels")
    return x


@no_counts
def broadcast(p: Propagation, node: fx.Node) -> Known:
    """Elementwise in several tensors: their channels change together; a tensor of size 1 there is repeated."""
    shape = shape_of(node)
    operands = [n for n in (*node.args, *node.kwargs.values()) if is_tensor(n)]
    tracked = [(n, p.channels(n)) for n in operands]
    aligned = {x.dim + len(shape) - len(shape_of(n)) for n, x in tracked if x is not None}
    if not aligned:
        return None
    if len(aligned) > 1:
        raise NotUnderstoodError("broadcasts channels against channels of another dimension")
    dim = aligned.pop()
    lists = []
    for n, x in tracked:
        position = dim - len(shape) + len(shape_of(n))
        size = shape_of(n)[position] if position >= 0 else 1
        if size == shape[dim]:
            lists.append(x.parts if x is not None else (Part(None, size),))
    p.tie(lists)
    return Channels(dim, next(x.parts for n, x in tracked if x is not None and shape_of(n)[x.dim] == shape[dim]))


@no_counts
def concat(p: Propagation, node: fx.Node) -> Known:
    """Along the channels: the parts stand side by side; along another dimension: they change together."""
    tensors = argument(node, 0, "tensors")
    if isinstance(tensors, fx.Node):
        raise NotUnderstoodError("concatenates a tuple of tensors")
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    dim %= len(shape_of(node))
    known = [p.channels(t) for t in tensors]
    dims = {x.dim for x in known if x is not None}
    if not dims:
        return None
    if len(dims) > 1:
        raise NotUnderstoodError("concatenates tensors whose channels lie in different dimensions")
    channel_dim = dims.pop()
    lists = [
        x.parts if x is not None else (Part(None, shape_of(t)[channel_dim]),)
        for x, t in zip(known, tensors, strict=True)
    ]
    if channel_dim == dim:
        return Channels(dim, tuple(part for parts in lists for part in parts))
    p.tie(lists)
    return Channels(channel_dim, next(x.parts for x in known if x is not None))


@no_counts
def reduce(p: Propagation, node: fx.Node) -> Known:
    """Mean, sum, maximum: over other dimensions channels stay, over the channels they are gone."""
    if len(node.args) > 1 and is_tensor(node.args[1]):
        return broadcast(p, node)
    x = p.channels(node.args[0])
    if x is None:
        return None
    ndim = len(shape_of(node.args[0]))
    dims = argument(node, 1, "dim", node.kwargs.get("axis"))
    if dims is None:
        return None
    dims = {d % ndim for d in ([dims] if isinstance(dims, int) else dims)}
    if x.dim in dims:
        return None
    keeps = len(shape_of(node)) == ndim if is_tensor(node) else bool(argument(node, 2, "keepdim", False))
    result = Channels(x.dim if keeps else x.dim - sum(d < x.dim for d in dims), x.parts)
    return result if is_tensor(node) else (result, result)


def arithmetic(p: Propagation, node: fx.Node) -> Known:
    """Operators: between tensors, or between numbers that may count channels."""
    if is_tensor(node):
        return broadcast(p, node)
    return shape_rules.size_arithmetic(p, node)


def container(p: Propagation, node: fx.Node) -> Known:
    """A named tuple or dataclass made of tensors."""
    return tuple(p.known(value) for value in (*node.args, *node.kwargs.values()))


def opaque(p: Propagation, node: fx.Node) -> Known:
    """A module that is not looked into."""
    if any(p.known(n) is not None for n in node.all_input_nodes):
        raise NotUnderstoodError("is not understood")
    return None


_UNARY = (
    "relu relu_ relu6 silu hardswish hardsigmoid sigmoid sigmoid_ tanh tanh_ gelu elu elu_ selu celu mish "
    "leaky_relu leaky_relu_ hardtanh hardtanh_ softplus softsign logsigmoid tanhshrink hardshrink softshrink "
    "threshold clamp clamp_ clamp_min clamp_max abs neg exp log sqrt rsqrt square reciprocal erf sin cos "
    "dropout dropout_ alpha_dropout feature_alpha_dropout softmax log_softmax normalize "
    "contiguous clone detach float double half bfloat16 cpu cuda requires_grad_ round floor ceil sign "
    "stochastic_depth alias zero_ fill_ nan_to_num isnan logical_not"
).split()
_SPATIAL = (
    "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d lp_pool2d interpolate upsample dropout2d "
    "max_pool2d_with_indices boolean_dispatch"
).split()
_BROADCAST = (
    "add add_ sub sub_ mul mul_ div div_ true_divide maximum minimum pow pow_ subtract multiply divide "
    "lerp where addcmul rsub fmod atan2 eq ne lt le gt ge"
).split()
_REDUCE = "mean sum amax amin max min var std logsumexp prod any all argmax argmin".split()
_ARITHMETIC = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.neg,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
)
_NAMED: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, unary),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(_BROADCAST, broadcast),
    **dict.fromkeys(_REDUCE, reduce),
    **dict.fromkeys(("cat", "concat", "concatenate"), concat),
    **dict.fromkeys(("to", "type", "type_as"), first_like),
    "pad": no_counts(pad),
    **shape_rules.NAMED,
}
_MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(
        (
            nn.Identity,
            nn.ReLU,
            nn.ReLU6,
            nn.SiLU,
            nn.Hardswish,
            nn.Hardsigmoid,
            nn.Sigmoid,
            nn.Tanh,
            nn.GELU,
            nn.ELU,
            nn.SELU,
            nn.CELU,
            nn.Mish,
            nn.LeakyReLU,
            nn.RReLU,
            nn.Hardtanh,
            nn.Softplus,
            nn.Softsign,
            nn.LogSigmoid,
            nn.Tanhshrink,
            nn.Hardshrink,
            nn.Softshrink,
            nn.Threshold,
            nn.Dropout,
            nn.AlphaDropout,
            nn.Softmax,
            nn.LogSoftmax,
        ),
        unary,
    ),
    **dict.fromkeys(
        (
            nn.MaxPool2d,
            nn.AvgPool2d,
            nn.AdaptiveAvgPool2d,
            nn.AdaptiveMaxPool2d,
            nn.LPPool2d,
            nn.Dropout2d,
            nn.Upsample,
            nn.UpsamplingNearest2d,
            nn.UpsamplingBilinear2d,
        ),
        spatial,
    ),
    **dict.fromkeys((nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d), no_counts(pad)),
    nn.Flatten: shape_rules.flatten_module,
    nn.Conv2d: layer_rules.conv,
    nn.Linear: layer_rules.linear,
    nn.BatchNorm2d: layer_rules.batch_norm,
}


def rule_of(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule that follows channels through a node, or None when there is none."""
    if module is not None:
        layer = next((kind for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d) if isinstance(module, kind)), None)
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return unary
        return _MODULES.get(layer or type(module), opaque)
    if node.op == "call_function":
        if node.target in _ARITHMETIC:
            return arithmetic
        if node.target is operator.getitem:
            return shape_rules.getitem
        if isinstance(node.target, type) and (issubclass(node.target, tuple) or is_dataclass(node.target)):
            return container
        if node.target is getattr:
            return shape_rules.attribute
        return _NAMED.get(_function_name(node.target))
    return _NAMED.get(str(node.target)) if node.op == "call_method" else None


def _function_name(function: Any) -> str:
    """The name of a torch function; torchvision's stochastic_depth is the only other that is known."""
    name = getattr(function, "__name__", "")
    home = getattr(function, "__module__", None) or ""
    if function is F.max_pool2d:
        return "max_pool2d"
    return name if home.startswith("torch") or getattr(torch, name, None) is function else ""
