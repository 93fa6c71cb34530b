"""Where networks run, and in which form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastslim.errors import FastslimValueError


@dataclass(frozen=True)
class Place:
    """Where, and in which form, networks run.

    Attributes:
        device: where.
        dtype: of weights and activations.
        batch_size: samples at a time.
        channels_last: whether images lie in memory pixel by pixel.
    """

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    channels_last: bool

    def moved(self, module: nn.Module) -> nn.Module:
        """A module as it runs here."""
        module = module.to(self.device, self.dtype).eval()
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def laid_out(self, tensor: Tensor) -> Tensor:
        """An activation as it lies in memory here."""
        return tensor.contiguous(memory_format=torch.channels_last) if self._applies(tensor) else tensor

    def _applies(self, tensor: Tensor) -> bool:
        return self.channels_last and tensor.dim() == 4


def present_device(name: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        FastslimValueError: no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FastslimValueError(f"device={name!r} is not a device: use 'cpu', 'cuda' or 'cuda:1'") from error
    here = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= here:
        raise FastslimValueError(
            f"latency cannot be measured on {str(device)!r}: there are {here} CUDA devices here. Use device='cpu', or "
            "measure on the machine where the network will run"
        )
    if device.type not in ("cpu", "cuda"):
        raise FastslimValueError(f"latency cannot be measured on {str(device)!r}: use 'cpu', 'cuda' or 'cuda:1'")
    return device
