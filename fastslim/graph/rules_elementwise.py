"""Rules for operations that keep every entry in its place, join tensors, or reduce dimensions."""

from __future__ import annotations

from typing import Any

from torch import fx

from fastslim.graph.known import Dim, Known, Layout, argument, is_tensor, name_of, shape_of
from fastslim.graph.parts import NotUnderstoodError, Part
from fastslim.graph.propagate import Propagation, Rule
from fastslim.graph.rules_scaled import keep_if_scaled


def broadcast(p: Propagation, node: fx.Node) -> Known:
    """Elementwise in all its tensors: dimensions that hold the same entries change together."""
    operands = [n for n in dict.fromkeys(node.all_input_nodes) if is_tensor(n)]
    return Layout(broadcast_dims(p, operands, shape_of(node)))


def broadcast_dims(p: Propagation, operands: list[fx.Node], shape: tuple[int, ...]) -> tuple[Dim, ...]:
    """The dimensions of tensors broadcast to a shape."""
    result: list[Dim] = []
    for position, size in enumerate(shape):
        dims = []
        for operand in operands:
            own = position - len(shape) + len(shape_of(operand))
            if own >= 0 and shape_of(operand)[own] == size and size > 1:
                dims.append(p.dims(operand)[own])
        result.append(p.tie_all(dims, size))
    return tuple(result)


def first(p: Propagation, node: fx.Node) -> Known:
    """As its first argument; others only lend a type, a device or a memory format."""
    source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    return Layout(p.dims(source)) if shape_of(source) == shape_of(node) else None


def module_first(p: Propagation, node: fx.Node) -> Known:
    """A module that works entry by entry."""
    return first(p, node)


def concat(p: Propagation, node: fx.Node) -> Known:
    """Along one dimension the entries stand side by side; along all others they change together."""
    tensors = argument(node, 0, "tensors")
    if isinstance(tensors, fx.Node):
        raise NotUnderstoodError("joins a computed tuple of tensors")
    tensors = [t for t in tensors if shape_of(t) != (0,)]
    shape = shape_of(node)
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0)) % len(shape)
    result: list[Dim] = []
    for d, size in enumerate(shape):
        dims = [p.dims(t)[d] for t in tensors]
        if d != dim:
            result.append(p.tie_all(dims, size))
        elif all(parts is None for parts in dims):
            result.append(None)
        else:
            sizes = [shape_of(t)[d] for t in tensors]
            result.append(
                tuple(
                    part
                    for parts, n in zip(dims, sizes, strict=True)
                    for part in (parts if parts is not None else (Part(None, n),))
                    if part.channels
                )
            )
    return Layout(tuple(result))


def stack(p: Propagation, node: fx.Node) -> Known:
    """A new dimension; along all others the entries change together."""
    tensors = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    dims = [p.tie_all([p.dims(t)[d] for t in tensors], size) for d, size in enumerate(shape_of(tensors[0]))]
    return Layout((*dims[:dim], None, *dims[dim:]))


def reduce(p: Propagation, node: fx.Node) -> Known:
    """Mean, sum, maximum, norm: the reduced dimensions are gone, over however many entries are active."""
    second = argument(node, 1, "other")
    if is_tensor(second):
        return broadcast(p, node)
    x = node.args[0] if node.args else node.kwargs.get("input")
    position = 2 if name_of(node) in ("norm", "vector_norm") else 1
    dims = argument(node, position, "dim", node.kwargs.get("axis"))
    if isinstance(dims, bool):
        dims = None
    ndim = len(shape_of(x))
    if dims is None or dims == () or dims == []:
        return None
    gone = {d % ndim for d in ([dims] if isinstance(dims, int) else dims)}
    out = next((s for s in (shape_of(node), *(shape_of(user) for user in node.users)) if s), None)
    keep = len(out) == ndim if out is not None else bool(argument(node, position + 1, "keepdim", False))
    if name_of(node) in ("sum", "nansum"):
        for d in gone:
            keep_if_scaled(p, node, p.dims(x)[d], shape_of(x)[d])
    kept = tuple(None if d in gone else dim for d, dim in enumerate(p.dims(x)) if keep or d not in gone)
    result = Layout(kept)
    return result if is_tensor(node) else (result, result)


