"""What this GPU can do, measured: bytes a second of a copy, FLOPs a second of a bf16 matrix product."""

from __future__ import annotations

import timing
import torch
from arithmetic import VECTOR, Ceilings


def measure(device: torch.device, repeats: int = 20) -> Ceilings:
    """A device-to-device copy (bytes read plus bytes written) and a square product of random matrices.

    Args:
        device: the GPU; a CPU gets small ones.
        repeats: of each.
    """
    gpu = device.type == "cuda"
    size, side = (1 << 31, 8192) if gpu else (1 << 22, 256)
    source = torch.randint(0, 1 << 30, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    runs = {"copy": lambda call: target.copy_(source), "matrix": lambda call: torch.mm(a, b, out=product)}
    times = timing.interleaved(runs, device, repeats, calls=4)
    # Data sheet: nothing else here computes that much outside the tensor cores.
    return Ceilings(
        copy=2 * size / times["copy"].median * 1e6, matrix=2 * side**3 / times["matrix"].median * 1e6, vector=VECTOR
    )


def described(ceilings: Ceilings) -> str:
    """In a line."""
    return (
        f"measured ceilings: copy {ceilings.copy / 1e12:.2f} TB/s, bf16 matrix product {ceilings.matrix / 1e12:.0f} "
        "TFLOP/s"
    )


if __name__ == "__main__":
    print(described(measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
