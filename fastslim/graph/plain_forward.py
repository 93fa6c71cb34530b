"""A module whose forward a width changes, as a `torch.fx.GraphModule` with that width written in."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastslim.errors import FastslimValueError
from fastslim.graph.norm_calls import own_batch_norm
from fastslim.graph.rewrite import RewrittenForward, Variant
from fastslim.graph.rewrite_calls import check_number, put_back, take


def plain_module(
    module: nn.Module, forward: RewrittenForward, widths: Sequence[int], memo: dict[int, Any]
) -> nn.Module:
    """The module at these widths, with its children copied.

    Args:
        module: the module.
        forward: its rewritten forward.
        widths: of all units.
        memo: of `copy.deepcopy`: which copies there are already.

    Returns:
        A module with the same arguments and, for the tensors it uses, the same state_dict keys.

    Raises:
        FastslimValueError: a part has a name that `torch.fx.GraphModule` uses itself.
    """
    for name in (*module._modules, *module._parameters, *module._buffers):
        if hasattr(fx.GraphModule, name):
            raise FastslimValueError(
                f"{type(module).__name__} cannot become a plain module: its forward mentions channel counts, and a "
                f"torch.fx.GraphModule, which it would be, has a {name!r} of its own; give self.{name} another name"
            )
    graphs = {}
    tensors: dict[str, Any] = {}
    counts = any(_counting(variant, module) for variant in forward.variants.values())
    for mode, variant in forward.variants.items():
        values = variant.compute(widths, forward.units)
        # Batches are counted in both modes, by 1 or 0, so that the modes differ in a constant only.
        graphs[mode] = _with_widths(module, variant, values, tensors, int(mode) if counts else None)
    graph = graphs[False]
    if True not in graphs or not _tell_modes_apart(graph, graphs[True]):
        _refuse_training(graph, type(module).__name__)
    children = {name: copy.deepcopy(child, memo) for name, child in module._modules.items() if child is not None}
    root = nn.Module()
    for name, child in children.items():
        root.add_module(name, child)
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None and name not in tensors:
            tensors[name] = copy.deepcopy(value, memo)
    for name, value in tensors.items():
        owner, _, key = name.rpartition(".")
        place = root.get_submodule(owner)
        place._parameters.pop(key, None)
        place._buffers.pop(key, None)
        if isinstance(value, nn.Parameter):
            place.register_parameter(key, value)
        elif key in module.get_submodule(owner)._buffers:
            place.register_buffer(key, value, key not in module.get_submodule(owner)._non_persistent_buffers_set)
        else:
            setattr(place, key, value)
    root.training = module.training
    plain = fx.GraphModule(root, graph, type(module).__name__)
    plain.training = module.training
    for name, value in vars(module).items():
        if isinstance(value, (int, float, str, bool, tuple)) and name not in vars(plain):
            plain.__dict__[name] = value
    return plain


def _attribute(root: nn.Module, name: str) -> Any:
    owner, _, key = name.rpartition(".")
    return getattr(root.get_submodule(owner), key)


def _with_widths(
    module: nn.Module, variant: Variant, values: tuple[Any, ...], tensors: dict[str, Any], batches: int | None
) -> fx.Graph:
    """The variant's graph with the module's own signature, its widths as constants, its tensors cut.

    A batch norm with a forward of its own counts `batches` with every call.
    """
    graph = fx.Graph()
    environment: dict[fx.Node, Any] = {}
    placeholders = [node for node in variant.graph.nodes if node.op == "placeholder"]
    count = sum(variant.is_input)
    for node, value in zip(placeholders[:count], _arguments(module, variant, graph), strict=True):
        environment[node] = value
    environment.update(zip(placeholders[count:], values, strict=not variant.normalises))
    if batches is not None:
        graph.call_method("add_", (graph.get_attr("num_batches_tracked"), batches))
    counting = _counting(variant, module)
    for node in variant.graph.nodes:
        if node.op == "placeholder" or node.target is put_back or node in counting:
            continue
        if node.target is check_number:
            value, recorded, place = node.args
            _assert_equal(graph, environment[value], recorded, f"a size decides at {place}")
        elif node.target is own_batch_norm:
            x, ranges = (environment[argument] for argument in node.args[1:3])
            environment[node] = _plain_norm(graph, module, x, ranges, tensors, bool(node.args[3]))
        elif node.target is take:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            whole = _attribute(module, str(source.target))
            part = take(whole.detach(), environment[node.args[1]]).clone()
            if isinstance(whole, nn.Parameter):
                part = nn.Parameter(part, requires_grad=whole.requires_grad)
            tensors.setdefault(str(source.target), part)
            environment[node] = environment[source]
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], environment.__getitem__))
        else:
            environment[node] = _copied(graph, node, environment)
    return graph


def _counting(variant: Variant, module: Any) -> set[fx.Node]:
    """Nodes by which a batch norm with a forward of its own counts batches, where only the count needs them."""
    if not variant.normalises or module.num_batches_tracked is None or module.momentum is None:
        return set()
    counts = {node for node in variant.graph.nodes if node.op == "get_attr" and node.target == "num_batches_tracked"}
    steps = {node for node in variant.graph.nodes if node.target == "add_" and node.args[0] in counts}
    return counts | steps


def _plain_norm(
    graph: fx.Graph, module: Any, x: fx.Node, ranges: Any, tensors: dict[str, Any], training: bool
) -> fx.Node:
    """``F.batch_norm`` with vectors of this width, with calibrated statistics where there are any."""
    calibrated = dict(zip(("running_mean", "running_var"), module.__dict__.get("calibrated") or (), strict=False))
    vectors = []
    for name in ("running_mean", "running_var", "weight", "bias"):
        whole = getattr(module, name)
        part = calibrated[name].clone() if name in calibrated else take(whole.detach(), ranges).clone()
        tensors.setdefault(name, nn.Parameter(part, whole.requires_grad) if isinstance(whole, nn.Parameter) else part)
        vectors.append(graph.get_attr(name))
    momentum = 0.0 if module.momentum is None else module.momentum
    return graph.call_function(F.batch_norm, (x, *vectors, training, momentum, module.eps))


def _assert_equal(graph: fx.Graph, value: fx.Node, recorded: Any, what: str) -> None:
    """A recording holds for what it was made of; with anything else the plain module fails too."""
    same = graph.call_function(operator.is_ if recorded is None else operator.eq, (value, recorded))
    message = f"this module is a recorded forward: {what}, and it was {recorded!r} with the example inputs"
    graph.call_function(torch._assert, (same, message))


def _copied(graph: fx.Graph, node: fx.Node, environment: dict[fx.Node, Any]) -> fx.Node:
    args = fx.node.map_arg(node.args, environment.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, environment.__getitem__)
    return graph.create_node(node.op, node.target, args, kwargs, node.name)


def _arguments(module: nn.Module, variant: Variant, graph: fx.Graph) -> Iterator[fx.Node]:
    """The recorded inputs, taken out of the arguments of the module's own signature."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    given = {}
    for parameter in parameters:
        name = stars.get(parameter.kind, "") + parameter.name
        default = {} if parameter.default is parameter.empty else {"default_value": parameter.default}
        given[parameter.name] = graph.placeholder(name, **default)
    leaves = iter(zip(variant.is_input, variant.leaves, strict=True))
    (_, names), structures = variant.binding

    def inputs(value: fx.Node, structure: Any, name: str) -> Iterator[fx.Node]:
        if structure is None:
            is_input, recorded = next(leaves)
            if is_input:
                yield value
            elif recorded is None or isinstance(recorded, (int, float, str)):
                _assert_equal(graph, value, recorded, f"the argument {name} is a constant")
            return
        (_, keys), inner = structure
        for key, part in zip(range(keys) if isinstance(keys, int) else keys, inner, strict=True):
            yield from inputs(graph.call_function(operator.getitem, (value, key)), part, name)

    for name, structure in zip(names, structures, strict=True):
        yield from inputs(given[name], structure, name)


