"""What subnets are taken from: an algorithm, a mutator or a converted model, run at a subnet for a while."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fastslim.algorithms.joint_training import JointTraining
from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.mutators import ChannelMutator, mutator_of
from fastslim.nn import IndexedBatchNorm2d, SwitchableBatchNorm2d


def find_mutator(source: Any) -> ChannelMutator | None:
    """The mutator of an algorithm or of a converted model, or itself; None for everything else."""
    if isinstance(source, ChannelMutator):
        return source
    if isinstance(source, SlimmableAlgorithm):
        return source.mutator
    return mutator_of(source) if isinstance(source, nn.Module) else None


def mutator_from(source: Any, caller: str) -> ChannelMutator:
    """`find_mutator`.

    Raises:
        FastslimTypeError: there is none.
    """
    mutator = find_mutator(source)
    if mutator is None:
        raise FastslimTypeError(
            f"{caller} takes an AutoSlim, a mutator or a model converted by fastslim.convert, "
            f"got {type(source).__name__}"
        )
    return mutator


@contextlib.contextmanager
def at_subnet(source: Any, mutator: ChannelMutator, subnet: Mapping[str, Any] | None) -> Iterator[None]:
    """The source runs at a subnet, with the statistics calibrated for it; afterwards at its own width again.

    Args:
        source: an algorithm, a mutator or a converted model.
        mutator: its mutator.
        subnet: width by unit name; the present one when None.

    Raises:
        FastslimValueError: it does not fit.
    """
    if subnet is None:
        yield
        return
    before = mutator.current_choices
    sets = [part for part in mutator.trace.model.modules() if isinstance(part, IndexedBatchNorm2d)]
    used = [part.index for part in sets]
    choose: Any = source.set_subnet if isinstance(source, SlimmableAlgorithm) else mutator.set_choices
    if sets and isinstance(source, JointTraining):
        _choose_listed(source, subnet)
    else:
        choose(subnet)
    # A mutator does not know for which subnet its algorithm has calibrated the layers.
    stale: dict[nn.Module, Any] = {}
    if not isinstance(source, SlimmableAlgorithm) and mutator.current_choices != before:
        stale = {part: part.calibrated for part in mutator.trace.model.modules() if "calibrated" in vars(part)}
    for part in stale:
        part.calibrated = None
    try:
        yield
    finally:
        for part, statistics in stale.items():
            part.calibrated = statistics
        for part, index in zip(sets, used, strict=True):
            part.select(index)
        choose(before)


def _choose_listed(source: JointTraining, subnet: Mapping[str, Any]) -> None:
    """One of the subnets that were retrained together, with its own batch norms."""
    listed = list(source.subnets_of_step().values())
    for index, own in enumerate(listed):
        if all(subnet.get(name, width) == width for name, width in own.items()):
            source.choose_subnet(index, own)
            return
    raise FastslimValueError(
        f"this subnet is none of the {len(listed)} that were trained together, and has no batch norms of its own; "
        "choose one of channel_cfg"
    )


def uncalibrated(algorithm: SlimmableAlgorithm) -> list[str]:
    """Batch norms whose statistics, at the present subnet, are those that all widths share.

    Layers with a set for every width are left out, as is everything when there is but one width.
    """
    if not algorithm.mutator.mutable_units:
        return []
    layers = algorithm.slim_batch_norms()
    own = [name for name, layer in layers.items() if isinstance(layer, (SwitchableBatchNorm2d, IndexedBatchNorm2d))]
    return [
        name
        for name, layer in layers.items()
        if layer.running_mean is not None
        and getattr(layer, "calibrated", None) is None  # of one with a forward of its own, once it is calibrated
        and not any(name == switched or name.startswith(f"{switched}.") for switched in own)
    ]


def warn_if_uncalibrated(source: Any) -> None:
    """Warns when the present subnet of an algorithm is about to leave with statistics that all widths share."""
    if isinstance(source, SlimmableAlgorithm) and uncalibrated(source):
        warnings.warn(
            "exporting a subnet with running statistics that all widths share; unless it was trained alone, its "
            "accuracy will be low. Calibrate first: fastslim.calibrate_batch_norm(algo, loader, subnets=[...])",
            stacklevel=3,
        )
