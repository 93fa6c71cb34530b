"""Rules for products: matrix products, einsum, attention, distances."""

from __future__ import annotations

import torch
from torch import fx, nn

from fastslim.graph.known import Dim, Known, Layout, argument, is_tensor, name_of, shape_of
from fastslim.graph.parts import NotUnderstoodError
from fastslim.graph.propagate import Propagation, Rule
from fastslim.graph.rules_elementwise import broadcast_dims
from fastslim.graph.rules_scaled import keep_if_scaled


def matmul(p: Propagation, node: fx.Node) -> Known:
    """``a @ b``: the summed dimensions and the batch dimensions change together."""
    a, b = (argument(node, i, n) for i, n in enumerate(("input", "other")))
    return Layout(_product(p, node, a, b))


def _product(p: Propagation, node: fx.Node, a: fx.Node, b: fx.Node) -> tuple[Dim, ...]:
    left, right, size_a, size_b = list(p.dims(a)), list(p.dims(b)), list(shape_of(a)), list(shape_of(b))
    one_a, one_b = len(size_a) == 1, len(size_b) == 1
    if one_a:
        left, size_a = [None, *left], [1, *size_a]
    if one_b:
        right, size_b = [*right, None], [*size_b, 1]
    keep_if_scaled(p, node, p.tie(left[-1], right[-2], size_a[-1]), size_a[-1])
    _produced(p, a, left[-2])
    _produced(p, b, right[-1])
    batch: list[Dim] = []
    ndim = max(len(size_a), len(size_b)) - 2
    for d in range(ndim):
        own = [(dims, sizes, d - ndim + len(sizes) - 2) for dims, sizes in ((left, size_a), (right, size_b))]
        size = max(sizes[i] for _, sizes, i in own if i >= 0)
        batch.append(p.tie_all([dims[i] for dims, sizes, i in own if i >= 0 and sizes[i] == size], size))
    tail = [*([] if one_a else [left[-2]]), *([] if one_b else [right[-1]])]
    return (*batch, *tail)


def _produced(p: Propagation, operand: fx.Node, dim: Dim) -> None:
    """A parameter that is multiplied with produces channels, as a linear layer's weight does."""
    while operand.op != "get_attr" and operand.args and isinstance(operand.args[0], fx.Node):
        if name_of(operand) not in _MOVES:
            return
        operand = operand.args[0]
    if operand.op == "get_attr" and isinstance(operand.meta.get("constant"), nn.Parameter):
        p.produce(dim, p.frame.name or type(p.model).__name__)


def added_product(p: Propagation, node: fx.Node) -> Known:
    """``torch.addmm(c, a, b)`` and ``baddbmm``."""
    batched = name_of(node).startswith("baddbmm")
    c, a = argument(node, 0, "input"), argument(node, 1, "batch1" if batched else "mat1")
    b = argument(node, 2, "batch2" if batched else "mat2")
    dims = list(_product(p, node, a, b))
    offset = len(dims) - len(shape_of(c))
    for d, (dim, size) in enumerate(zip(p.dims(c), shape_of(c), strict=True)):
        if size > 1:
            dims[offset + d] = p.tie(dims[offset + d], dim, size)
    return Layout(tuple(dims))


