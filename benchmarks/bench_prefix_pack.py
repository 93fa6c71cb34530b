"""prefix_pack: all weights of ResNet-50 or MobileNetV2 into bf16 prefixes, and their gradients back, in one launch.

On a GPU against torch's loop of copies and its `_foreach` functions; on the CPU what describing the
transfers costs the host, against reading the same numbers in Python.
"""

from __future__ import annotations

import pytest
import torch

from fastslim import models
from fastslim.ops import prefix_pack
from fastslim.ops.prefix_pack import Transfer, TransferTable

NETWORKS = {"resnet50": models.resnet50, "mobilenet_v2": models.mobilenet_v2}
COPY_BANDWIDTH = 4.3e12  # bytes a second of an H200


def transfers(network: str, ratio: float, direction: str, device: str = "cuda") -> list[Transfer]:
    """A pass's weights to dense bf16, or its bf16 gradients added to the float32 ones; channels_last."""
    model = NETWORKS[network]().to(device, memory_format=torch.channels_last)
    moved = []
    for p in model.parameters():
        region = p.detach()[
            tuple(slice(max(1, int(size * ratio))) if size > 3 else slice(size) for size in p.shape[:2])
        ]
        layout = torch.channels_last if p.dim() == 4 else torch.contiguous_format
        low = torch.float32 if p.dim() == 1 else torch.bfloat16
        packed = torch.zeros_like(region, dtype=low, memory_format=layout)
        moved.append(Transfer(region, packed) if direction == "pack" else Transfer(packed, region, True))
    return moved


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [1.0, 0.5], ids=["full", "half"])
@pytest.mark.parametrize("direction", ["pack", "unpack_add"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("way", ["once", "table"])
def test_prefix_pack_on_a_gpu(against, benchmark, way, network, direction, ratio):
    moved = transfers(network, ratio, direction)
    sources, targets, _ = map(list, zip(*moved, strict=True))
    ours = TransferTable(moved).run if way == "table" else lambda: prefix_pack(moved)

    def loop():
        for source, target, add in moved:
            target.add_(source) if add else target.copy_(source)

    def foreach():
        torch._foreach_copy_(targets, sources) if direction == "pack" else torch._foreach_add_(targets, sources)

    def synchronised(run):
        def timed():
            run()
            torch.cuda.synchronize()

        return timed

    size = sum((1 + t.add) * t.target.nbytes + t.source.nbytes for t in moved)
    benchmark.extra_info["floor"] = f"{size / COPY_BANDWIDTH * 1e3:.3f} ms for {size / 1e6:.0f} MB"
    against(synchronised(ours), loop=synchronised(loop), foreach=synchronised(foreach))


@pytest.mark.parametrize("network", NETWORKS)
def test_describing_the_transfers_on_the_host(against, network):
    moved = transfers(network, 0.5, "pack", device="cpu")
    sources, targets, add = map(list, zip(*moved, strict=True))

    def in_python():
        return [
            (source.data_ptr(), target.data_ptr(), source.shape, source.stride(), target.stride(), source.dtype)
            for source, target in zip(sources, targets, strict=True)
        ]

    against(lambda: torch.ops.fastslim.prefix_pack_table(sources, targets, add, False, 0), python=in_python)
