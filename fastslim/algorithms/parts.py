"""Builds an algorithm's mutator and distiller from what a user gives: an object, a config dict, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.contract_errors import WrongPartError
from fastslim.distillers import ConfigurableDistiller
from fastslim.graph.capture import unchanged
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


def build_part(name: str, given: Part | Config, kind: type[Part]) -> Part:
    """An object of a kind from itself or its config.

    Raises:
        WrongPartError: it is neither; says what was expected and what came.
    """
    part: Any = given
    if isinstance(given, Mapping):
        # Not built before its kind is right: another class would complain of the arguments.
        named = _class_of(given)
        part = MODELS.build(dict(given)) if named is None or issubclass(named, kind) else named
    if not isinstance(part, kind):
        got = part if isinstance(part, type) else type(part)
        raise WrongPartError(f"{name} should be a `dict` or `{kind.__name__}` instance, but got {got}")
    return part


def is_part(given: Any, kind: type[Any]) -> bool:
    """Whether this is an object of a kind, or the config of one."""
    if not isinstance(given, Mapping):
        return isinstance(given, kind)
    named = _class_of(given)
    return named is not None and issubclass(named, kind)


def _class_of(config: Config) -> type[Any] | None:
    """The class that a config names; None if it is unknown, or something else builds it."""
    named = config.get("type")
    named = MODELS.get(named) if isinstance(named, str) else named
    return named if isinstance(named, type) else None


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
        FastslimValueError: options that came too late for a mutator that is there.
    """
    converted = mutator_of(architecture)
    own = {"exclude": tuple(exclude) or None, "seed": seed, "random_widths": random_widths}
    own = {key: value for key, value in own.items() if value not in (None, "per_unit")}
    of_units = choices is not None or divisor != 8
    if converted is not None and mutator is None:
        if own or of_units:
            raise errors.FastslimValueError(
                "the architecture is converted already: give choices, divisor, exclude, random_widths and seed "
                "to fastslim.convert"
            )
        mutator = converted
    if mutator is None:
        mutator = {"type": OneShotChannelMutator, "channel_unit_cfg": one_shot_units(choices, divisor)}
    elif of_units or (own and not isinstance(mutator, Mapping)):
        raise errors.FastslimValueError(
            "choices, divisor, exclude, random_widths and seed are options of the mutator that is made where none is "
            "given: give them to the mutator itself, choices and divisor in its channel_unit_cfg"
        )
    if isinstance(mutator, Mapping):
        mutator = {**own, **({} if example_inputs is None else {"example_inputs": example_inputs}), **mutator}
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

    Args:
        architecture: with its slim layers.
        distiller: an object, a config dict, or None.

    Raises:
        FastslimTypeError: something else than a distiller, its config or None.
    """
    if distiller is None:
        return None
    built = build_part("distiller", distiller, ConfigurableDistiller)
    built.prepare_from_teacher(architecture)
    built.prepare_from_student(architecture)
    return built


def distiller_of_modes(architecture: nn.Module, example_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The config of KL divergence between what an architecture with modes returns in mode "tensor".

    Its losses hide that output, so the module is recorded whose output it is.

    Args:
        architecture: the network.
        example_inputs: by the names of its forward's arguments.

    Raises:
        FastslimValueError: no module returns it.
    """
    seen: list[tuple[str, Any]] = []
    with unchanged(architecture), torch.no_grad():  # which takes the hooks away, too
        for name, module in architecture.named_modules():
            if name:
                module.register_forward_hook(lambda _, __, output, name=name: seen.append((name, output)))
        result = architecture.eval()(**example_inputs)
    # A module inside another one returns before it, and is the more exact place.
    name = next((name for name, output in seen if output is result and isinstance(output, Tensor)), None)
    if name is None:
        raise errors.FastslimValueError(
            f"{type(architecture).__name__} makes its losses itself, and what it returns in mode 'tensor' is no "
            "module's output: say what students learn from with distiller=dict(type='ConfigurableDistiller', "
            "student_recorders=..., teacher_recorders=..., distill_losses=..., loss_forward_mappings=...)"
        )
    recorder = {"logits": {"type": "ModuleOutputs", "source": name}}
    return {
        "type": "ConfigurableDistiller",
        "student_recorders": recorder,
        "teacher_recorders": recorder,
        "distill_losses": {"loss_kl": {"type": "KLDivergence"}},
    }


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
