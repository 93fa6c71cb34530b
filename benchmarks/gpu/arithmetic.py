"""Paper arithmetic: the bytes and FLOPs each kernel cannot avoid, and the time they take at the chip's ceilings.

python benchmarks/gpu/arithmetic.py [batch]       prints the table; no GPU needed

Every input is read once and every output written once. Where a result needs all of a tensor before its first element
can be written (batch normalisation), the tensor is read a second time, unless it fits into the L2 cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import shapes
from shapes import Conv, Depthwise, Linear, Loss, Norm

#: Measured on an H200: a device-to-device copy, bytes read plus bytes written; a bf16 matrix product on random data.
COPY = 4.3e12
MATRIX = 790e12
#: Float32 outside the tensor cores and the L2 cache, by the data sheet.
VECTOR = 67e12
L2 = 60 << 20


class Ceilings(NamedTuple):
    """What the chip can do: bytes a second, FLOPs a second of the tensor cores and outside them."""

    copy: float = COPY
    matrix: float = MATRIX
    vector: float = VECTOR


H200 = Ceilings()


class Cost(NamedTuple):
    """What one call cannot avoid.

    Attributes:
        bytes: moved through device memory.
        flops: a multiply-add counts two.
        unit: "matrix" (tensor cores) or "vector".
    """

    bytes: int
    flops: int
    unit: str = "vector"

    def times(self, ceilings: Ceilings = H200) -> tuple[float, float]:
        """Microseconds for the bytes, and for the FLOPs."""
        rate = ceilings.matrix if self.unit == "matrix" else ceilings.vector
        return self.bytes / ceilings.copy * 1e6, self.flops / rate * 1e6

    def floor(self, ceilings: Ceilings = H200) -> float:
        """Microseconds that no version can be much faster than."""
        return max(self.times(ceilings))

    def binding(self, ceilings: Ceilings = H200) -> str:
        """What sets the floor: "bytes" or "FLOPs"."""
        moved, computed = self.times(ceilings)
        return "bytes" if moved >= computed else "FLOPs"


def batch_norm_act(shape: Norm, batch: int = shapes.BATCH, size: int = 2) -> dict[str, Cost]:
    """Forward: statistics, then apply. Backward: sums over the batch, then dx.

    With a residual and an activation the forward's output is kept as the mask; the first backward pass writes the
    masked gradient, which is the residual's, and the second reads that.
    """
    elements = batch * shape.channels * shape.pixels**2
    again = int(elements * size > L2)
    masked = shape.residual and shape.activation != "none"
    forward = 1 + again + shape.residual + 1
    backward = (2 + masked) + masked + 2 * again + 1
    return {
        "forward": Cost(forward * elements * size, (8 + shape.residual) * elements),
        "backward": Cost(backward * elements * size, 14 * elements),
    }


def depthwise_conv2d(shape: Depthwise, batch: int = shapes.BATCH, size: int = 2) -> dict[str, Cost]:
    """All three directions read one image and read or write the other; the weight is too small to count."""
    x, y = (batch * shape.channels * pixels**2 for pixels in (shape.pixels, shape.out_pixels))
    cost = Cost((x + y) * size, 2 * shape.kernel**2 * y)
    return {"forward": cost, "backward_input": cost, "backward_weight": cost}


def slim_conv2d(shape: Conv, batch: int = shapes.BATCH, size: int = 2) -> dict[str, Cost]:
    """Implicit matrix products; the weight gradient is read and written in float32."""
    rows = batch * shape.out_pixels**2
    x_full = batch * shape.pixels**2 * shape.active_in
    x = x_full if shape.kernel >= shape.stride else rows * shape.kernel**2 * shape.active_in
    return _matrix_product(rows, shape.kernel**2 * shape.active_in, shape.active_out, x, x_full, size)


def slim_linear(shape: Linear, batch: int = shapes.BATCH, size: int = 2) -> dict[str, Cost]:
    """Matrix products of one row per image."""
    x = batch * shape.active_in
    return _matrix_product(batch, shape.active_in, shape.active_out, x, x, size)


def _matrix_product(rows: int, depth: int, columns: int, x_read: int, x_full: int, size: int) -> dict[str, Cost]:
    """`x_read` elements of the input are needed; all `x_full` have a gradient."""
    y, weight = rows * columns, depth * columns
    flops = 2 * rows * depth * columns
    return {
        "forward": Cost((x_read + weight + y) * size, flops, "matrix"),
        "backward_input": Cost((y + weight + x_full) * size, flops, "matrix"),
        "backward_weight": Cost((x_read + y) * size + 8 * weight, flops, "matrix"),
    }


def sandwich_loss(shape: Loss, size: int = 2) -> dict[str, Cost]:
    """One read of every logit and one write of its gradient."""
    elements = (1 + shape.students) * shape.rows * shape.classes
    return {"forward_backward": Cost(2 * elements * size, 12 * elements)}


def prefix_pack(weights: int, size: int = 2) -> Cost:
    """Float32 weights read, a low-precision copy written."""
    return Cost(weights * (4 + size), 0)


def prefix_unpack_add(weights: int, size: int = 2) -> Cost:
    """Dense low-precision gradients read, the float32 prefixes read and written."""
    return Cost(weights * (size + 8), weights)


def all_costs(batch: int = shapes.BATCH) -> Iterator[tuple[str, str, str, Cost]]:
    """Op, direction, shape and cost of every benchmark shape at full width."""
    for op, listed in (
        (batch_norm_act, shapes.NORMS),
        (depthwise_conv2d, shapes.depthwise()),
        (slim_conv2d, shapes.convs()),
        (slim_linear, shapes.linears()),
    ):
        for shape in listed:
            for direction, cost in op(shape, batch).items():
                yield op.__name__, direction, str(shape), cost
    for shape in shapes.LOSSES:
        for direction, cost in sandwich_loss(shape).items():
            yield "sandwich_loss", direction, str(shape), cost
    for network, weights in (("ResNet-50", 25_502_912), ("MobileNetV2", 3_469_760)):
        yield "prefix_pack", "forward", network, prefix_pack(weights)
        yield "prefix_unpack_add", "backward", network, prefix_unpack_add(weights)


def table(batch: int = shapes.BATCH) -> str:
    """All floors as a Markdown table."""
    lines = [f"batch {batch}, bf16; {COPY / 1e12} TB/s, {MATRIX / 1e12:.0f} TFLOP/s", ""]
    lines += ["| op | direction | shape | MB | GFLOP | floor us | set by |", "|---|---|---|--:|--:|--:|---|"]
    lines += [
        f"| {op} | {direction} | {shape} | {cost.bytes / 1e6:.1f} | {cost.flops / 1e9:.2f} | {cost.floor():.1f} "
        f"| {cost.binding()} |"
        for op, direction, shape, cost in all_costs(batch)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(*map(int, sys.argv[1:])))
