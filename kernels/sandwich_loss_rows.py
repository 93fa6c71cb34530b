"""The rows of sandwich_loss in Triton; the maths is written above csrc/cpu/sandwich_loss.cpp.

A program walks over rows. One that fits into a tile is read once; a longer one twice (maximum and
sum; loss and gradient). Row-wise numbers are float64, what is computed per class float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_parts(parts, count, PARTS: tl.constexpr):
    """Finishes a sum that `count` programs have begun, in a fixed order."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + part, mask=part < count, other=0), 0)


@triton.jit
def _load(row, first, groups, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Logits [TILE] from `first` on in fp32, -inf behind the last of groups * VECTOR classes."""
    c = first + tl.arange(0, TILE)
    return tl.load(row + c, mask=c < groups * VECTOR, other=float("-inf")).to(tl.float32)


@triton.jit
def _finite(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _softmax(row, groups, inverse_tau, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Maximum of a row (0 if all are -inf) and sum of exp((x - max) / tau), read tile by tile.

    Every lane keeps its own maximum, so lanes only meet at the end.
    """
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for first in range(0, groups * VECTOR, TILE):
        x = _load(row, first, groups, TILE, VECTOR)
        higher = tl.maximum(top, x)
        shift = _finite(higher)
        total = total * tl.exp((top - shift) * inverse_tau) + tl.exp((x - shift) * inverse_tau)
        top = higher
    highest = _finite(tl.max(top, 0))
    return highest, tl.sum(total * tl.exp((top - highest) * inverse_tau), 0)


@triton.jit
def _tile_softmax(x, inverse_tau):
    """As above, of a row in one tile."""
    highest = _finite(tl.max(x, 0))
    return highest, tl.sum(tl.exp((x - highest) * inverse_tau), 0)


@triton.jit
def _cross_entropy_tile(
    x, grad, class_weight, first, groups, y, top, scale, uniform, label_grad, ignored,
    SMOOTH: tl.constexpr, GRAD: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a tile; returns the sum of weight * (x - max), for label smoothing."""
    c = first + tl.arange(0, TILE)
    inside = c < groups * VECTOR
    away = tl.where(c == y, label_grad, 0.0)
    shifted = 0.0
    if SMOOTH:
        if class_weight is None:
            weight = tl.full([TILE], 1.0, tl.float32)
        else:
            weight = tl.load(class_weight + c, mask=inside, other=0)
        shifted = tl.sum(tl.where(inside, weight * (x - top), 0.0), 0)
        away += weight * uniform
    if GRAD:
        g = tl.where(ignored, 0.0, tl.exp(x - top) * scale - away)
        tl.store(grad + c, g.to(grad.dtype.element_ty), mask=inside)
    return shifted


@triton.jit(do_not_specialize=["count", "rows", "groups", "ignore_index"])
def sandwich_loss_cross_entropy_kernel(
    teacher, target, class_weight, parts, count, grad, losses, rows, groups, ignore_index, hardness, smooth,
    SMOOTH: tl.constexpr, GRAD: tl.constexpr, STREAMS: tl.constexpr,
    TILE: tl.constexpr, VECTOR: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of teacher [rows, groups * VECTOR]: its gradient, and losses [programs], sums over a program's rows."""
    classes = groups * VECTOR
    stride = classes.to(tl.int64)
    ce_scale = 1.0 / sum_of_parts(parts, count, PARTS)
    if class_weight is None:
        weights = classes.to(tl.float64)
    else:
        weights = sum_of_parts(parts + PARTS, count, PARTS)
    losses_sum = tl.zeros([], tl.float64)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x_row, g_row = teacher + row * stride, grad + row * stride
        y = tl.load(target + row)
        ignored = y == ignore_index
        valid = (y >= 0) & (y < classes) & (y != ignore_index)
        if class_weight is None:
            label_weight = valid.to(tl.float64)
        else:
            label_weight = tl.load(class_weight + y, mask=valid, other=0).to(tl.float64)
        hard = tl.where(valid | ignored, hardness * label_weight, float("nan"))
        if STREAMS:
            top, sum_exp = _softmax(x_row, groups, 1.0, TILE, VECTOR)
        else:
            x = _load(x_row, 0, groups, TILE, VECTOR)
            top, sum_exp = _tile_softmax(x, 1.0)
        total = sum_exp.to(tl.float64)
        total_weight = hard + smooth * weights
        scale = (ce_scale * total_weight / total).to(tl.float32)
        uniform = (ce_scale * smooth).to(tl.float32)
        label_grad = (ce_scale * hard).to(tl.float32)
        shifted = tl.zeros([], tl.float64)
        if STREAMS:
            if GRAD or SMOOTH:
                for first in range(0, classes, TILE):
                    shifted += _cross_entropy_tile(
                        _load(x_row, first, groups, TILE, VECTOR), g_row, class_weight, first, groups, y, top, scale,
                        uniform, label_grad, ignored, SMOOTH, GRAD, TILE, VECTOR,
                    )  # fmt: skip
        else:
            shifted += _cross_entropy_tile(
                x, g_row, class_weight, 0, groups, y, top, scale, uniform, label_grad, ignored,
                SMOOTH, GRAD, TILE, VECTOR,
            )  # fmt: skip
        log_total = tl.log(total)
        x_label = tl.load(x_row + y, mask=valid, other=0).to(tl.float32)
        loss = hard * (log_total - (x_label - top).to(tl.float64))
        if SMOOTH:
            loss += smooth * (weights * log_total - shifted)
        losses_sum += tl.where(ignored, 0.0, loss)
    tl.store(losses + tl.program_id(0), losses_sum)


@triton.jit
def _kl_tile(
    t, s, grad, first, groups, t_top, s_top, inverse_tau, ratio, scale,
    GRAD: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a tile; returns the sum of e (dt - ds), see csrc/cpu/sandwich_loss.cpp."""
    dt, ds = t - t_top, s - s_top
    e, f = tl.exp(dt * inverse_tau), tl.exp(ds * inverse_tau)
    if GRAD:
        c = first + tl.arange(0, TILE)
        g = (f - e * ratio) * scale  # exactly 0 where student and teacher agree
        tl.store(grad + c, g.to(grad.dtype.element_ty), mask=c < groups * VECTOR)
    # 0 log 0 = 0, also where both logits are -inf
    return tl.sum(tl.where(e == 0.0, 0.0, e * ((dt - ds) * inverse_tau)), 0)


@triton.jit(do_not_specialize=["rows", "groups"])
def sandwich_loss_kl_kernel(
    teacher, student, grad, losses, rows, groups, inverse_tau, grad_scale,
    GRAD: tl.constexpr, STREAMS: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of student [rows, groups * VECTOR]: its gradient, and losses [programs], sums over a program's rows."""
    classes = groups * VECTOR
    stride = classes.to(tl.int64)
    losses_sum = tl.zeros([], tl.float64)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        t_row, s_row, g_row = teacher + row * stride, student + row * stride, grad + row * stride
        if STREAMS:
            t_top, t_sum = _softmax(t_row, groups, inverse_tau, TILE, VECTOR)
            s_top, s_sum = _softmax(s_row, groups, inverse_tau, TILE, VECTOR)
        else:
            t, s = _load(t_row, 0, groups, TILE, VECTOR), _load(s_row, 0, groups, TILE, VECTOR)
            t_top, t_sum = _tile_softmax(t, inverse_tau)
            s_top, s_sum = _tile_softmax(s, inverse_tau)
        t_total, s_total = t_sum.to(tl.float64), s_sum.to(tl.float64)
        ratio = (s_total / t_total).to(tl.float32)
        scale = (grad_scale / s_total).to(tl.float32)
        cross = tl.zeros([], tl.float64)
        if STREAMS:
            for first in range(0, classes, TILE):
                cross += _kl_tile(
                    _load(t_row, first, groups, TILE, VECTOR), _load(s_row, first, groups, TILE, VECTOR), g_row, first,
                    groups, t_top, s_top, inverse_tau, ratio, scale, GRAD, TILE, VECTOR,
                )  # fmt: skip
        else:
            cross += _kl_tile(
                t, s, g_row, 0, groups, t_top, s_top, inverse_tau, ratio, scale, GRAD, TILE, VECTOR
            )  # fmt: skip
        losses_sum += cross / t_total + (tl.log(s_total) - tl.log(t_total))
    tl.store(losses + tl.program_id(0), losses_sum)
