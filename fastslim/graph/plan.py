"""The execution plan: the recorded forward with fused calls, over the model's own layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastslim.errors import FastslimError, FastslimTypeError
from fastslim.graph.capture import bind_inputs, capture, unchanged
from fastslim.graph.flat import as_function, flatten_frames
from fastslim.graph.frame import Captured, Frame
from fastslim.graph.fuse import fuse_batch_norms
from fastslim.graph.leaves import LAYERS
from fastslim.graph.rewrite import RewrittenForward, bound_leaves
from fastslim.graph.stem import Stem, overwritten, split_stem
from fastslim.graph.trace import Trace
from fastslim.nn import SlimLayer

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ExecutionPlan(nn.Module):
    """Runs a model's recorded training forward; runs the model itself when the recording does not hold any more.

    Args:
        model: the model; its submodules are shared.
        forward: its fused training forward, ``forward(model, *inputs)``.
        graph: what that was made of.
        root: what was recorded: how arguments become inputs.
        inputs: example inputs by name.
        keep: names of modules whose outputs are watched.
        skipped: modules whose own forward or hooks the plan leaves out.
        any_mode: whether forward is the same in evaluation mode.
        stem: how the forward is split where its first channels do not depend on the width; or why it is not.

    Attributes:
        stem: see above.
        shared: during a step whose passes share the stem, computes the output from the inputs in the place of
            :attr:`forward_of_model`.
    """

    stem: Stem | str
    shared: Callable[[list[Any]], Any] | None
    _model: nn.Module
    _skipped: list[nn.Module]
    _any_mode: bool

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        graph: fx.Graph,
        root: Frame,
        inputs: dict[str, Any],
        keep: tuple[str, ...],
        skipped: list[nn.Module],
        any_mode: bool,
        stem: Stem | str,
    ) -> None:
        super().__init__()
        self.stem, self.shared = stem, None
        # Not a submodule: every layer would be there twice.
        self.__dict__.update(_model=model, _inputs=inputs, _keep=keep, _skipped=skipped, _any_mode=any_mode)
        self.forward_of_model, self.graph = forward, graph
        self._binding, self._leaves = root.binding, [None if isinstance(n, fx.Node) else n for n in root.leaves]
        self._is_input = [isinstance(leaf, fx.Node) for leaf in root.leaves]
        # The dicts themselves: asking 150 modules for them at every call takes 0.4 ms, looking at them 0.01 ms.
        self._hooks: list[dict] = [getattr(module, hooks) for module in skipped for hooks in _HOOKS]
        # Attributes and children that Python code in forward may look at, as they were when it was recorded.
        self._made_for = [
            (vars(module), frozenset(vars(module)), _plain(vars(module)))
            for module in skipped
            if not isinstance(module, SlimLayer)
        ]
        self._children_then = [(module._modules, dict(module._modules)) for module in skipped if module._modules]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's forward returns."""
        holds = (
            not any(self._hooks)
            and (self._any_mode or all(module.training for module in self._skipped))
            and all(_as_then(*attributes) for attributes in self._made_for)
            and all(now == then for now, then in self._children_then)
        )
        inputs = self._inputs_of(args, kwargs) if holds else None
        if inputs is None:
            return self._model(*args, **kwargs)
        return self.run(inputs) if self.shared is None else self.shared(inputs)

    def run(self, inputs: list[Any]) -> Any:
        """The recorded forward of the tensors among the arguments."""
        return self.forward_of_model(self._model, *inputs)

    def _inputs_of(self, args: tuple, kwargs: dict[str, Any]) -> list[Any] | None:
        """The tensors among the arguments, or None when the others are not those of the recording."""
        if len(args) == 1 and not kwargs and self._is_input == [True] and isinstance(args[0], Tensor):
            return [args[0]]
        leaves, binding = bound_leaves(self._model, args, kwargs)
        if binding != self._binding or any(
            not own and (isinstance(leaf, Tensor) or leaf != then)
            for leaf, then, own in zip(leaves, self._leaves, self._is_input, strict=True)
        ):
            return None
        return [leaf for leaf, own in zip(leaves, self._is_input, strict=True) if own]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Copies and pickles record the forward anew over the copied model."""
        return _make_again, (self._model, self._inputs, self._keep, self.stem if isinstance(self.stem, str) else "")


def make_plan(
    source: Trace | nn.Module, example_inputs: Any = None, *, keep: Iterable[str] = ()
) -> tuple[nn.Module | None, list[str]]:
    """Makes a module that computes a model's training forward with fewer calls, over the very same layers.

    Batch norm, the residual add behind it and the activation behind that become one call of `SlimBatchNorm2d`. The
    plan is for training mode; on the example's shape, with random data, it is compared with the model's own forward
    once.

    Args:
        source: a trace, or a model whose layers are slim already.
        example_inputs: as for `trace`; taken from a trace.
        keep: names of modules whose inputs or outputs someone watches; their hooks are called as ever. Modules
            that have hooks already need not be named.

    Returns:
        The plan, or None when the model's own forward has to be used; and what was fused, what was not, and why.

    Raises:
        FastslimTypeError: when a model comes without example inputs.
    """
    if isinstance(source, Trace):
        model, inputs = source.model, source.example_inputs
    else:
        if example_inputs is None:
            raise FastslimTypeError("make_plan(model) needs example_inputs; or pass a trace")
        model, inputs = source, bind_inputs(source, example_inputs)
    plan, reasons = _make(model, inputs, tuple(keep))
    if plan is None:
        return None, reasons
    if difference := _difference(model, plan, inputs):
        return None, [difference]
    if isinstance(plan.stem, Stem):
        tensors = plan._inputs_of((), _random_batch(inputs))
        plan.stem = overwritten(plan.stem, model, tensors) or plan.stem
    return plan, reasons


def _make(model: nn.Module, inputs: dict[str, Any], keep: tuple[str, ...]) -> tuple[ExecutionPlan | None, list[str]]:
    named = dict(model.named_modules())
    watched = {name for name, module in named.items() if name in keep or _is_hooked(module)}
    rewritten = {name for name, module in named.items() if isinstance(vars(module).get("forward"), RewrittenForward)}
    if "" in watched:
        return None, ["the model itself is watched by a hook or recorder"]
    if "" in rewritten:
        return None, ["the model's own forward is rewritten at narrow widths"]
    opaque = frozenset(watched | rewritten)
    try:
        captured = capture(model, inputs, training=True, opaque=opaque)
        evaluated = capture(model, inputs, training=False, opaque=opaque)
        if reasons := _reasons_against(captured):
            return None, reasons
        graph = flatten_frames(captured)
        any_mode = str(graph) == str(flatten_frames(evaluated))
    except FastslimError as error:
        return None, [str(error)]
    activations, residuals, left = fuse_batch_norms(
        graph,
        lambda node: model.get_submodule(str(node.target)),
        lambda node: str(node.target) in watched,
    )
    if not activations + residuals:
        return None, ["nothing to fuse", *left]
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    fused = {str(node.target) for node in graph.nodes if node.op == "call_module" and len(node.args) == 3}
    skipped = [module for name, module in named.items() if name in fused or not _is_inside(name, called)]
    summary = f"batch norm fused with {activations} activations and {residuals} residual adds"
    kept = [
        f"{name}: runs its own forward, "
        f"because it {'is watched' if name in watched else 'is rewritten at narrow widths'}"
        for name in sorted(opaque)
        if type(named[name]) not in LAYERS and list(named[name].children())
    ]
    stem = split_stem(graph, model, lambda node: str(node.target) in watched)
    plan = ExecutionPlan(model, as_function(graph, model), graph, captured.root, inputs, keep, skipped, any_mode, stem)
    return plan, [summary, *kept, *left]


def _reasons_against(captured: Captured) -> list[str]:
    """Why a recording cannot stand for the model's forward."""
    sizes = sorted({guard.location for frame in captured.frames() for guard in frame.guards})
    reasons = [f"forward turns a size into a Python number or a branch at {place}" for place in sizes]
    for frame in captured.frames():
        reasons += [f"{frame.name or type(frame.module).__name__}: {obstacle}" for obstacle in frame.obstacles]
    return reasons


