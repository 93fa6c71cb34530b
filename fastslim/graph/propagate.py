"""Follow the channels through a recorded forward: which unit each channel of each tensor belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fastslim.graph.capture import LAYERS, Captured
from fastslim.graph.report import Finding
from fastslim.graph.units import Part, Parts, UnitTable


@dataclass(frozen=True)
class Channels:
    """A tensor whose dimension `dim` holds channels of units."""

    dim: int
    parts: Parts


@dataclass(frozen=True)
class Size:
    """A number that counts the active channels of `parts`."""

    parts: Parts


# What is known of a value: channels, a channel count, a tuple of such, or None (does not depend on any width).
Known = Channels | Size | tuple | None
Rule = Callable[["Propagation", fx.Node], Known]


class NotUnderstoodError(Exception):
    """A rule cannot follow the channels; its message is the reason in the report."""


@dataclass
class LayerDraft:
    """A layer while the graph is analysed; see LayerSpec."""

    name: str
    kind: str
    module: nn.Module
    inputs: Parts
    out: Parts
    positions: int = 0


class Propagation:
    """Walks recorded graphs; units and layers are shared between the walks.

    Args:
        excluded: tells for a module name whether its output must stay at full width.
        shared: ids of parameters that several modules, or the forward itself, use.
    """

    def __init__(self, excluded: Callable[[str], bool], shared: frozenset[int]) -> None:
        self.units = UnitTable()
        self.layers: dict[str, LayerDraft] = {}
        self.findings: list[Finding] = []
        self.excluded, self.shared = excluded, shared
        self.members: dict[str, Parts] = {}
        self.count_positions = True
        self._model: nn.Module = nn.Identity()
        self._known: dict[fx.Node, Known] = {}

    def walk(
        self, captured: Captured, rule_of: Callable[[fx.Node, nn.Module | None], Rule | None], count_positions: bool
    ) -> None:
        """Follows one recorded forward; `rule_of` gives the rule of a node, or None when it has none."""
        self._model, self._known, self.count_positions = captured.model, {}, count_positions
        for node in captured.graph.nodes:
            module = self.module(node) if node.op == "call_module" else None
            result: Known = None
            location = node.meta.get("location", "unknown line")
            touched = [known for known in map(self.known, node.all_input_nodes) if known is not None]
            rule = rule_of(node, module)
            try:
                if node.op == "output":
                    self.fix(touched, Finding("output", type(self._model).__name__, "the model's output"))
                elif rule is not None:
                    result = rule(self, node)
                elif touched:
                    raise NotUnderstoodError("is not understood")
            except NotUnderstoodError as reason:
                finding = Finding(describe(node, module), location, str(reason))
                self.fix(touched, finding)
                if isinstance(module, LAYERS) and finding not in self.findings:
                    self.findings.append(finding)
            if module is not None and self.excluded(str(node.target)):
                self.fix([result], Finding(str(node.target), location, "excluded by the caller"))
            if node in captured.baked:
                self.fix([result], Finding(describe(node), captured.baked[node], "steers Python code"))
            self._known[node] = None if isinstance(result, tuple) and not any(parts_of(result)) else result

    def known(self, argument: Any) -> Known:
        """What is known of an argument of a node."""
        return self._known.get(argument) if isinstance(argument, fx.Node) else None

    def channels(self, argument: Any) -> Channels | None:
        """The argument's channels, when it is a tensor that has some."""
        known = self.known(argument)
        return known if isinstance(known, Channels) else None

    def module(self, node: fx.Node) -> nn.Module:
        """The module a call_module node calls."""
        return self._model.get_submodule(str(node.target))

    def fix(self, values: Iterable[Known], finding: Finding) -> None:
        """Keeps the units of these values at full width; reported when that changes anything."""
        news = [self.units.fix(part.unit, str(finding)) for part in parts_of(values) if part.unit is not None]
        if any(news):
            self.findings.append(finding)

    def tie(self, lists: list[Parts]) -> None:
        """Makes part lists of the same tensor position change together.

        Raises:
            NotUnderstoodError: when their boundaries differ, so that prefixes of one are not prefixes of the other.
        """
        if any(all(part.unit is None for part in parts) for parts in lists):
            if any(part.unit is not None for parts in lists for part in parts):
                raise NotUnderstoodError("combines slimmable channels with full-width ones")
            return
        first = lists[0]
        for parts in lists[1:]:
            if [part.channels for part in parts] != [part.channels for part in first]:
                raise NotUnderstoodError("combines channels of differently concatenated tensors")
            for one, other in zip(first, parts, strict=True):
                if one.unit is None or other.unit is None:
                    free = one.unit if one.unit is not None else other.unit
                    if free is not None:
                        self.units.fix(free, "is combined with full-width channels")
                elif not self.units.merge(one.unit, other.unit):
                    raise NotUnderstoodError("combines channel counts that are no multiples of each other")

    def layer(
        self, node: fx.Node, kind: str, channel_dim: int, inputs: Parts | None, make_out: Callable[[Parts], Parts]
    ) -> Channels:
        """Records a call of a convolution, linear or batch-norm layer; a second call is tied to the first."""
        name, module = str(node.target), self.module(node)
        inputs = inputs or (Part(None, shape_of(node.args[0])[channel_dim]),)
        draft = self.layers.get(name)
        if draft is None:
            draft = self.layers[name] = LayerDraft(name, kind, module, inputs, make_out(inputs))
            self.members[name] = draft.out
        else:
            self.tie([draft.inputs, inputs])
        if self.count_positions:
            shape = list(shape_of(node))
            del shape[channel_dim]
            positions = 1
            for size in shape[1:]:
                positions *= size
            draft.positions += positions
        return Channels(channel_dim, draft.out)


def parts_of(values: Iterable[Known]) -> Iterable[Part]:
    """All parts in these values, however nested."""
    for value in values:
        if isinstance(value, tuple):
            yield from parts_of(value)
        elif value is not None:
            yield from value.parts


def shape_of(argument: Any) -> tuple[int, ...]:
    """The shape of a tensor argument in the recorded run; () for anything else."""
    return argument.meta["shape"] if is_tensor(argument) else ()


def is_tensor(argument: Any) -> bool:
    """Whether the argument is a node whose value is one tensor."""
    return isinstance(argument, fx.Node) and argument.meta.get("is_tensor", False)


def describe(node: fx.Node, module: nn.Module | None = None) -> str:
    """How the report calls a node: ``layer1.norm (LayerNorm)`` or ``torch.matmul``."""
    if module is not None:
        return f"{node.target} ({type(module).__name__})"
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return getattr(node.target, "__name__", str(node.target))