def _refuse_training(graph: fx.Graph, name: str) -> None:
    """A graph is one sequence of operations; in the other mode it would be wrong without a word."""
    message = f"{name} computes something else in training mode than in evaluation mode, and is exported for the latter"
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        flag = graph.create_node("get_attr", "training")
        graph.call_function(torch._assert, (graph.call_function(operator.not_, (flag,)), message + ": call eval()"))


def _tell_modes_apart(evaluated: fx.Graph, trained: fx.Graph) -> bool:
    """Where training differs in a constant only (dropout), the evaluation graph chooses by ``self.training``.

    Returns:
        Whether the evaluation graph now holds for both modes.
    """
    pairs = list(zip(evaluated.nodes, trained.nodes, strict=False))
    if len(evaluated.nodes) != len(trained.nodes) or any((a.op, a.target) != (b.op, b.target) for a, b in pairs):
        return False
    flag: list[fx.Node] = []

    def chosen(now: Any, then: Any, node: fx.Node) -> Any:
        if isinstance(now, fx.Node) or isinstance(then, fx.Node) or (type(now) is type(then) and now == then):
            return now
        if isinstance(now, (tuple, list)) and type(now) is type(then) and len(now) == len(then):
            return type(now)(chosen(a, b, node) for a, b in zip(now, then, strict=True))
        if isinstance(now, slice) and isinstance(then, slice):
            ends = ((now.start, then.start), (now.stop, then.stop), (now.step, then.step))
            return slice(*(chosen(a, b, node) for a, b in ends))
        if not flag:
            first = next(n for n in evaluated.nodes if n.op != "placeholder")
            with evaluated.inserting_before(first):
                flag.append(evaluated.create_node("get_attr", "training"))
        with evaluated.inserting_before(node):
            return evaluated.call_function(operator.getitem, ((now, then), flag[0]))

    for a, b in pairs:
        a.args = tuple(chosen(x, y, a) for x, y in zip(a.args, b.args, strict=True))
        a.kwargs = {k: chosen(x, b.kwargs.get(k), a) for k, x in a.kwargs.items()}
    return True
