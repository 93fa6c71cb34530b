"""`BaseAlgorithm`: an architecture, and what turns a loader's batch into its inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.registry import MODELS


class Batch(NamedTuple):
    """One batch: what the network is called with, and what the loss compares its output to."""

    inputs: Any
    targets: Any

    def tensors(self) -> list[Tensor]:
        """The input tensors."""
        values = self.inputs.values() if isinstance(self.inputs, Mapping) else self.inputs
        values = (values,) if isinstance(values, Tensor) else values
        return [value for value in values if isinstance(value, Tensor)]


class BaseAlgorithm(nn.Module):
    """Holds the architecture that an algorithm trains.

    Args:
        architecture: a module, or a config dict for the registry.
        data_preprocessor: called as ``preprocessor(data, training)`` on what the loader yields; a
            callable, a config dict, or None.
        init_cfg: accepted for MMRazor's sake; the architecture's weights are kept as they are.

    Raises:
        FastslimTypeError: the architecture is neither a module nor a config dict.
    """

    def __init__(
        self,
        architecture: nn.Module | Mapping[str, Any] | None,
        data_preprocessor: Callable[..., Any] | Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(architecture, Mapping):
            architecture = MODELS.build(dict(architecture))
        if not isinstance(architecture, nn.Module):
            raise errors.FastslimTypeError(
                f"architecture should be a torch.nn.Module or a config dict, but got {type(architecture)}"
            )
        if isinstance(data_preprocessor, Mapping):
            data_preprocessor = MODELS.build(dict(data_preprocessor))
        self.architecture = architecture
        self.data_preprocessor = data_preprocessor
        self.init_cfg = init_cfg

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The architecture's output at the current width."""
        return self.architecture(*inputs, **keywords)

    def unpack(self, data: Any, *, training: bool = True) -> Batch:
        """Inputs and targets of what a loader yields.

        Args:
            data: ``(inputs, targets)``, ``dict(inputs=, data_samples=)``, ``dict(img=, gt_label=)``,
                or whatever the data preprocessor turns into one of these.
            training: what the data preprocessor is told.

        Raises:
            FastslimTypeError: none of these forms, or integer images.
            FastslimValueError: non-finite values in the inputs (checked on the CPU, where it is free).
        """
        if self.data_preprocessor is not None:
            data = self.data_preprocessor(data, training)
        if isinstance(data, Mapping) and "inputs" in data:
            batch = Batch(data["inputs"], data.get("data_samples"))
        elif isinstance(data, Mapping) and "img" in data:
            batch = Batch(data["img"], data.get("gt_label"))
        elif isinstance(data, (tuple, list)) and len(data) == 2:
            batch = Batch(*data)
        else:
            keys = f" with keys {sorted(data)}" if isinstance(data, Mapping) else ""
            raise errors.FastslimTypeError(
                "a batch should be (inputs, targets), dict(inputs=, data_samples=) or dict(img=, gt_label=), "
                f"but got {type(data).__name__}{keys}; a data_preprocessor can turn it into one"
            )
        for tensor in batch.tensors():
            _check_images(tensor)
        return batch

    def call(self, network: nn.Module, inputs: Any) -> Any:
        """Calls a network with one tensor, a tuple of arguments, or a dict of keywords."""
        if isinstance(inputs, Mapping):
            return network(**inputs)
        return network(*inputs) if isinstance(inputs, (tuple, list)) else network(inputs)


def _check_images(tensor: Tensor) -> None:
    if tensor.dim() == 4 and not tensor.dtype.is_floating_point:
        raise errors.FastslimTypeError(
            f"the images are {tensor.dtype}; convert them first: images.float() / 255, then normalise"
        )
    if tensor.device.type == "cpu" and tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor.sum())):
        finite = torch.isfinite(tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)).all(1)
        bad = (~finite).nonzero().flatten().tolist()
        if bad:
            raise errors.FastslimValueError(
                f"the max_subnet pass was not started: samples {bad[:8]} of the batch hold NaN or infinite values; "
                "nothing has been changed"
            )