def mixing(p: Propagation, node: fx.Node) -> Known:
    """Reorders one dimension by position or value (roll, flip, sort, topk): that one stays full."""
    x = node.args[0]
    ndim = len(shape_of(x))
    name = name_of(node)
    position = {"roll": 2, "topk": 2, "sort": 1, "argsort": 1, "flip": 1}.get(name, 1)
    default: Any = -1 if name in ("topk", "sort", "argsort") else None
    touched = argument(node, position, "dims" if name in ("roll", "flip") else "dim", default)
    if touched is None:
        touched = list(range(ndim))
    touched_dims = {d % ndim for d in ([touched] if isinstance(touched, int) else touched)}
    dims = list(p.dims(x))
    for d in touched_dims:
        p.keep_full(dims[d], "reorders the channels")
        dims[d] = None
    layout = Layout(tuple(dims))
    return layout if is_tensor(node) else (layout, layout)


_BROADCAST = (
    "add add_ sub sub_ mul mul_ div div_ true_divide floor_divide maximum minimum max min pow pow_ subtract multiply "
    "divide lerp where addcmul addcdiv rsub __rsub__ __rpow__ __rdiv__ __rtruediv__ fmod remainder atan2 eq ne lt le "
    "gt ge __eq__ __ne__ __and__ __or__ __xor__ __radd__ __rmul__ logical_and logical_or logical_xor bitwise_and "
    "bitwise_or masked_fill masked_fill_ clamp clamp_ clip clamp_min clamp_max copysign hypot __ror__ __rand__ "
    "logaddexp heaviside xlogy relu relu_ relu6 silu hardswish hardsigmoid sigmoid sigmoid_ tanh tanh_ gelu elu elu_ "
    "selu celu mish leaky_relu leaky_relu_ hardtanh hardtanh_ softplus softsign logsigmoid tanhshrink hardshrink "
    "softshrink threshold abs neg negative exp log log2 log10 log1p expm1 sqrt rsqrt square reciprocal erf erfc sin "
    "cos tan arcsin asin atan acos sinh cosh dropout dropout_ alpha_dropout feature_alpha_dropout dropout1d dropout2d "
    "dropout3d round floor ceil trunc frac sign sgn nan_to_num nan_to_num_ isnan isinf isfinite logical_not "
    "bitwise_not __invert__ float_power rrelu local_response_norm gumbel_softmax logit sinc exp2 i0 erfinv angle "
    "positive deg2rad rad2deg square_ exp_ log_ abs_ neg_ sqrt_ rsqrt_ reciprocal_ floor_ ceil_ "
    "copy_ fmax fmin lerp_ addcmul_ addcdiv_ bernoulli polygamma digamma lgamma"
).split()
_FIRST = (
    "contiguous clone detach detach_ float double half bfloat16 int long bool short char byte cpu cuda requires_grad_ "
    "to type type_as zeros_like ones_like full_like empty_like rand_like randn_like randint_like zero_ fill_ uniform_ "
    "normal_ bernoulli_ alias data real conj resolve_conj resolve_neg grad pin_memory cumsum cumprod softmax "
    "log_softmax softmin normalize stochastic_depth drop_path lift_fresh triu tril "
    "triu_ tril_ round_ logcumsumexp exponential_ random_"
).split()
_REDUCE = (
    "mean sum amax amin var std logsumexp prod any all argmax argmin median norm vector_norm nanmean nansum "
    "count_nonzero std_mean var_mean mode aminmax"
).split()

NAMED: dict[str, Rule] = {
    **dict.fromkeys(_BROADCAST, broadcast),
    **dict.fromkeys(_FIRST, first),
    **dict.fromkeys(_REDUCE, reduce),
    **dict.fromkeys(("cat", "concat", "concatenate"), concat),
    **dict.fromkeys(("roll", "flip", "sort", "topk", "argsort", "cummax", "cummin"), mixing),
    "stack": stack,
    "max": reduce,
    "min": reduce,
}
