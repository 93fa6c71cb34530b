"""Memory of tensors on a CPU, read from torch's allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile

from fastslim.bench.interleave import Run

if TYPE_CHECKING:
    from fastslim.bench.sides import Side


def peak_bytes(run: Run) -> int:
    """Most bytes allocated at one time during a call.

    What the call frees must be allocated in it: the profiler does not see how large a block of before was.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as result:
        run()
    events = result.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = peak = 0
    for _, nbytes in changes:
        total += nbytes
        peak = max(peak, total)
    return peak


def peak_of_training(make: Callable[[], Side], steps: int = 3) -> int:
    """Most bytes of tensors that live at one time in the first steps of a training.

    It begins without gradients, optimizer state and buffers of ours, so that whatever a step leaves for the next one
    (weights cast and packed, copies of statistics) counts as well.

    Args:
        make: a network that has made no step yet, and its step.
        steps: the second one has all that stays, the others have other random widths.
    """
    side = make()
    before = [*side.network.parameters(), *side.network.buffers()]
    return sum(t.numel() * t.element_size() for t in before) + peak_bytes(lambda: [side.step() for _ in range(steps)])
