"""cli -> bench -> engine, search, export -> algorithms -> mutators, distillers -> graph -> nn -> ops -> kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A room may import rooms of a lower rank, its own files, and `errors`.
RANK = {
    "cli": 9,
    "integrations": 9,
    "bench": 8,
    "engine": 7,
    "info": 7,
    "search": 6,
    "cost": 6,
    "export": 6,
    "algorithms": 5,
    "mutators": 4,
    "distillers": 4,
    "graph": 3,
    "nn": 2,
    "ops": 1,
    "kernels": 0,
    "_ext": 0,
    "contract_errors": -1,
    "registry": -1,
    "files": -1,
    "errors": -2,
}
ALONE = ("models", "data")  # import nothing of fastslim but errors; engine and cli may import them
FRONT = ("__init__", "__main__")  # the package and its command see everything
SOURCES = sorted(
    path
    for path in [*ROOT.glob("fastslim/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    if path.relative_to(ROOT).as_posix() not in [f"fastslim/{name}.py" for name in FRONT]
)


def room_of(path: Path) -> str:
    """The folder of the house a source file stands in; a file beside the folders is its own room."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def rooms_imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and room of every fastslim import, those inside functions too, type-checking blocks excluded."""
    tree = ast.parse(source)
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "fastslim":
            names = [f"fastslim.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if name == "fastslim" or name.startswith("fastslim."):
                yield node.lineno, [*name.split("."), "fastslim"][1]


def violations(room: str, source: str) -> list[str]:
    """Imports that go upwards, one sentence each."""
    found = []
    for line, target in rooms_imported(source):
        if target in (room, "errors"):
            continue
        if room in ALONE:
            found.append(f"line {line}: {room} stands alone but imports {target}")
        elif target in ALONE:
            if RANK[room] < RANK["search"]:
                found.append(f"line {line}: {room} must not know {target}")
        elif RANK.get(target, 99) >= RANK[room]:
            found.append(f"line {line}: {room} (rank {RANK[room]}) imports {target} (rank {RANK.get(target, 99)})")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert room_of(path) in (*RANK, *ALONE), f"{path} stands in a room this test does not know"
    assert not violations(room_of(path), path.read_text())


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("ops", "from fastslim.nn import SlimConv2d"),
        ("ops", "import fastslim.algorithms"),
        ("nn", "import fastslim"),
        ("models", "from fastslim import nn"),
        ("mutators", "from fastslim.distillers.losses import KLDivergence"),
        ("graph", "def f():\n    from fastslim.cli import main"),
    ],
)
def test_an_import_that_goes_up_is_found(room, line):
    assert len(violations(room, line)) == 1


def test_imports_that_go_down_are_fine():
    source = "from fastslim import errors, ops\nfrom fastslim.ops.segments import Segments\nimport torch"
    assert not violations("nn", source)
