"""How a report looks: a tree along the module names, in plain text or with rich's colours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastslim.graph.report import Finding, LayerRow, Report, local

_NUMBER_IN_PATH = re.compile(r"(?<=\.)\d+|\d+(?=\.)")
_SUBJECTS_SHOWN = 3


@dataclass
class Branch:
    """A module: its own row if it is a layer, and the layers inside it."""

    name: str
    row: LayerRow | None = None
    children: dict[str, Branch] = field(default_factory=dict)

    def signature(self) -> tuple:
        """Equal for modules that look the same but for their own names and units."""
        row = self.row
        shown = row and (
            (row.kind, row.out_channels, row.in_channels, row.multiply_adds, row.slims_out, row.slims_in),
            _NUMBER_IN_PATH.sub("#", row.reason),
        )
        return shown, tuple((name, child.signature()) for name, child in self.children.items())


@dataclass(frozen=True)
class Line:
    """One line of the tree: what stands in its columns, how deep it lies, and what stays full."""

    depth: int
    label: str
    kind: str = ""
    channels: str = ""
    unit: str = ""
    share: str = ""
    full: str = ""


HEADINGS = Line(0, "layer", "kind", "channels", "unit", "multiply-adds")


def grow(layers: Iterable[LayerRow]) -> Branch:
    """The tree of the layers' module names."""
    root = Branch("")
    for row in layers:
        branch = root
        for piece in row.name.split("."):
            branch = branch.children.setdefault(piece, Branch(piece))
        branch.row = row
    return root


def lines_of(report: Report) -> list[Line]:
    """The lines of the tree; runs of modules that look the same are one."""
    numbers = {unit.name: f"u{index}" for index, unit in enumerate(report.units)}
    total = report.multiply_adds
    explained: set[str | None] = set()

    def units_of(rows: Sequence[LayerRow | None]) -> str:
        shown = list(
            dict.fromkeys("+".join(numbers[name] for name in row.unit.split(" + ")) for row in rows if row and row.unit)
        )
        return ", ".join(shown) if len(shown) < 4 else f"{shown[0]}, {shown[1]} .. {shown[-1]}"

    def why(row: LayerRow) -> str:
        """The reason, once for each unit."""
        known = row.unit is not None and row.unit in explained
        explained.add(row.unit)
        return "" if known else f": {local(row.reason)}"

    def walk(copies: list[Branch], label: str, depth: int) -> Iterator[Line]:
        row = copies[0].row
        if row is None:
            yield Line(depth, label)
        else:
            one_number = not row.in_channels or (not row.multiply_adds and row.in_channels == row.out_channels)
            yield Line(
                depth,
                label,
                row.kind,
                str(row.out_channels) if one_number else f"{row.in_channels} -> {row.out_channels}",
                units_of([copy.row for copy in copies]),
                f"{100 * row.multiply_adds / total:.1f} %" if row.multiply_adds else "",
                f"full{why(row)}" if not row.slims_out else "",
            )
        yield from walk_children(copies, depth + 1)

    def walk_children(copies: list[Branch], depth: int) -> Iterator[Line]:
        for run in _runs(copies[0].children.values()):
            first, last = run[0].name, run[-1].name
            label = first if len(run) == 1 else f"{first} ... {last} (x{len(run)})"
            yield from walk([copy.children[child.name] for copy in copies for child in run], label, depth)

    return list(walk_children([grow(report.layers)], 0))


def _runs(branches: Iterable[Branch]) -> list[list[Branch]]:
    """Neighbours that look the same, together."""
    runs: list[list[Branch]] = []
    last: tuple = ()
    for branch in branches:
        signature = branch.signature()
        if runs and signature == last:
            runs[-1].append(branch)
        else:
            runs.append([branch])
        last = signature
    return runs


def grouped(findings: Iterable[Finding]) -> list[str]:
    """The findings, those of the same line and reason as one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        groups.setdefault((finding.reason, finding.location), []).append(finding.subject)
    texts = []
    for (reason, location), subjects in groups.items():
        names = list(dict.fromkeys(subjects))
        more = [f"{len(names) - _SUBJECTS_SHOWN} more"] if len(names) > _SUBJECTS_SHOWN else []
        subject = ", ".join([*names[:_SUBJECTS_SHOWN], *more])
        text = str(Finding(subject, location, reason))
        texts.append(local(text) + (f", {len(subjects)} times" if len(subjects) > 1 else ""))
    return texts


def sections(report: Report) -> list[tuple[str, list[str]]]:
    """Title and lines of what stands below the tree; those without lines left out."""
    parts = [
        ("stays at full width", grouped(report.full_width)),
        ("runs a rewritten forward at narrow widths", grouped(report.rewritten)),
        ("execution plan of the training step", local(list(report.plan))),
    ]
    return [(title, lines) for title, lines in parts if lines]


def aligned(lines: Sequence[Line], indent: int) -> list[tuple[str, str]]:
    """(columns, what stays full) of each line, padded so that columns stand below each other.

    Args:
        lines: of the tree.
        indent: characters that a level of the tree takes; they are left out of the columns.
    """
    lines = [HEADINGS, *lines]
    label, kind, channels, unit, share = (
        max(map(len, texts))
        for texts in zip(
            *((" " * indent * line.depth + line.label, line.kind, line.channels, line.unit, line.share)
              for line in lines),
            strict=True,
        )
    )  # fmt: skip
    return [
        (
            f"{line.label:<{label - indent * line.depth}}  {line.kind:<{kind}}  {line.channels:<{channels}}  "
            f"{line.unit:<{unit}}  {line.share:>{share}}".rstrip(),
            line.full,
        )
        for line in lines
    ]


def as_text(report: Report) -> str:
    """The report in plain text."""
    lines = lines_of(report)
    columns = aligned(lines, 2)
    depths = [0, *(line.depth for line in lines)]
    width = max(2 * depth + len(text) for depth, (text, _) in zip(depths, columns, strict=True))
    tree = [
        f"{'  ' * depth}{text:<{width - 2 * depth}}  {full}".rstrip()
        for depth, (text, full) in zip(depths, columns, strict=True)
    ]
    below = ["\n".join([f"{title}:", *(f"  {line}" for line in texts)]) for title, texts in sections(report)]
    return "\n\n".join([report.header(), "\n".join(tree), *below])


def as_rich(report: Report) -> Any:
    """The report for rich: a tree in colours, full-width layers in yellow."""
    from rich.console import Group
    from rich.text import Text
    from rich.tree import Tree

    lines = lines_of(report)
    (heading, _), *columns = aligned(lines, 4)  # a level of rich's tree takes four characters
    root = Tree(Text(" " * 4 + heading, style="dim"), guide_style="dim")
    open_branches = [root]
    for line, (text, full) in zip(lines, columns, strict=True):
        label = Text(text, style="bold" if not line.kind else "", no_wrap=True, overflow="ellipsis")
        if full:
            label.append(f"  {full}", style="yellow")
        del open_branches[line.depth + 1 :]
        open_branches.append(open_branches[-1].add(label))
    below = [
        Text.assemble(("\n" + title, "bold"), *(f"\n  {line}" for line in texts)) for title, texts in sections(report)
    ]
    return Group(Text(report.header(), style="bold green"), root, *below)
