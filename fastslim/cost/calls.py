"""A step of the forward at given widths, alone: what has to be called, with made-up inputs of the right shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.cost.place import Place
from fastslim.graph.steps import ForwardSteps, NumberSpec, Step, TensorSpec, find_function, specs_in
from fastslim.graph.units import active
from fastslim.mutators import ChannelMutator
from fastslim.nn import SlimLayer, SlimMultiheadAttention

Run = Callable[[], Any]
# Settings that the shapes of inputs and outputs tell, or that say nothing about a plain layer.
_TOLD_BY_SHAPES = frozenset(
    "in_channels out_channels in_features out_features num_features num_channels normalized_shape num_embeddings "
    "embedding_dim embed_dim kdim vdim num_heads head_dim num_parameters groups num_groups active_out active_heads "
    "segments out_segments training call_super_init".split()
)


class Calls:
    """Makes calls of the steps of a supernet.

    Args:
        mutator: of the supernet, which stays as it is.
        place: where they shall run.
    """

    def __init__(self, mutator: ChannelMutator, place: Place) -> None:
        self.mutator, self.place = mutator, place
        self.units = mutator.trace.units
        self.forward: ForwardSteps = mutator.trace.forward
        self._random = torch.Generator().manual_seed(0)
        self._settings: dict[str, str] = {}

    def signature(self, step: Step, widths: Sequence[int]) -> str:
        """What is called, in words that mean the same in every network: ``Conv2d(...) 1x64x56x56 -> 1x64x56x56``."""
        what = self._settings.get(step.module) if step.module else step.function or "copy"
        if what is None:
            what = self._settings[step.module] = settings(self.mutator.trace.model.get_submodule(step.module))
        given = [*step.args, *(value for _, value in step.kwargs)]
        constants = [
            str(value)
            for value in given
            if isinstance(value, (int, float, str, tuple, list)) and not any(True for _ in specs_in(value))
        ]
        made = [self.forward.activations[index] for index in step.makes]
        read, written = ([self._shown(spec, widths) for spec in specs] for specs in (specs_in(given), made))
        return f"{what} {' '.join(read + constants)} -> {' '.join(written)}"

    def _shown(self, spec: TensorSpec, widths: Sequence[int]) -> str:
        order = f"@{','.join(map(str, spec.order))}" if spec.order else ""
        return "x".join(map(str, self.shape(spec, widths))) + order

    def shape(self, spec: TensorSpec, widths: Sequence[int]) -> tuple[int, ...]:
        """The shape of a tensor for the place's batch size: an activation's first dimension holds the samples."""
        shape = [active(dim, widths, self.units)[0] for dim in spec.dims]
        if shape and not spec.stored and shape[0] % self.forward.samples == 0:
            shape[0] = shape[0] // self.forward.samples * self.place.batch_size
        return tuple(shape)

    def make(self, step: Step, widths: Sequence[int]) -> tuple[Run, bool]:
        """The step as a function without arguments, and whether it is the step itself.

        It is not when it cannot be called alone, with some other width or batch size than the recorded one; then it
        copies the step's result.
        """
        run = self._own(step, widths)
        if run is not None and _can_run(run):
            return run, True
        results = [self._tensor(self.forward.activations[index], widths) for index in (step.makes or step.reads[:1])]
        return lambda: [tensor.clone() for tensor in results], False

    def _own(self, step: Step, widths: Sequence[int]) -> Run | None:
        function: Any = self._module(step, widths) if step.module else find_function(step.function)
        if function is None:
            return None
        args = [self._value(value, widths) for value in step.args]
        kwargs = {key: self._value(value, widths) for key, value in step.kwargs}
        return lambda: function(*args, **kwargs)

    def _module(self, step: Step, widths: Sequence[int]) -> nn.Module:
        layer = self.mutator.layers.get(step.module)
        if layer is None:
            plain = copy.deepcopy(self.mutator.trace.model.get_submodule(step.module))
        else:
            plain = self._plain(layer, step.module, widths)
        return self.place.moved(plain)

    def _plain(self, layer: SlimLayer, name: str, widths: Sequence[int]) -> nn.Module:
        spec = self.mutator.trace.layers[name]
        at_width = copy.copy(layer)  # shares the weights, but not the width
        at_width.__dict__.update(spec.state(widths))
        if isinstance(at_width, SlimMultiheadAttention):
            query, key, value = (active(dim, widths, spec.units)[0] for dim in (spec.input_dim, spec.key, spec.value))
            return at_width.to_torch(query, key_channels=key, value_channels=value)
        return at_width.to_torch(active(spec.input_dim, widths, spec.units)[0])

    def _value(self, value: Any, widths: Sequence[int]) -> Any:
        if isinstance(value, TensorSpec):
            return self._tensor(value, widths)
        if isinstance(value, NumberSpec):
            return active(value.dim, widths, self.units)[0] // value.divisor
        if isinstance(value, (tuple, list)):
            return type(value)(self._value(item, widths) for item in value)
        if isinstance(value, dict):
            return {key: self._value(item, widths) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._value(item, widths) for item in (value.start, value.stop, value.step)))
        return value

    def _tensor(self, spec: TensorSpec, widths: Sequence[int]) -> Tensor:
        shape = self.shape(spec, widths)
        if not spec.dtype.is_floating_point:
            return torch.zeros(shape, dtype=spec.dtype, device=self.place.device)
        values = torch.rand([shape[dim] for dim in spec.order] or shape, generator=self._random)
        values = values.to(self.place.device, self.place.dtype)
        if spec.order:
            return values.permute([spec.order.index(dim) for dim in range(len(shape))])
        return self.place.laid_out(values)


def _can_run(run: Run) -> bool:
    try:
        with torch.inference_mode():
            run()
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return True


def settings(module: nn.Module) -> str:
    """A module's class and settings, without its channels."""
    kind = getattr(module, "_plain", type(module)).__name__
    values = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key not in _TOLD_BY_SHAPES
        and isinstance(value, (int, float, str, tuple, type(None)))
    }
    groups: Any = getattr(module, "groups", 1)
    if groups > 1:  # of a depthwise convolution they follow the width
        values["groups"] = "each" if groups == getattr(module, "in_channels", None) else groups
    weights = [name for name, value in module.named_parameters() if value is not None]
    return f"{kind}({', '.join(f'{key}={value}' for key, value in sorted(values.items()))}; {' '.join(weights)})"
