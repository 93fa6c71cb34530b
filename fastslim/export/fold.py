"""Multiply batch norms into the convolutions and linear layers before them.

W' = W * g / sqrt(var + eps), b' = (b - mean) * g / sqrt(var + eps) + beta, per output channel.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastslim.errors import FastslimRuntimeError, FastslimTypeError
from fastslim.export.calls import call_with, informative
from fastslim.export.equality import require_equal

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PRODUCERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# They ask a tensor for its form, not for its values.
_QUERIES = frozenset({"dim", "size", "numel", "stride", "ndimension", "is_contiguous", "is_floating_point", "__len__"})


@torch.no_grad()
def fold_batch_norm(module: nn.Module, example_inputs: Any, *, tolerance: float | None = None) -> nn.Module:
    """A copy of a network without the batch norms that follow a convolution or linear layer directly.

    The layer before takes them over; `torch.nn.Identity` stands in their places, so that all names stay. A pair is
    left alone when something else reads the convolution's output, when one of the two is called more than once,
    shares its weights, has hooks, or is a subclass.

    Args:
        module: a plain network, such as `export_subnet` returns; it stays as it is.
        example_inputs: what it is called with: a tensor, a tuple of arguments, a dict of keyword arguments, or a
            shape. The pairs are found by running it.
        tolerance: by which part of its scale the output on them may change; by default 1e-10 in float64, 1e-5 in
            float32.

    Returns:
        The copy, in evaluation mode, for which alone it holds.

    Raises:
        FastslimRuntimeError: the output changes by more than the tolerance.
    """
    if not isinstance(module, nn.Module):
        raise FastslimTypeError(f"fold_batch_norm takes a torch.nn.Module, got {type(module).__name__}")
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    folded = copy.deepcopy(module).eval()
    call = informative(call_with(folded, example_inputs))
    # In float64, where rounding hides no mistake; in its own dtype a network that names it.
    watch = _Watch(folded.double())
    try:
        expected = watch.run(call := call.cast(torch.float64))
    except FastslimRuntimeError:
        folded = copy.deepcopy(module).eval()
        call, watch = informative(call_with(folded, example_inputs)), _Watch(folded)
        expected = watch.run(call)
    replaced: dict[int, nn.Module] = {}
    for norm, before in watch.pairs(expected):
        replaced[id(before)] = _fused(before, norm)
        replaced[id(norm)] = nn.Identity().eval()
    for part in list(folded.modules()):
        for key, child in part._modules.items():
            if child is not None and id(child) in replaced:
                part._modules[key] = replaced[id(child)]
    require_equal("the network without its batch norms", watch.module, call, call.of(folded), tolerance, expected)
    usual = next((dtype for dtype in dtypes.values() if dtype.is_floating_point), torch.float32)
    for name, tensor in (*folded.named_parameters(), *folded.named_buffers()):
        tensor.data = tensor.data.to(dtypes.get(name, usual if tensor.is_floating_point() else tensor.dtype))
    return folded


def _fused(before: Any, norm: Any) -> nn.Module:
    """The layer with the batch norm multiplied in; torch's own function mistakes grouped transposed convolutions."""
    fused = copy.deepcopy(before)
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    weight = before.weight
    if isinstance(before, _TRANSPOSED):  # (in, out / groups, ...)
        grouped = weight.reshape(before.groups, -1, *weight.shape[1:])
        grouped = grouped * scale.reshape(before.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = grouped.reshape(weight.shape)
    else:
        weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    bias = -norm.running_mean if before.bias is None else before.bias - norm.running_mean
    bias = bias * scale if norm.bias is None else bias * scale + norm.bias
    fused.weight = nn.Parameter(weight, before.weight.requires_grad)
    fused.bias = nn.Parameter(bias, before.weight.requires_grad)
    return fused


class _Watch(TorchFunctionMode):
    """Runs a network and sees which tensors its functions read, and which modules make them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.reads: Counter[int] = Counter()
        self.calls: Counter[int] = Counter()
        self.bare: set[int] = set()
        self.made: dict[int, nn.Module] = {}
        self.normalised: list[tuple[nn.Module, Tensor]] = []
        self.alive: list[Any] = []  # an id is told again when its tensor is gone

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in _QUERIES and (name != "__get__" or isinstance(result, Tensor)):
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    self.reads[id(value)] += 1
                    self.alive.append(value)
        return result

    def run(self, call: Any) -> Any:
        """The output; a FastslimRuntimeError names what cannot be run."""
        layers = [part for part in self.module.modules() if type(part) in (*_PRODUCERS, *_NORMS)]
        # Told before hooks are put on: whoever has some is left alone.
        self.bare = {id(part) for part in layers if not _changes_itself(part)}
        handles = [part.register_forward_hook(self._called) for part in layers]
        try:
            with self:
                return call.of(self.module)
        except Exception as error:
            raise FastslimRuntimeError(
                f"{type(self.module).__name__} cannot be run on the example inputs: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, part: nn.Module, args: tuple, output: Any) -> None:
        self.calls[id(part)] += 1
        self.alive.append((args, output))
        if type(part) in _NORMS:
            self.normalised.append((part, args[0]))
        else:
            self.made[id(output)] = part

    def pairs(self, output: Any) -> list[tuple[nn.Module, nn.Module]]:
        """(batch norm, the layer that makes its input and nothing else)."""
        for value in pytree.tree_leaves(output):
            self.reads[id(value)] += 1
        found = []
        for norm, x in self.normalised:
            before = self.made.get(id(x))
            if before is None or self.reads[id(x)] != 1 or not {id(norm), id(before)} <= self.bare:
                continue
            weights = [*before.parameters(), *norm.parameters()]
            once = all(self.calls[id(part)] == 1 for part in (norm, before))
            once = once and all(self.reads[id(weight)] == 1 for weight in weights)
            if once and norm.running_mean is not None and (not isinstance(before, nn.Linear) or x.dim() == 2):
                found.append((norm, before))
        return found


def _changes_itself(part: nn.Module) -> bool:
    """Whether hooks, a weight that is no parameter, or a forward of its own make it more than its class."""
    hooks = any(value for key, value in vars(part).items() if key.startswith("_") and "hooks" in key)
    return hooks or "forward" in vars(part) or any(isinstance(value, Tensor) for value in vars(part).values())
