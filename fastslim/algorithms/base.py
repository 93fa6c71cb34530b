"""`BaseAlgorithm`: an architecture, and what turns a loader's batch into its inputs, targets and losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.algorithms.task_loss import as_scalars, check_loss, task_losses
from fastslim.contract_errors import InvalidModeError, WrongPartError
from fastslim.registry import MODELS

_MODES = ("tensor", "loss", "predict")


class Batch(NamedTuple):
    """One batch: what the network is called with, and what the loss compares its output to."""

    inputs: Any
    targets: Any

    def tensors(self) -> list[Tensor]:
        """The input tensors."""
        values = self.inputs.values() if isinstance(self.inputs, Mapping) else self.inputs
        values = (values,) if isinstance(values, Tensor) else values
        return [value for value in values if isinstance(value, Tensor)]


@MODELS.register_module()
class BaseAlgorithm(nn.Module):
    """Holds the architecture that an algorithm trains.

    An architecture is any module that returns logits, or one with modes, as OpenMMLab's models are:
    ``forward(inputs, data_samples, mode)`` with the modes "tensor", "loss" (a dict of losses) and "predict".

    Args:
        architecture: a module, or a config dict for the registry.
        data_preprocessor: called as ``preprocessor(data, training)`` on what the loader yields; a
            callable, a config dict, or None for the architecture's own, if it has one.
        init_cfg: how :meth:`init_weights` of a framework that has one (mmengine) initialises; kept here, since
            fastslim itself keeps the architecture's weights.
        loss: ``loss(output, targets)`` -> scalar or dict of scalars, for an architecture without modes;
            cross-entropy by default. A :class:`torch.nn.CrossEntropyLoss` runs as the fused kernel.
        module_inplace: leave activations that overwrite their input as they are; what a recorder has seen before
            one would be overwritten.

    Attributes:
        task_loss: `loss`.

    Raises:
        FastslimTypeError: the architecture is neither a module nor a config dict.
    """

    def __init__(
        self,
        architecture: nn.Module | Mapping[str, Any] | None,
        data_preprocessor: Callable[..., Any] | Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        *,
        loss: Callable[[Any, Any], Any] | None = None,
        module_inplace: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(architecture, Mapping):
            architecture = MODELS.build(dict(architecture))
        if not isinstance(architecture, nn.Module):
            raise WrongPartError(
                f"architecture should be a torch.nn.Module or a config dict, but got {type(architecture)}"
            )
        if isinstance(data_preprocessor, Mapping):
            data_preprocessor = MODELS.build(dict(data_preprocessor))
        if data_preprocessor is None:
            data_preprocessor = getattr(architecture, "data_preprocessor", getattr(self, "data_preprocessor", None))
        self.architecture = architecture
        self.data_preprocessor = data_preprocessor
        self.init_cfg = init_cfg
        self.task_loss = check_loss(loss)
        self.module_inplace = module_inplace
        for module in () if module_inplace else architecture.modules():
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # type: ignore[assignment]
        # Asked now: a mutator may put another forward in its place.
        self.has_modes = {"data_samples", "mode"} <= inspect.signature(architecture.forward).parameters.keys()

    def forward(self, *inputs: Any, mode: str | None = None, **keywords: Any) -> Any:
        """The architecture's output at the current width.

        Args:
            *inputs: the architecture's; with a mode ``(inputs, data_samples)``.
            mode: None or "tensor" for the output, "loss" for a dict of losses, "predict" for what an evaluator
                takes: an architecture without modes gives ``(output, targets)``.
            **keywords: the architecture's.

        Raises:
            InvalidModeError: another mode.
        """
        if mode is None:
            return self.architecture(*inputs, **keywords)
        if mode not in _MODES:
            raise InvalidModeError(f'Invalid mode "{mode}" (mode={mode!r}: {errors.nearest(mode, _MODES)})')
        if self.has_modes:
            return self.architecture(*inputs, mode=mode, **keywords)
        values, targets, *_ = *inputs, *keywords.values(), None, None
        output = self.call(self.architecture, values)
        if mode == "loss":
            return task_losses(self.task_loss, output, targets)
        return output if mode == "tensor" else (output, targets)

    def loss(self, inputs: Any, data_samples: Any = None) -> dict[str, Tensor]:
        """The losses of inputs: mode "loss"."""
        return self(inputs, data_samples, mode="loss")

    def _forward(self, inputs: Any, data_samples: Any = None) -> Any:
        """Mode "tensor", under MMRazor's name."""
        return self(inputs, data_samples, mode="tensor")

    def _predict(self, inputs: Any, data_samples: Any = None) -> Any:
        """Mode "predict", under MMRazor's name."""
        return self(inputs, data_samples, mode="predict")

    def losses_of(self, batch: Batch, network: nn.Module | None = None) -> tuple[dict[str, Tensor], Any]:
        """Losses of a batch against its targets, and the output they were made of (none of an architecture with modes).

        Args:
            batch: inputs and targets.
            network: what stands for the architecture; it must compute the same.
        """
        if self.has_modes:
            return as_scalars(self.architecture(batch.inputs, batch.targets, mode="loss")), ()
        output = self.call(network or self.architecture, batch.inputs)
        return task_losses(self.task_loss, output, batch.targets), output

    def val_step(self, data: Any) -> Any:
        """Predictions for a batch as the loader yields it, in the way of an mmengine model."""
        batch = self.unpack(data, training=False)
        return self(batch.inputs, batch.targets, mode="predict")

    def test_step(self, data: Any) -> Any:
        """As :meth:`val_step`."""
        return self.val_step(data)

    def parse_losses(self, losses: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all entries with "loss" in their names, and all entries as scalars with that sum as ``loss``."""
        scalars = as_scalars(losses)
        total: Any = sum(value for name, value in scalars.items() if "loss" in name)
        return total, {"loss": total, **scalars}

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

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts; a preprocessor with a device of its own (mmengine's) learns it from its `to`."""
        super()._apply(fn, recurse)
        first = next(self.architecture.parameters(), None) if "architecture" in self._modules else None
        if isinstance(self.data_preprocessor, nn.Module) and first is not None:
            self.data_preprocessor.to(first.device)
        return self


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
