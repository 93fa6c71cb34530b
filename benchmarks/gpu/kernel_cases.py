"""One benchmark case per op, direction and shape: its inputs, its call through the public op, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import arithmetic
import shapes
import torch
from prepared import Case, Inputs
from torch import Tensor

from fastslim import models, ops
from fastslim.ops.depthwise_conv2d_library import DepthwiseShape

RELU6 = 2  # its position in batch_norm_act.ACTIVATIONS


def _image(batch: int, channels: int, pixels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.randn(batch, channels, pixels, pixels, device=device)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def batch_norm_act_cases(batch: int, listed: tuple[shapes.Norm, ...] = shapes.NORMS) -> Iterator[Case]:
    """Training mode."""

    def inputs(shape: shapes.Norm, device: torch.device, dtype: torch.dtype) -> Inputs:
        made = {"x": _image(batch, shape.channels, shape.pixels, device, dtype)}
        if shape.residual:
            made["residual"] = _image(batch, shape.channels, shape.pixels, device, dtype)
        vectors = {name: torch.rand(shape.channels, device=device) for name in ("weight", "bias", "mean", "var")}
        return {**made, **vectors}

    def call(shape: shapes.Norm, given: Inputs) -> Tensor:
        return ops.batch_norm_act(
            given["x"], given["weight"], given["bias"], given["mean"], given["var"],
            training=True, activation=shape.activation, residual=given.get("residual"),
        )  # fmt: skip

    for shape in listed:
        images = ("x", "residual") if shape.residual else ("x",)
        for direction, cost in arithmetic.batch_norm_act(shape, batch).items():
            functions = partial(inputs, shape), partial(call, shape)
            yield Case("batch_norm_act", direction, str(shape), cost, *functions, images, ("weight", "bias"))


def depthwise_conv2d_cases(batch: int, listed: tuple[shapes.Depthwise, ...] | None = None) -> Iterator[Case]:
    """Each direction by itself."""

    def inputs(shape: shapes.Depthwise, device: torch.device, dtype: torch.dtype) -> Inputs:
        weight = torch.randn(shape.channels, 1, shape.kernel, shape.kernel, device=device)
        return {"x": _image(batch, shape.channels, shape.pixels, device, dtype), "weight": weight}

    def call(shape: shapes.Depthwise, given: Inputs) -> Tensor:
        return ops.depthwise_conv2d(given["x"], given["weight"], stride=shape.stride, padding=shape.kernel // 2)

    for shape in listed or tuple(shapes.depthwise()):
        for direction, cost in arithmetic.depthwise_conv2d(shape, batch).items():
            functions = partial(inputs, shape), partial(call, shape)
            yield Case("depthwise_conv2d", direction, str(shape), cost, *functions, ("x",), ("weight",))


def depthwise_conv2d_bn_cases(batch: int, listed: tuple[shapes.Depthwise, ...]) -> Iterator[Case]:
    """Between two batch normalisations: with ReLU6 and the statistics, and the weight gradient behind that."""

    def inputs(shape: shapes.Depthwise, device: torch.device, dtype: torch.dtype) -> Inputs:
        weight = torch.randn(shape.channels, 1, shape.kernel, shape.kernel, device=device)
        return {
            "x": _image(batch, shape.channels, shape.pixels, device, dtype),
            "dy": _image(batch, shape.channels, shape.out_pixels, device, dtype),
            "weight": weight.to(dtype),
            "prologue": torch.rand(3, shape.channels, device=device) + 0.5,
        }

    def conv(shape: shapes.Depthwise) -> DepthwiseShape:
        padding = shape.kernel // 2
        return DepthwiseShape((shape.stride, shape.stride), (padding, padding), (1, 1), (), 1)

    def forward(shape: shapes.Depthwise, given: Inputs) -> Tensor:
        x, weight, prologue = given["x"], given["weight"], given["prologue"]
        return ops.depthwise_conv2d_bn(x, weight, None, prologue, RELU6, conv(shape), True)[0]

    def backward_weight(shape: shapes.Depthwise, given: Inputs) -> Tensor:
        gradient = torch.empty_like(given["weight"], dtype=torch.float32)
        call = given["dy"], given["x"], gradient, None, given["prologue"], RELU6, conv(shape), False, False
        ops.depthwise_conv2d_bn_backward_weight(*call)
        return gradient

    for shape in listed:
        costs = arithmetic.depthwise_conv2d(shape, batch)
        for direction, call in (("forward", forward), ("backward_weight", backward_weight)):
            what = f"{shape}, {'with ReLU6 and statistics' if call is forward else 'weight gradient behind ReLU6'}"
            functions = partial(inputs, shape), partial(call, shape)
            yield Case("depthwise_conv2d_bn", "forward", what, costs[direction], *functions, (), asks=direction)


def slim_conv2d_cases(batch: int, listed: tuple[shapes.Conv, ...]) -> Iterator[Case]:
    """Dense convolutions at given widths, the weight full-size."""

    def inputs(shape: shapes.Conv, device: torch.device, dtype: torch.dtype) -> Inputs:
        weight = torch.randn(shape.c_out, shape.c_in, shape.kernel, shape.kernel, device=device)
        weight = (weight / (shape.c_in**0.5 * shape.kernel)).contiguous(memory_format=torch.channels_last)
        return {"x": _image(batch, shape.active_in, shape.pixels, device, dtype), "weight": weight}

    def call(shape: shapes.Conv, given: Inputs) -> Tensor:
        x, weight = given["x"], given["weight"]
        return ops.slim_conv2d(x, weight, stride=shape.stride, padding=shape.kernel // 2, c_out=shape.active_out)

    for shape in listed:
        for direction, cost in arithmetic.slim_conv2d(shape, batch).items():
            if shape.c_in == 3 and direction == "backward_input":
                continue  # of images
            functions = partial(inputs, shape), partial(call, shape)
            matrix = shape.kernel == shape.stride == 1  # read in place
            packed = None if matrix else (shape.active_out, shape.active_in)
            yield Case("slim_conv2d", direction, str(shape), cost, *functions, ("x",), ("weight",), packed=packed)


def slim_linear_cases(batch: int, listed: tuple[shapes.Linear, ...]) -> Iterator[Case]:
    """The classifier."""

    def inputs(shape: shapes.Linear, device: torch.device, dtype: torch.dtype) -> Inputs:
        x = torch.randn(batch, shape.active_in, device=device).to(dtype)
        return {"x": x, "weight": torch.randn(shape.c_out, shape.c_in, device=device) / shape.c_in**0.5}

    def call(shape: shapes.Linear, given: Inputs) -> Tensor:
        return ops.slim_linear(given["x"], given["weight"], c_out=shape.active_out)

    for shape in listed:
        for direction, cost in arithmetic.slim_linear(shape, batch).items():
            functions = partial(inputs, shape), partial(call, shape)
            yield Case("slim_linear", direction, str(shape), cost, *functions, ("x",), ("weight",))


def sandwich_loss_cases(listed: tuple[shapes.Loss, ...] = shapes.LOSSES) -> Iterator[Case]:
    """Losses and gradients of all subnets."""

    def inputs(shape: shapes.Loss, device: torch.device, dtype: torch.dtype) -> Inputs:
        logits = {
            f"logits{i}": torch.randn(shape.rows, shape.classes, device=device).mul(3).to(dtype)
            for i in range(1 + shape.students)
        }
        return {**logits, "target": torch.randint(shape.classes, (shape.rows,), device=device)}

    def call(shape: shapes.Loss, given: Inputs) -> Tensor:
        teacher, *students = (given[f"logits{i}"] for i in range(1 + shape.students))
        return ops.sandwich_loss(teacher, students, given["target"])

    for shape in listed:
        names = tuple(f"logits{i}" for i in range(1 + shape.students))
        for direction, cost in arithmetic.sandwich_loss(shape).items():
            yield Case(
                "sandwich_loss", direction, str(shape), cost, partial(inputs, shape), partial(call, shape), names
            )


def prefix_pack_cases(listed: dict[str, list[tuple[int, ...]]], ratio: float = 1.0) -> Iterator[Case]:
    """All weights of a network into low precision, and all gradients back into float32, at a width ratio."""

    def views(flat: Tensor, sizes: list[tuple[int, ...]], full: list[tuple[int, ...]]) -> list[Tensor]:
        parts = flat.split([math.prod(shape) for shape in full])
        return [part.view(shape)[tuple(map(slice, size))] for part, shape, size in zip(parts, full, sizes, strict=True)]

    def inputs(sizes: tuple[Any, Any], adds: bool, device: torch.device, dtype: torch.dtype) -> Inputs:
        active, full = (sum(map(math.prod, listing)) for listing in sizes)
        if adds:
            return {
                "source": torch.randn(active, device=device).to(dtype),
                "target": torch.randn(full, device=device),
            }
        return {
            "source": torch.randn(full, device=device),
            "target": torch.zeros(active, device=device, dtype=dtype),
        }

    def call(sizes: tuple[Any, Any], adds: bool, given: Inputs) -> Tensor:
        active, full = sizes
        source = views(given["source"], active, active if adds else full)
        target = views(given["target"], active, full if adds else active)
        if adds:
            ops.prefix_unpack_add(source, target)
        else:
            ops.prefix_pack([ops.Transfer(*pair) for pair in zip(source, target, strict=True)])
        return given["target"]

    for network, full in listed.items():
        active = [(*(shapes.active(channels, ratio) for channels in shape[:2]), *shape[2:]) for shape in full]
        weights = sum(map(math.prod, active))
        width = "" if ratio == 1 else f", {ratio:g} of the width"
        for adds, cost in ((False, arithmetic.prefix_pack(weights)), (True, arithmetic.prefix_unpack_add(weights))):
            what = f"{network}: {'gradients added' if adds else 'weights packed'}{width}"
            functions = partial(inputs, (active, full), adds), partial(call, (active, full), adds)
            yield Case("prefix_pack", "forward", what, cost, *functions, ())


def weight_shapes(name: str) -> list[tuple[int, ...]]:
    """Shapes of all convolution and linear weights of one of our networks."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in getattr(models, name)().parameters() if p.dim() > 1]


