"""A network's forward for several subnets at once: what they have in common is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fastslim.graph import Trace
from fastslim.graph.units import DimSpec
from fastslim.search.recorded_forward import NotSharedError, RecordedForward, ancestors

#: Called with the number of a subnet before something is computed for it; None is the one they are compared to.
Switch = Callable[[int | None], None]


@dataclass(frozen=True, eq=False)
class Branch:
    """What is computed anew where some units have other widths.

    Attributes:
        nodes: in the order of the forward.
        borrows: values that stay the same and are read.
        starts: position of the last of them.
        frees: values that nobody reads any more behind a node, by the position of the node.
    """

    nodes: tuple[fx.Node, ...]
    borrows: frozenset[fx.Node]
    starts: int
    frees: Mapping[int, Sequence[fx.Node]]


@dataclass(frozen=True, eq=False)
class Plan:
    """The forwards of several subnets.

    Attributes:
        nodes: of the subnet they are compared to, as far as someone borrows from them.
        branches: subnets that go on from behind a node, by the node's position, with their numbers.
        frees: values that nobody reads any more behind a node, by the position of the node.
        returns: values that were borrowed last by the branches from behind a node, by the position of the node.
    """

    nodes: tuple[fx.Node, ...]
    branches: Mapping[int, Sequence[tuple[int, Branch]]]
    frees: Mapping[int, Sequence[fx.Node]]
    returns: Mapping[int, Sequence[fx.Node]]


class SharedForward:
    """Runs a recorded forward for several subnets.

    A node changes with a unit when it calls a layer with channels of the unit, or reads what changes. All else is
    the same, bit by bit, and is taken from the subnet that the others are compared to.

    Args:
        forward: of an algorithm's network; widths and modes are seen to by the caller.

    Raises:
        NotSharedError: the forward calls a batch norm twice.
    """

    def __init__(self, forward: RecordedForward) -> None:
        self.forward, self.place, self.output = forward, forward.place, forward.output
        self.direct = self._direct(forward.algo.mutator.trace)
        self._refuse_shared_norms()
        self._branches: dict[frozenset[str], Branch] = {}

    def _direct(self, trace: Trace) -> dict[str, set[fx.Node]]:
        """Nodes that call a module, or read a tensor, which channels of a unit belong to; by the unit's name."""
        direct: dict[str, set[fx.Node]] = {unit.name: set() for unit in trace.units}
        for node in self.forward.live:
            dims: Sequence[DimSpec] = ()
            if node.op == "call_module":
                dims = _dims_inside(str(node.target), trace)
            elif node.op == "get_attr":
                dims = trace.tensors.get(str(node.target), ())
            for unit in {unit for dim in dims for unit, _ in dim if unit is not None}:
                direct[trace.units[unit].name].add(node)
        return direct

    def _refuse_shared_norms(self) -> None:
        """A norm called twice has the statistics of both calls, of which only one may have changed."""
        called = [str(node.target) for node in self.forward.live if node.op == "call_module"]
        for name in self.forward.algo.slim_batch_norms():
            if sum(_is_inside(name, target) for target in called) > 1:
                raise NotSharedError(f"forward calls {name} more than once")

    def plan(self, changes: Sequence[frozenset[str]]) -> Plan:
        """How the forwards of several subnets are run.

        Args:
            changes: for each subnet the units in which it differs from the one they are compared to.
        """
        for units in changes:
            if units not in self._branches:
                self._branches[units] = self._branch(units)
        branches: dict[int, list[tuple[int, Branch]]] = {}
        borrowed: dict[fx.Node, int] = {}
        for number, units in enumerate(changes):
            branch = self._branches[units]
            branches.setdefault(branch.starts, []).append((number, branch))
            borrowed.update({node: max(borrowed.get(node, 0), branch.starts) for node in branch.borrows})
        nodes = self._in_order(ancestors(borrowed))
        read = self._last_reads(nodes)
        return Plan(
            nodes,
            branches,
            _by_position({node: last for node, last in read.items() if last > borrowed.get(node, -1)}),
            _by_position({node: last for node, last in borrowed.items() if last >= read[node]}),
        )

    def _branch(self, units: frozenset[str]) -> Branch:
        changed = set().union(*(self.direct[unit] for unit in units)) if units else set()
        for node in self.forward.graph.nodes:
            if node in self.forward.live and not changed.isdisjoint(node.all_input_nodes):
                changed.add(node)
        nodes = self._in_order(changed)
        borrows = {source for node in (*nodes, self.output) for source in node.all_input_nodes} - changed
        needed = {*borrows, *self.output.all_input_nodes}
        frees = _by_position({node: last for node, last in self._last_reads(nodes).items() if node not in needed})
        return Branch(nodes, frozenset(borrows), max(self.place[node] for node in borrows), frees)

    def _last_reads(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
        """Where each value is read for the last time; a value nobody reads, where it is made."""
        last: dict[fx.Node, int] = {}
        for node in nodes:
            last.update(dict.fromkeys((node, *node.all_input_nodes), self.place[node]))
        return last

    def _in_order(self, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(sorted(nodes, key=self.place.__getitem__))

    def run(self, plan: Plan, inputs: Any, switch: Switch) -> Iterator[tuple[int, Any]]:
        """Runs the forwards of all subnets of a plan on a batch.

        Args:
            plan: of `plan`.
            inputs: of the network.
            switch: sets widths and statistics; called only where something else is computed next.

        Yields:
            A subnet's number and its output, in the order in which the subnets part.
        """
        given = self.forward.inputs(inputs)
        values: dict[fx.Node, Any] = {}
        pending = [branch for branches in plan.branches.values() for _, branch in branches]
        present: int | None = -1
        for node in plan.nodes:
            if node.op == "placeholder":
                values[node] = given[node]
            else:
                if present is not None:
                    switch(present := None)
                kept = (values[other] for branch in pending for other in branch.borrows if other in values)
                values[node] = self.forward.call(node, values, kept)
            position = self.place[node]
            for other in plan.frees.get(position, ()):
                del values[other]
            for number, branch in plan.branches.get(position, ()):
                switch(present := number)
                yield number, self._follow(branch, values)
                pending.remove(branch)
            for other in plan.returns.get(position, ()):
                del values[other]

    def _follow(self, branch: Branch, borrowed: Mapping[fx.Node, Any]) -> Any:
        own = dict(borrowed)
        for node in branch.nodes:
            own[node] = self.forward.call(node, own, borrowed.values())
            for other in branch.frees.get(self.place[node], ()):
                del own[other]
        return fx.node.map_arg(self.output.args[0], lambda node: own[node])


def _dims_inside(name: str, trace: Trace) -> list[DimSpec]:
    """All dimensions by which a module, or one inside it, follows units."""
    dims: list[Any] = []
    for path, layer in trace.layers.items():
        if _is_inside(path, name):
            dims += [layer.out, layer.input_dim, layer.heads, layer.key, layer.value]
    for path, variants in trace.rewrites.items():
        for variant in variants.values() if _is_inside(path, name) else ():
            dims += variant.watched
            for spec in variant.values:  # one dimension, or all those of a tensor
                dims += list(spec) if spec and isinstance(spec[0][0], tuple) else [spec]
    return dims


def _is_inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _by_position(last: Mapping[fx.Node, int]) -> dict[int, list[fx.Node]]:
    result: dict[int, list[fx.Node]] = {}
    for node, position in last.items():
        result.setdefault(position, []).append(node)
    return result
