"""Times one case by every backend that can compute it, after its results have been compared with the reference."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import timing
import torch
from arithmetic import Ceilings
from prepared import Case, Prepared, relative_error
from record import Question, questions

from fastslim import ops
from fastslim.ops import backend

COLUMNS = ["direction", "shape", "backend", "us", "quartiles", "rate", "% of ceiling", "floor us", "set by"]


DIRECTIONS = ("forward", "backward_input", "backward_weight")  # as the ops' rules name them


class CrashedError(RuntimeError):
    """A kernel has left the GPU unusable for this process.

    Attributes:
        op: whose kernel.
        backend: of the kernel.
    """

    def __init__(self, op: str, backend: str, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        self.op, self.backend = op, backend


def usable(case: Case, name: str, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[Prepared | None, str]:
    """The case under a backend, or why that cannot compute it."""
    taken: list[backend.Choice] = []
    choose = backend.choose

    def listen(op: str, *arguments: object) -> backend.Choice:
        choice = choose(op, *arguments)
        direction = next((argument for argument in arguments if argument in DIRECTIONS), None)
        if op == case.op and direction in (None, case.asks or case.direction):
            taken.append(choice)
        return choice

    backend.choose = listen
    try:
        with ops.use_backend(name):
            prepared = Prepared(case, inputs, dtype)
            prepared()
            timing.synchronize(torch.device(prepared.device))  # its errors are reported here
    finally:
        backend.choose = choose
    wrong = next((choice.reason for choice in taken if choice.backend != name), None)
    return (None, wrong) if wrong else (prepared, "")


def gate(case: Case, inputs: dict[str, Any], dtype: torch.dtype, prepared: dict[str, Prepared]) -> dict[str, str]:
    """What is wrong with which backend's results, against the reference in float32 on the same inputs."""
    exact = {
        name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }

    def fresh(given: dict[str, Any]) -> dict[str, Any]:
        return {name: value.clone() if torch.is_tensor(value) else value for name, value in given.items()}

    with ops.use_backend("reference"):
        truth = Prepared(case, fresh(exact), None).results()
        allowed = 2 * relative_error(Prepared(case, fresh(inputs), dtype).results(), truth) + 1e-5
    wrong = {}
    for name in prepared:
        with ops.use_backend(name):
            error = relative_error(Prepared(case, fresh(inputs), dtype).results(), truth)
        if not error <= allowed:
            wrong[name] = f"error {error:.1e}, allowed {allowed:.1e}"
    return wrong


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, repeats: int, without: Collection[str] = ()
) -> tuple[dict[str, timing.Spread], dict[str, str], list[Question]]:
    """Times by backend, reasons of those without one, and what the op's rule asks the dispatch table.

    Args:
        case: what is measured.
        device: where.
        dtype: computed in.
        repeats: of each backend.
        without: backends that are left out.

    Raises:
        CrashedError: a kernel has left the GPU unusable.
    """
    torch.manual_seed(0)
    inputs = case.inputs(device, dtype)
    prepared, failed = {}, {}
    with questions() as asked:
        for name in [name for name in backend.registered_ops()[case.op] if name not in without]:
            before = len(asked)
            try:
                ready, reason = usable(case, name, inputs, dtype)
            except Exception as error:  # one backend's failure is a finding, the others go on
                try:
                    timing.synchronize(device)
                except RuntimeError:
                    raise CrashedError(case.op, name, error) from error
                ready, reason = None, f"failed: {type(error).__name__}: {error}"
            if ready is None:
                failed[name] = reason
                del asked[before:]
            else:
                prepared[name] = ready
        asked_here = [q for q in dict.fromkeys(asked) if _belongs(q, case)]
    wrong = gate(case, inputs, dtype, prepared)
    failed.update(wrong)
    right = [name for name in prepared if name not in wrong]
    sets = [inputs, *(case.inputs(device, dtype) for _ in range(timing.input_sets(case.bytes(inputs), device) - 1))]

    def run_of(name: str) -> Any:
        with ops.use_backend(name):
            calls = [Prepared(case, given, dtype) for given in sets]

        def run(call: int) -> None:
            with ops.use_backend(name):
                calls[call % len(calls)]()

        return run

    return timing.interleaved({name: run_of(name) for name in right}, device, repeats), failed, asked_here


def _belongs(question: Question, case: Case) -> bool:
    """Whether a rule's question is about this direction: a call may ask about others, too."""
    direction = question.key.split(" ")[0].removeprefix(case.op).lstrip("._")
    return direction == (case.asks or case.direction) or (not direction and case.direction.startswith("forward"))


def row_of(case: Case, name: str, spread: timing.Spread, top: Ceilings) -> list[Any]:
    """One line of the table."""
    cost, seconds = case.cost, spread.median * 1e-6
    bound = cost.binding(top)
    rate = (
        f"{cost.bytes / seconds / 1e9:.0f} GB/s" if bound == "bytes" else f"{cost.flops / seconds / 1e12:.1f} TFLOP/s"
    )
    share = 100 * cost.floor(top) / spread.median
    quartiles = f"{spread.low:.4g}-{spread.high:.4g}"
    return [case.direction, case.shape, name, spread.median, quartiles, rate, share, cost.floor(), bound]