def network_pack_cases() -> Iterator[Case]:
    """Both networks, at full and at three quarters of the width."""
    listed = {name: weight_shapes(name) for name in ("resnet50", "mobilenet_v2")}
    for ratio in (1.0, 0.75):
        yield from prefix_pack_cases(listed, ratio)


def cases(batch: int = shapes.BATCH) -> Iterator[Case]:
    """All, the full widths first."""
    yield from depthwise_conv2d_cases(batch)
    yield from depthwise_conv2d_bn_cases(batch, shapes.MOBILENET_DEPTHWISE)
    yield from batch_norm_act_cases(batch)
    yield from sandwich_loss_cases()
    yield from network_pack_cases()
    for ratio in shapes.RATIOS:
        yield from slim_conv2d_cases(batch, tuple(shapes.convs(ratio, ratio)))
        yield from slim_linear_cases(batch, tuple(shapes.linears(ratio)))
    for ratio_in, ratio_out in ((1.0, 0.5), (0.5, 1.0)):
        yield from slim_conv2d_cases(batch, tuple(shapes.convs(ratio_in, ratio_out)))


def small_cases() -> Iterator[Case]:
    """One or two of each op, small enough for a CPU: even and odd channels, several blocks, tails."""
    batch = 2
    yield from depthwise_conv2d_cases(batch, (shapes.Depthwise(16, 1, 10), shapes.Depthwise(9, 2, 7, 5)))
    yield from depthwise_conv2d_bn_cases(batch, (shapes.Depthwise(16, 1, 10), shapes.Depthwise(9, 2, 7, 5)))
    yield from batch_norm_act_cases(batch, (shapes.Norm(16, 6, "relu"), shapes.Norm(7, 5, "silu", residual=True)))
    yield from sandwich_loss_cases((shapes.Loss(3, 37),))
    convs = shapes.Conv(16, 24, 1, 1, 6, 16, 24), shapes.Conv(16, 24, 3, 2, 7, 8, 16), shapes.Conv(9, 7, 1, 1, 5, 7, 5)
    yield from slim_conv2d_cases(batch, convs)
    yield from slim_linear_cases(batch, (shapes.Linear(24, 10, 16, 10),))
    yield from prefix_pack_cases({"small": [(16, 3, 3, 3), (24, 16, 1, 1), (9, 7, 1, 1), (10, 24)]}, 0.75)
