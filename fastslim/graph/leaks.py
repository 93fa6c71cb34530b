"""Find forwards that take a size out of sight: ``1.0 / n``, ``math.log(n)``, ``table[n]``.

C code reads an integer's digits without asking, so what it makes of a size is not recorded, and a rewritten forward
would keep the number of the example. A second recording tells: its sizes have other digits than values, and whatever
comes out differently has been made of digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from fastslim.graph.capture import record
from fastslim.graph.frame import Captured, Frame
from fastslim.graph.recorder import Recorder

# Prime, and far from sizes that networks have.
_DISGUISE = 100_003
_MOST_FAILURES = 16

OUT_OF_SIGHT = "it computes with a size out of sight, such as 1.0 / x.size(2) or table[x.size(1)]"


def note_leaks(model: nn.Module, inputs: Mapping[str, Any], captures: Iterable[Captured], names: Iterable[str]) -> bool:
    """Gives the frames of these modules an obstacle where their forward takes a size out of sight.

    Args:
        model: the recorded model.
        inputs: what it was recorded with.
        captures: its recordings.
        names: modules whose forward is to be rewritten.

    Returns:
        Whether there are any.
    """
    wanted = set(names)
    found = False
    for captured in captures:
        leaking = _leaking(model, inputs, captured, wanted)
        for frame in captured.frames():
            if frame.name in leaking and frame.name in wanted:
                frame.obstacles.append(OUT_OF_SIGHT)
                found = True
    return found


def _leaking(model: nn.Module, inputs: Mapping[str, Any], captured: Captured, wanted: set[str]) -> set[str]:
    failed: set[str] = set()
    while len(failed) < _MOST_FAILURES:
        recorder = Recorder(model, captured.opaque, _DISGUISE, failed)
        try:
            root, _ = record(model, inputs, recorder, captured.training)
        except Exception:  # the digits were used, for a shape that does not fit or an element that is not there
            if recorder.failed_frame is None or recorder.failed_frame in failed:
                return wanted
            failed.add(recorder.failed_frame)
            continue
        pairs = zip(captured.root.walk(), root.walk(), strict=False)
        return failed | {one.name for one, other in pairs if _text(one) != _text(other)}
    return wanted


def _text(frame: Frame) -> tuple[str, str, list[str]]:
    """A frame's operations with their constants, and the constants it is called with."""
    return frame.name, str(frame.graph), [str(leaf) for leaf in frame.leaves if not isinstance(leaf, fx.Node)]
