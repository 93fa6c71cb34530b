"""Tile configurations of the matrix kernels, and the pure functions that choose one and its split of the rows."""

from __future__ import annotations

from typing import NamedTuple

CHUNK = 128  # rows of every forward tile, and so of every chunk of partial statistics
FILLED = 264  # programs that fill a GPU: two for each of an H200's 132 multiprocessors


class Tile(NamedTuple):
    """Block sizes of an output tile `m x n`, of the summed dimension `k`, and how they are computed.

    Attributes:
        warps: of a program; multiples of 4 reach Hopper's warp-group instructions.
        stages: blocks of `k` in flight; their operands together stay under sm_80's 163 KiB.
        group: rows of tiles that are computed together, so that the weight's tiles stay in the L2.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8

    @property
    def name(self) -> str:
        """As the recorded table names it."""
        return f"{self.m}x{self.n}x{self.k}"


WIDE, SQUARE, NARROW = Tile(128, 256, 32, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4)
CORNER = Tile(64, 64, 64, 4, 4)  # of weight gradients, whose both sides may be short
SHALLOW = Tile(128, 128, 32, 8, 4)  # SQUARE where addresses need registers, too
TF32 = Tile(128, 64, 32, 4, 3)
SMALL = Tile(128, 32, 16, 8, 3)  # of products without matrix instructions, and of operands read element by element
FORWARD_TILES, FUSED_TILES = (WIDE, SQUARE, NARROW), (SQUARE, NARROW)
WEIGHT_TILES = (SQUARE, CORNER)
CONV_WEIGHT_TILES = (SHALLOW, CORNER)


class Operands(NamedTuple):
    """What a tile depends on besides the sizes.

    Attributes:
        itemsize: bytes of an element.
        multiple: elements of a 16-byte access, or 1 where widths or addresses do not allow it.
        precision: ``"ieee"`` or ``"tf32"``: how float32 is multiplied.
    """

    itemsize: int
    multiple: int
    precision: str = "ieee"

    @property
    def only_tile(self) -> Tile | None:
        """The tile of all sizes, if there is one."""
        if self.multiple == 1 or (self.itemsize == 4 and self.precision == "ieee"):
            return SMALL
        return TF32 if self.itemsize == 4 else None


def choose_tile(rows: int, n: int, operands: Operands, *, fused: bool = False, recorded: str | None = None) -> Tile:
    """The tile of an output ``(rows, n)``.

    Args:
        rows: rows of the output.
        n: columns of the output.
        operands: of the product.
        fused: a prologue or epilogue needs the registers that the widest tile has not left.
        recorded: the tile that was measured fastest, taken where it fits.
    """
    if operands.only_tile:
        return operands.only_tile
    for tile in FUSED_TILES if fused else FORWARD_TILES:
        if tile.name == recorded:
            return tile
    if n <= 64:
        return NARROW
    blocks = -(-rows // CHUNK)
    if not fused and n > 128 and blocks * -(-n // 256) >= FILLED:
        return WIDE
    return SQUARE if blocks * -(-n // 128) >= FILLED // 2 else NARROW


def choose_weight_tile(
    c_out: int, c_in: int, operands: Operands, *, taps: bool = False, recorded: str | None = None
) -> Tile:
    """The tile of a weight gradient ``(c_out, c_in)``, with `taps` of a convolution's; see :func:`choose_tile`."""
    if operands.only_tile:
        return operands.only_tile
    large, small = CONV_WEIGHT_TILES if taps else WEIGHT_TILES
    if recorded in (large.name, small.name):
        return large if recorded == large.name else small
    return small if min(c_out, c_in) <= 64 else large


def choose_splits(rows: int, tiles: int, tile: Tile) -> tuple[int, int]:
    """How many parts the sum over `rows` is cut into, and the rows of a part.

    As many as fill the GPU together with the `tiles` of the output, each at least four blocks long.
    """
    blocks = -(-rows // tile.k)
    splits = max(1, min(FILLED // max(tiles, 1), blocks // 4))
    rows_per_split = -(-blocks // splits) * tile.k
    return max(1, -(-rows // rows_per_split)), rows_per_split