def _make_again(
    model: nn.Module, inputs: dict[str, Any], keep: tuple[str, ...], without_stem: str = ""
) -> ExecutionPlan | None:
    plan = _make(model, inputs, keep)[0]
    if plan is not None and without_stem:
        plan.stem = without_stem
    return plan


def _is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in attributes.items()
        if name != "training" and isinstance(value, (int, float, str, bool, type(None)))
    }


def _as_then(attributes: dict[str, Any], names: frozenset[str], plain: dict[str, Any]) -> bool:
    """Whether a module's plain attributes are what they were; new ones may shadow those of its class."""
    if not plain.items() <= attributes.items():  # a hundred modules are looked at in every pass
        return False
    return len(attributes) == len(names) or not _plain({k: v for k, v in attributes.items() if k not in names})


def _is_inside(name: str, called: set[str]) -> bool:
    """Whether the plan calls this module, or one that holds it."""
    pieces = name.split(".")
    return any(".".join(pieces[:n]) in called for n in range(1, len(pieces) + 1))


def _random_batch(inputs: dict[str, Any]) -> dict[str, Any]:
    """Random data of the example's shapes, at least two samples."""
    generator = torch.Generator().manual_seed(0)

    def random_batch(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        value = value.repeat(2, *[1] * (value.dim() - 1)) if value.shape[0] == 1 else value
        if not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.device, value.dtype)

    batch: dict[str, Any] = torch.utils._pytree.tree_map(random_batch, inputs)
    return batch


def _difference(model: nn.Module, plan: nn.Module, inputs: dict[str, Any]) -> str:
    """Why the plan is not what the model computes, on random data in training mode; empty when it is."""
    batch = _random_batch(inputs)
    results = []
    for module in (model, plan):
        with unchanged(model), torch.no_grad():
            model.train()
            torch.manual_seed(0)
            try:
                output = module(**batch)
            except Exception as error:
                return f"the forward fails in training mode on a random batch: {error}"
            buffers = [buffer.detach().clone() for buffer in model.buffers()]
            results.append([v for v in torch.utils._pytree.tree_leaves((output, buffers)) if isinstance(v, Tensor)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        if ours.shape != theirs.shape:
            return f"the recorded forward gives shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        bound = 1e-3 if theirs.dtype != torch.float64 else 1e-9
        if not ours.numel():
            continue
        distance = float((ours.double() - theirs.double()).abs().max())
        if not distance <= bound * (1 + float(theirs.double().abs().max())):
            return f"the recorded forward differs from the model's by {distance:.2g}"
    return ""
