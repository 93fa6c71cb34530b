"""Builds an algorithm's mutator and distiller from what a user gives: an object, a config dict, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.distillers import ConfigurableDistiller
from fastslim.mutators import (
    ChannelMutator,
    OneShotChannelMutator,
    SlimmableChannelMutator,
    mutator_of,
    one_shot_units,
)
from fastslim.mutators.plain_copy import plain_copy
from fastslim.registry import MODELS

Part = TypeVar("Part")
Config = Mapping[str, Any]


class WrongPartError(errors.FastslimTypeError, AttributeError):
    """A part of the wrong kind; MMRazor's algorithms fail with a `TypeError` or where they miss an attribute."""


def build_part(name: str, given: Part | Config, kind: type[Part]) -> Part:
    """An object of a kind from itself or its config.

    Raises:
        WrongPartError: it is neither; says what was expected and what came.
    """
    part = MODELS.build(dict(given)) if isinstance(given, Mapping) else given
    if not isinstance(part, kind):
        raise WrongPartError(f"{name} should be a `dict` or `{kind.__name__}` instance, but got {type(part)}")
    return part


def example_of(input_shape: Sequence[int] | None) -> Tensor | None:
    """An example input of a shape; three numbers are those of one image, as in MMRazor 0.x."""
    if input_shape is None:
        return None
    return torch.zeros(*(1,) * (len(input_shape) == 3), *input_shape)


def build_mutator(
    architecture: nn.Module,
    mutator: ChannelMutator | Config | None,
    example_inputs: Any,
    kind: type[ChannelMutator] = OneShotChannelMutator,
    *,
    choices: Sequence[float] | None = None,
    divisor: int = 8,
    exclude: Sequence[str] = (),
    random_widths: str = "per_unit",
    seed: int | None = None,
) -> Any:
    """A mutator that is prepared for the architecture.

    Args:
        architecture: what gets slim layers.
        mutator: an object, a config dict, or None for the one of a converted architecture, else one-shot units.
        example_inputs: what the architecture is traced with, where the mutator does not say it itself.
        kind: what the mutator has to be.
        choices: width ratios of the default mutator.
        divisor: of its widths.
        exclude: patterns of module names whose output channels stay full.
        random_widths: "per_unit" or "uniform".
        seed: of the random widths.

    Raises:
        FastslimTypeError: a mutator of another kind.
        FastslimRuntimeError: the architecture is converted already, by another mutator.
        FastslimValueError: it is converted, and options are given that came too late.
    """
    converted = mutator_of(architecture)
    if converted is not None and mutator is None:
        if choices is not None or divisor != 8 or exclude or random_widths != "per_unit" or seed is not None:
            raise errors.FastslimValueError(
                "the architecture is converted already: give choices, divisor, exclude, random_widths and seed "
                "to fastslim.convert"
            )
        mutator = converted
    if mutator is None:
        mutator = OneShotChannelMutator(
            channel_unit_cfg=one_shot_units(choices, divisor),
            example_inputs=example_inputs,
            exclude=tuple(exclude),
            random_widths=random_widths,
            seed=seed,
        )
    if isinstance(mutator, Mapping) and example_inputs is not None:
        mutator = {"example_inputs": example_inputs, **mutator}
    built = build_part("mutator", mutator, kind)
    if converted is not None and built is not converted:
        raise errors.FastslimRuntimeError(
            "the architecture is converted already, by another mutator; leave out mutator= or convert a new network"
        )
    if not built.is_prepared_for(architecture):
        built.prepare_from_supernet(architecture)
    return built


def build_distiller(architecture: nn.Module, distiller: ConfigurableDistiller | Config | None) -> Any:
    """A distiller that has found its recorders' sources in the architecture, or None.

    Raises:
        FastslimTypeError: something else than a distiller, its config or None.
    """
    if distiller is None:
        return None
    built = build_part("distiller", distiller, ConfigurableDistiller)
    built.prepare_from_teacher(architecture)
    built.prepare_from_student(architecture)
    return built


def deployed(mutator: ChannelMutator) -> tuple[nn.Module, SlimmableChannelMutator]:
    """A mutator's present subnet as a network of its own, and a mutator of that network with nothing to choose.

    The network is of exactly the subnet's size; its layers stay slim ones, which train faster.
    """
    inputs = mutator.trace.example_inputs
    network = plain_copy(mutator)
    fixed = dict(type="SlimmableChannelUnit", default_args=dict(candidate_choices=[1.0], choice_mode="ratio"))
    alone = SlimmableChannelMutator(fixed, example_inputs=inputs)
    alone.prepare_from_supernet(network)
    return network, alone
