"""After the walks: what must be rewritten, what cannot be and stays full, until nothing changes any more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from fastslim.graph.frame import Captured, Frame
from fastslim.graph.known import Axes, Size, Want
from fastslim.graph.parts import Part, Parts
from fastslim.graph.propagate import Propagation
from fastslim.graph.report import Finding


@dataclass
class Needs:
    """What a frame's forward does not follow by itself at narrow widths.

    Attributes:
        wants: arguments written as constants, or computed from other channels.
        reads: parameters and buffers it uses directly.
        guards: sizes of channels that steer its Python code, and where.
    """

    wants: list[Want] = field(default_factory=list)
    reads: list[tuple[fx.Node, Axes]] = field(default_factory=list)
    guards: list[tuple[Parts, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.wants or self.reads or self.guards)

    def parts(self) -> list[Parts]:
        """All channels it is about."""
        found = [want.parts for want in self.wants]
        found += [want.given.parts for want in self.wants if isinstance(want.given, Size)]
        found += [parts for parts, _ in self.guards]
        return found + [dim for _, axes in self.reads for dim in axes.dims if dim is not None]

    def reason(self) -> str:
        """Why the forward must be rewritten."""
        if self.wants:
            want = self.wants[0]
            return f"a channel count is written as a constant or taken from other channels at {_place(want.node)}"
        if self.reads:
            node, axes = self.reads[0]
            return f"uses {axes.name.rpartition('.')[2]} directly at {_place(node)}"
        return f"a channel count steers Python code at {self.guards[0][1]}"


def _place(node: fx.Node) -> str:
    return str(node.meta.get("location") or "unknown line")


def settle(p: Propagation, captures: Iterable[Captured]) -> dict[str, dict[Frame, Needs]]:
    """Fixes what would have to be rewritten and cannot be.

    Args:
        p: after its walks.
        captures: the recordings it has walked.

    Returns:
        By module name, the frames whose forward has to be rewritten.
    """
    frames = [frame for captured in captures for frame in captured.frames()]
    by_name: dict[str, list[Frame]] = {}
    for frame in frames:
        by_name.setdefault(frame.name, []).append(frame)
    obstacles = {name: _obstacle(group) for name, group in by_name.items()}
    for root in p.units.roots():
        if p.units[root].producer is None:
            p.units.fix((Part(root, p.units[root].channels),), Finding("", "", "no layer produces these channels"))
    while True:
        needs = {frame: Needs() for frame in frames}
        computed: dict[str, str] = {}
        for want in p.wants:
            if differs(p, want):
                needs[want.frame].wants.append(want)
        for frame, node, axes in p.reads:
            if any(dim is not None and any(map(p.units.is_free, p.units.resolve(dim))) for dim in axes.dims):
                needs[frame].reads.append((node, axes))
        for frame in frames:
            for guard in frame.guards:
                known = p.known.get(guard.node)
                if isinstance(known, Size) and any(map(p.units.is_free, p.units.resolve(known.parts))):
                    if guard.compares:
                        needs[frame].guards.append((known.parts, guard.location))
                    else:
                        computed.setdefault(frame.name, f"it computes with a channel count at {guard.location}")
        changed = False
        for name, group in by_name.items():
            needy = [frame for frame in group if needs[frame]]
            reason = obstacles[name] or computed.get(name) or (_uneven(p, group, needs) if needy else "")
            if needy and reason:
                changed |= _keep_full(p, name, needy, needs, reason)
        if not changed:
            return {
                name: {frame: needs[frame] for frame in group}
                for name, group in by_name.items()
                if any(needs[frame] for frame in group)
            }


def _keep_full(p: Propagation, name: str, group: list[Frame], needs: dict[Frame, Needs], reason: str) -> bool:
    changed = False
    for frame in group:
        subject = f"{name or type(p.model).__name__} ({type(frame.module).__name__})"
        finding = Finding(subject, "", f"{needs[frame].reason()}, and its forward cannot be rewritten: {reason}")
        for parts in needs[frame].parts():
            changed |= p.units.fix(parts, finding)
    return changed


def _obstacle(group: list[Frame]) -> str:
    reasons = [reason for frame in group for reason in frame.obstacles]
    return reasons[0] if reasons else ""


def _uneven(p: Propagation, group: list[Frame], needs: dict[Frame, Needs]) -> str:
    """Whether the calls of a module in one mode want different things."""
    seen: dict[bool, tuple[str, list]] = {}
    for frame in group:
        signature = (
            str(frame.graph),
            [(str(w.node), w.path, _normal(p, w.parts)) for w in needs[frame].wants]
            + [(str(n), "", [_normal(p, d) for d in axes.dims if d is not None]) for n, axes in needs[frame].reads],
        )
        if seen.setdefault(frame.training, signature) != signature:
            return "it is called in different ways"
    return ""


def differs(p: Propagation, want: Want) -> bool:
    """Whether an argument, as the forward makes it, is not what it must be at some width."""
    desired = _normal(p, want.parts)
    if not isinstance(want.given, Size):
        return any(unit is not None for unit, _ in desired)
    given = _normal(p, want.given.parts, want.given.divisor)
    if not want.given.exact:
        return any(unit is not None for unit, _ in (*desired, *given))
    return desired != given


def _normal(p: Propagation, parts: Parts, divisor: int = 1) -> list[tuple[int | None, float]]:
    result: list[tuple[int | None, float]] = []
    for part in p.units.resolve(parts):
        unit = part.unit if p.units.is_free(part) else None
        if result and result[-1][0] == unit:
            result[-1] = (unit, result[-1][1] + part.channels / divisor)
        else:
            result.append((unit, part.channels / divisor))
    return result
