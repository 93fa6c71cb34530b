"""`fastslim.convert`: a network as it comes becomes a slimmable one, in place, with a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.graph import Report, make_plan, make_report
from fastslim.mutators.one_shot import OneShotChannelMutator

# In the model's __dict__, so that copies and pickles of the model bring their own mutator along.
_MUTATOR = "_fastslim_mutator"


def convert(
    model: nn.Module,
    example_inputs: Any,
    *,
    choices: Sequence[float] | None = None,
    divisor: int = 8,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    random_widths: str = "per_unit",
    seed: int | None = None,
) -> Report:
    """Makes a network slimmable, in place; at full width it computes what it did before.

    The network's class and forward, its weights, hooks and state_dict keys stay. What cannot be slimmed stays at full
    width and stands in the report with file, line and reason.

    Args:
        model: any module built of torch layers; it stays unchanged when this fails.
        example_inputs: what forward is called with: a tensor, a tuple of arguments, a dict of keyword arguments, or
            one shape such as ``(1, 3, 224, 224)``.
        choices: ratios of the full width that each unit may take, rounded to `divisor`; i/12 for i in 2..12 by
            default.
        divisor: widths are multiples of this; a unit with no more channels stays full.
        include: names or fnmatch patterns of modules; only channels that layers in them produce may change. All,
            when empty.
        exclude: names or patterns of modules whose output channels stay full, with everything inside them.
        random_widths: "per_unit" draws a width for every unit of a random subnet, "uniform" one ratio for all.
        seed: of the random widths.

    Returns:
        The report; ``report.mutator`` chooses widths, ``print(report)`` shows a tree.

    Raises:
        FastslimRuntimeError: when forward cannot be run or traced, or the model is converted already.
        FastslimTypeError: when model is no module, or example_inputs do not fit its forward.
        FastslimValueError: for ratios outside (0, 1], or a pattern that matches no module.
    """
    start = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise FastslimTypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if mutator_of(model) is not None:
        raise FastslimRuntimeError(
            f"this {type(model).__name__} is converted already: fastslim.mutators.mutator_of(model) chooses its "
            "widths; to convert it with other arguments start from a new one with the same state_dict"
        )
    mutator = OneShotChannelMutator(
        channel_unit_cfg=one_shot_units(choices, divisor),
        example_inputs=example_inputs,
        include=include,
        exclude=exclude,
        random_widths=random_widths,
        seed=seed,
    )
    mutator.prepare_from_supernet(model)
    model.__dict__[_MUTATOR] = mutator
    _, plan = make_plan(mutator.trace)
    still = {
        unit.name: f"has {unit.num_channels} channels, and the choices leave no other width (divisor {unit.divisor})"
        for unit in mutator.units
        if unit.spec.mutable and not unit.is_mutable
    }
    report = make_report(mutator.trace, time.perf_counter() - start, plan, still)
    report.mutator = mutator
    return report


def mutator_of(model: nn.Module) -> OneShotChannelMutator | None:
    """The mutator of a model that `fastslim.convert` converted, or of its copy; None for any other model."""
    return model.__dict__.get(_MUTATOR)


def one_shot_units(choices: Sequence[float] | None, divisor: int) -> dict[str, Any]:
    """Config of one-shot units: ratios (None: i/12 for i in 2..12) rounded to multiples of `divisor`."""
    ratios = [i / 12 for i in range(2, 13)] if choices is None else list(choices)
    if not ratios:
        raise FastslimValueError("choices is empty; list at least one ratio, such as 1.0")
    arguments = {"candidate_choices": ratios, "choice_mode": "ratio", "divisor": divisor}
    return {"type": "OneShotMutableChannelUnit", "default_args": arguments}
