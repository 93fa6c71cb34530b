"""Record torch functions while they run."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fastslim.graph.counts import Count, plain
from fastslim.graph.frame import here
from fastslim.graph.frame_nodes import DATA, INDICES, NOTHING, DataDependentError, FrameNodes, OpenFrame, depends_on
from fastslim.graph.recorder_values import fresh, plain_values, values_in

# They hand a tensor's data to Python.
_READS_DATA = frozenset(
    "item tolist numpy __bool__ __float__ __int__ __index__ __complex__ __contains__ __array__ equal allclose "
    "is_nonzero".split()
)
_RANDOM = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_ multinomial normal normal_ "
    "uniform_ random_ exponential_".split()
)
# Verdicts on float data that training code may ask for: their usual answer is taken.
_VERDICTS = frozenset(("isfinite", "isinf", "isnan"))
_SUBSCRIPTS: dict[str, Any] = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}


class FunctionRecorder(FrameNodes, TorchFunctionMode):
    """Runs torch functions, and records those that make tensors, in the frame that is open."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Runs a torch function, and records it when tensors come out."""
        kwargs = kwargs or {}
        if not self.recording or not self._stack:
            return func(*args, **kwargs)
        current, name = self._stack[-1], getattr(func, "__name__", "")
        if func is torch._C._set_grad_enabled:
            _switch_gradients(current, args[0])
            return func(*args)
        attribute = getattr(func.__self__, "__name__", "") if name in ("__get__", "__set__") else ""
        if attribute == "shape" or name == "size":
            return self._size(current, func, name, args, kwargs)
        if name == "__set__":
            current.obstacle(f"it assigns to Tensor.{attribute}")
        if name in ("__len__", "unbind", "split") and isinstance(args[0], Tensor):
            self._count_pieces(current, name, args, kwargs)
        with torch.no_grad():  # the mode that forward sees is on, to tell where it is switched
            result = func(*plain_values(args), **plain_values(_without_batch_statistics(name, args, kwargs)))
        if name in ("numel", "nelement"):
            return Count(result, self._describe_call(current, func, name, args, kwargs, result), self)
        if not any(isinstance(value, Tensor) for value in values_in(result)):
            if name in _READS_DATA:
                self._read(current, args[0])
            if name == "__setitem__":
                self._describe_call(current, func, name, args, kwargs, result)
            return result
        if attribute:
            node = current.frame.graph.call_function(getattr, (self._node(current, args[0]), attribute))
            node.meta["location"] = here()
        else:
            node = self._describe_call(current, func, name, args, kwargs, result)
        depends = max((depends_on(n) for n in node.all_input_nodes), default=INDICES if name in _RANDOM else NOTHING)
        if name in _VERDICTS:
            depends = min(depends, INDICES)
        if not (name.endswith("_") or kwargs.get("inplace") or "out" in kwargs):
            result = fresh(result, args)
        return self._register(current, node, result, depends)

    def _count_pieces(self, current: OpenFrame, name: str, args: tuple, kwargs: dict) -> None:
        """How many pieces Python gets is not recorded, so it is noted."""
        each = args[1] if len(args) > 1 else kwargs.get("split_size")
        if name == "split" and (isinstance(each, Count) or not isinstance(each, int)):
            return  # the rule of split sees to it that the pieces stay as many
        place = 2 if name == "split" else 1
        dim = args[place] if len(args) > place else kwargs.get("dim", 0)
        self.record_use(self._sizes(current, args[0])[0 if name == "__len__" else plain(dim)])

    def _read(self, current: OpenFrame, tensor: Tensor) -> None:
        """Python reads the values of a tensor."""
        depends = depends_on(self._node(current, tensor))
        if depends == DATA:
            raise DataDependentError(current.frame.name, here())
        if depends == INDICES:
            current.obstacle(f"it decides by tokens, masks or random numbers at {here()}")

    def _describe_call(
        self, current: OpenFrame, func: Any, name: str, args: tuple, kwargs: dict, result: Any
    ) -> fx.Node:
        graph = current.frame.graph
        arguments, named = self._argument(current, args), self._argument(current, kwargs)
        if name in _SUBSCRIPTS:
            node = graph.call_function(_SUBSCRIPTS[name], arguments, named)
        elif getattr(Tensor, name, None) is func or func is Tensor.__pow__:
            node = graph.call_method(name, arguments, named)
        else:
            node = graph.call_function(func, arguments, named)
        node.meta["location"] = here()
        if isinstance(result, (int, float)):
            node.meta["value"] = result
        return node


def _switch_gradients(current: OpenFrame, on: bool) -> None:
    """``with torch.no_grad()`` computes nothing, but a rewritten forward without it would keep graphs alive."""
    if on == torch.is_grad_enabled():
        return  # also inside an autograd.Function, whose own calls need no gradients
    graph = current.frame.graph
    if on and not current.grad_modes:
        current.obstacle("it switches gradients on")
    elif on:
        graph.call_function(torch._C._set_grad_enabled, (current.grad_modes.pop(),))
    else:
        current.grad_modes.append(graph.call_function(torch.is_grad_enabled))
        graph.call_function(torch._C._set_grad_enabled, (False,))


def _without_batch_statistics(name: str, args: tuple, kwargs: dict) -> dict:
    """Batch statistics of one example are not defined; the recorded call keeps its own mode."""
    if name == "batch_norm" and kwargs.get("training") and args[1] is not None:
        return {**kwargs, "training": False}
    return kwargs