def einsum(p: Propagation, node: fx.Node) -> Known:
    """``torch.einsum("bhnd,bhmd->bhnm", q, k)``: equal letters change together."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str):
        raise NotUnderstoodError("is written without an equation")
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    letters: dict[str, tuple[list[Dim], int]] = {}
    for term, operand in zip(terms, operands, strict=True):
        dims, shape = p.dims(operand), shape_of(operand)
        names = _letters(term, len(shape))
        for name, dim, size in zip(names, dims, shape, strict=True):
            if size > 1:
                letters.setdefault(name, ([], size))[0].append(dim)
    tied = {name: p.tie_all(dims, size) for name, (dims, size) in letters.items()}
    if not output:
        flat = inputs.replace(",", "")
        output = "".join(sorted(c for c in set(flat) if c.isalpha() and flat.count(c) == 1))
    kept = _letters(output, len(shape_of(node)))
    for name, (_, size) in letters.items():
        if name not in kept:
            keep_if_scaled(p, node, tied[name], size)
    return Layout(tuple(tied.get(name) for name in kept))


def _letters(term: str, ndim: int) -> list[str]:
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    hidden = ndim - len(before) - len(after)
    # The hidden dimensions are aligned from the right.
    return [*before, *(f".{hidden - i}" for i in range(hidden)), *after]


def attention(p: Propagation, node: fx.Node) -> Known:
    """``F.scaled_dot_product_attention(q, k, v, mask)``: heads change together."""
    q, k, v = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    dq, dk, dv = (list(p.dims(x)) for x in (q, k, v))
    sq, sk = shape_of(q), shape_of(k)
    for own in (dq[-1], dk[-1]):
        p.keep_full(own, "is the size of a head, by which attention is scaled")
    p.tie(dk[-2], dv[-2], sk[-2])
    batch: list[Dim] = []
    for d in range(len(sq) - 2):
        if sq[d] == sk[d]:
            batch.append(p.tie_all([dq[d], dk[d], dv[d]], sq[d]))
        elif argument(node, 7, "enable_gqa", False) and sq[d] % sk[d] == 0 and dq[d] is not None:
            shared = p.tie_all([dk[d], dv[d]], sk[d])
            groups = p.units.divided(dq[d], sq[d] // sk[d])
            p.tie(groups, shared, sk[d])
            batch.append(dq[d])
        else:
            p.keep_full(dk[d], "repeats heads")
            p.keep_full(dv[d], "repeats heads")
            batch.append(dq[d])
    if is_tensor(mask):
        dims = [*batch, dq[-2], dk[-2]]
        for d, (dim, size) in enumerate(zip(p.dims(mask), shape_of(mask), strict=True)):
            if size > 1:
                p.tie(dims[len(dims) - len(shape_of(mask)) + d], dim, size)
    result = p._resolved(Layout((*batch, dq[-2], dv[-1])))
    return result


def distances(p: Propagation, node: fx.Node) -> Known:
    """``torch.cdist``: over the last dimension."""
    a, b = node.args[:2]
    p.tie(p.dims(a)[-1], p.dims(b)[-1], shape_of(a)[-1])
    return None


def paired_distance(p: Propagation, node: fx.Node) -> Known:
    """``F.pairwise_distance(a, b)``: over the last dimension."""
    operands = [argument(node, i, n) for i, n in enumerate(("x1", "x2"))]
    dims = list(broadcast_dims(p, operands, torch.broadcast_shapes(*map(shape_of, operands))))[:-1]
    return Layout((*dims, None) if len(shape_of(node)) > len(dims) else tuple(dims))


def similarity(p: Propagation, node: fx.Node) -> Known:
    """``F.cosine_similarity(a, b, dim)``: over one dimension."""
    operands = [argument(node, i, n) for i, n in enumerate(("x1", "x2"))]
    dims = list(broadcast_dims(p, operands, torch.broadcast_shapes(*map(shape_of, operands))))
    del dims[argument(node, 2, "dim", 1)]
    return Layout(tuple(dims))


def outer(p: Propagation, node: fx.Node) -> Known:
    """``torch.outer(a, b)``."""
    return Layout((p.dims(node.args[0])[0], p.dims(node.args[1])[0]))


_MOVES = frozenset("t T mT transpose permute contiguous to type_as".split())
NAMED: dict[str, Rule] = {
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "__matmul__", "__rmatmul__"), matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmm_"), added_product),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "cdist": distances,
    "cosine_similarity": similarity,
    "pairwise_distance": paired_distance,
    **dict.fromkeys(("outer", "ger"), outer),
}
