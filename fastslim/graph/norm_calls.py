"""Batch norms with a forward of their own (norm and activation in one class): in a rewritten forward the call of
``F.batch_norm`` becomes the slim op, on the module's own vectors and with its calibrated statistics.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fastslim.graph.known import argument
from fastslim.nn import SlimBatchNorm
from fastslim.ops.batch_norm_act import batch_norm_act
from fastslim.ops.segments import Segments, cut_optional

_VECTORS = ("running_mean", "running_var", "weight", "bias")


def norm_call(graph: fx.Graph, module: nn.Module) -> fx.Node | None:
    """The one call by which a subclass of torch's batch norm normalises with its own vectors, if there is one."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, SlimBatchNorm):
        return None
    calls = [node for node in graph.nodes if getattr(node.target, "__name__", "") == "batch_norm"]
    if len(calls) != 1:
        return None
    vectors = [argument(calls[0], i, name) for i, name in enumerate(_VECTORS, 1)]
    own = all(
        isinstance(v, fx.Node) and v.op == "get_attr" and v.target == name and list(v.users) == calls
        for v, name in zip(vectors, _VECTORS, strict=True)
    )
    return calls[0] if own else None


def own_batch_norm(module: Any, x: Tensor, ranges: Any, training: bool) -> Tensor:
    """``F.batch_norm`` with the active part of a module's vectors.

    Args:
        module: a subclass of torch's batch norm.
        x: (N, c, ...).
        ranges: ``((c, segments),)`` of its vectors.
        training: whether batch statistics are used.
    """
    segments: Segments | None = None if ranges[0] is None else ranges[0][1]
    calibrated = module.__dict__.get("calibrated")
    if training or calibrated is None:
        return batch_norm_act(
            x,
            module.weight,
            module.bias,
            module.running_mean,
            module.running_var,
            training=training,
            momentum=_average_factor(module),
            eps=module.eps,
            segments=segments,
        )
    weight, bias = (cut_optional(vector, 0, segments, x.shape[1]) for vector in (module.weight, module.bias))
    mean, var = calibrated
    return batch_norm_act(x, weight, bias, mean, var, training=False, momentum=0.0, eps=module.eps)


def _average_factor(module: Any) -> float:
    """Torch's exponential average factor; forward itself has counted the batch."""
    if module.momentum is not None:
        return module.momentum
    return 1.0 / float(module.num_batches_tracked) if module.num_batches_tracked is not None else 0.0
