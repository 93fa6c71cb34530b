"""Slim layers at narrow widths, each beside a plain torch layer that is built at that size by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.nn import SLIM_CLASSES, SlimLayer

Index = tuple[list[int] | None, ...]


@dataclass
class Case:
    """A width of a layer: what is chosen, what of each tensor it uses, and the plain layer of that size."""

    full: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    index: dict[str, Index]
    shape: tuple[int, ...]
    width: dict[str, Any] = field(default_factory=dict)
    full_shape: tuple[int, ...] = ()
    channels: int | None = None  # of the input, where neither the segments nor the outputs say it

    def slim(self) -> SlimLayer:
        torch.manual_seed(0)
        plain = randomised(self.full().double())
        layer = SLIM_CLASSES[type(plain)].from_torch(plain)
        layer.set_width(**self.width)
        return layer

    def plain(self, slim: nn.Module) -> nn.Module:
        """The small layer with the weights that the slim one uses."""
        small = self.small().double()
        theirs = slim.state_dict()
        small.load_state_dict({name: take(theirs[name], self.index.get(name, ())) for name in small.state_dict()})
        return small.train(slim.training)

    def input(self) -> Tensor:
        torch.manual_seed(1)
        if isinstance(self.small(), nn.Embedding):
            return torch.randint(0, 6, self.shape)
        return torch.randn(self.shape, dtype=torch.float64)


def randomised(layer: nn.Module) -> nn.Module:
    """The layer with no two parameters or statistics alike."""
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if name.endswith("var") else torch.randn_like(value))
    return layer


def take(tensor: Tensor, index: Index) -> Tensor:
    for dim, kept in enumerate(index):
        if kept is not None:
            tensor = tensor.index_select(dim, torch.tensor(kept))
    return tensor


def spread(small: Tensor, like: Tensor, index: Index) -> Tensor:
    """The small tensor in the places `index` names, zeros elsewhere."""
    if not like.dim():
        return small
    rows = [list(range(n)) if i >= len(index) or index[i] is None else index[i] for i, n in enumerate(like.shape)]
    full = torch.zeros_like(like)
    full[torch.meshgrid(*map(torch.tensor, rows), indexing="ij")] = small
    return full


def span(*segments: tuple[int, int]) -> list[int]:
    return [i for start, count in segments for i in range(start, start + count)]


def conv(kind: type[nn.Module], space: tuple[int, ...], transposed: bool) -> dict[str, Case]:
    """Dense, segmented, grouped and depthwise, batched and unbatched."""
    ins, outs = ((1, 2), (5, 3)), ((0, 2), (4, 1), (9, 4))
    first, last = span(*ins), span(*outs)
    size = dict(kernel_size=3, padding=1, stride=2)

    def weight(rows: list[int], columns: list[int] | None) -> dict[str, Index]:
        dims = (columns, rows) if transposed and columns is not None else (rows, columns)
        return {"weight": dims, "bias": (rows,)}

    def grouped(i: int, o: int, groups: int, kept: list[int]) -> dict[str, Index]:
        rows = [g * (o // groups) + r for g in kept for r in range(o // groups)]
        columns = [g * (i // groups) + c for g in kept for c in range(i // groups)]
        return {"weight": (columns if transposed else rows,), "bias": (rows,)}

    def case(i: int, o: int, index: dict[str, Index], shape: tuple[int, ...], full_groups=1, groups=1, **width) -> Case:
        full = (8, 16) if full_groups < 8 else (8, 8)
        return Case(
            lambda: kind(*full, **size, groups=full_groups), lambda: kind(i, o, **size, groups=groups),
            index, shape, width, channels=i,
        )  # fmt: skip

    return {
        "prefix": case(3, 5, weight(span((0, 5)), span((0, 3))), (2, 3, *space), out=5),
        "alone": case(3, 5, weight(span((0, 5)), span((0, 3))), (3, *space), out=5),
        "segments": case(5, 7, weight(last, first), (2, 5, *space), segments=ins, out_segments=outs),
        "grouped": case(4, 8, grouped(8, 16, 4, [0, 1]), (2, 4, *space), full_groups=4, groups=2, out=8),
        "grouped-segments": case(
            4, 8, grouped(8, 16, 4, [0, 2]), (2, 4, *space), full_groups=4, groups=2,
            segments=((0, 2), (4, 2)), out_segments=((0, 4), (8, 4)),
        ),
        "grouped-outputs": case(
            2, 4, grouped(8, 16, 4, [3]), (2, 2, *space), full_groups=4, groups=1, out_segments=((12, 4),)
        ),
        "depthwise": case(
            3, 3, grouped(8, 8, 8, [1, 4, 5]), (2, 3, *space), full_groups=8, groups=3,
            segments=((1, 1), (4, 2)), out_segments=((1, 1), (4, 2)),
        ),
    }  # fmt: skip


def norm(full: Callable[[], nn.Module], small: Callable[..., nn.Module], rest: tuple[int, ...], lead=(3,)) -> dict:
    """A prefix and segments of eight channels: `small(4)` is the plain layer of four."""
    names = [*full().state_dict()]

    def index(kept: list[int]) -> dict[str, Index]:
        return {name: (kept,) for name in names if name != "num_batches_tracked"}

    cuts = ((0, 2), (6, 2))
    return {
        "prefix": Case(full, lambda: small(4), index(span((0, 4))), (*lead, 4, *rest), dict(out=4)),
        "segments": Case(full, lambda: small(4), index(span(*cuts)), (*lead, 4, *rest), dict(out=4, segments=cuts)),
    }


def _all() -> dict[str, Case]:
    groups = {
        "conv1d": conv(nn.Conv1d, (7,), False),
        "conv2d": conv(nn.Conv2d, (7, 5), False),
        "conv3d": conv(nn.Conv3d, (5, 4, 3), False),
        "conv-transpose1d": conv(nn.ConvTranspose1d, (7,), True),
        "conv-transpose2d": conv(nn.ConvTranspose2d, (4, 5), True),
        "conv-transpose3d": conv(nn.ConvTranspose3d, (2, 4, 3), True),
        "linear": {
            "prefix": Case(
                lambda: nn.Linear(8, 16), lambda: nn.Linear(3, 5),
                {"weight": (span((0, 5)), span((0, 3))), "bias": (span((0, 5)),)}, (2, 4, 3), dict(out=5), channels=3,
            ),
            "qkv": Case(
                lambda: nn.Linear(8, 12), lambda: nn.Linear(4, 6),
                {"weight": (span((0, 2), (4, 2), (8, 2)), span((1, 4))), "bias": (span((0, 2), (4, 2), (8, 2)),)},
                (2, 4, 4), dict(segments=((1, 4),), out_segments=((0, 2), (4, 2), (8, 2))),
            ),
        },
        "batch-norm1d": norm(lambda: nn.BatchNorm1d(8), nn.BatchNorm1d, (), (5,)),
        "batch-norm1d-sequence": norm(lambda: nn.BatchNorm1d(8), nn.BatchNorm1d, (6,)),
        "batch-norm2d": norm(lambda: nn.BatchNorm2d(8), nn.BatchNorm2d, (6, 5)),
        "batch-norm3d": norm(lambda: nn.BatchNorm3d(8), nn.BatchNorm3d, (2, 6, 5)),
        "layer-norm": norm(lambda: nn.LayerNorm(8), nn.LayerNorm, (), (2, 3)),
        "layer-norm-no-bias": norm(lambda: nn.LayerNorm(8, bias=False), lambda c: nn.LayerNorm(c, bias=False), ()),
        "layer-norm-image": norm(lambda: nn.LayerNorm((8, 3, 2)), lambda c: nn.LayerNorm((c, 3, 2)), (3, 2)),
        "rms-norm": norm(lambda: nn.RMSNorm(8), nn.RMSNorm, ()),
        "group-norm": norm(lambda: nn.GroupNorm(4, 8), lambda c: nn.GroupNorm(c // 2, c), (5, 3)),
        "group-norm-one-group": norm(lambda: nn.GroupNorm(1, 8), lambda c: nn.GroupNorm(1, c), (5, 3)),
        "instance-norm1d": norm(
            lambda: nn.InstanceNorm1d(8, affine=True), lambda c: nn.InstanceNorm1d(c, affine=True), (6,)
        ),
        "instance-norm2d-tracking": norm(
            lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True), (6, 5),
        ),
        "instance-norm2d-alone": norm(lambda: nn.InstanceNorm2d(8), nn.InstanceNorm2d, (6, 5), ()),
        "instance-norm3d": norm(
            lambda: nn.InstanceNorm3d(8, affine=True), lambda c: nn.InstanceNorm3d(c, affine=True), (2, 6, 5)
        ),
        "prelu": norm(lambda: nn.PReLU(8), nn.PReLU, (5,)),
        "prelu-one-slope": {
            "any": Case(nn.PReLU, nn.PReLU, {}, (3, 4, 5)),
        },
        "embedding": {
            name: Case(
                lambda kwargs=kwargs: nn.Embedding(6, 8, **kwargs), lambda kwargs=kwargs: nn.Embedding(6, 4, **kwargs),
                {"weight": (None, kept)}, (2, 5), width,
            )
            for name, kept, width, kwargs in (
                ("prefix", span((0, 4)), dict(out=4), {}),
                ("segments", span((1, 2), (6, 2)), dict(out_segments=((1, 2), (6, 2))), {}),
                ("padding", span((0, 4)), dict(out=4), dict(padding_idx=2, scale_grad_by_freq=True)),
                ("sparse", span((0, 4)), dict(out=4), dict(sparse=True)),
            )
        },
    }  # fmt: skip
    return {f"{kind}-{name}": case for kind, cases in groups.items() for name, case in cases.items()}


CASES = _all()
