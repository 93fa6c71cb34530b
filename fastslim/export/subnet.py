"""Hand out a subnet as a plain network: ordinary torch layers of exactly its size, nothing of fastslim inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.export.fold import fold_batch_norm as fold
from fastslim.export.sources import at_subnet, mutator_from, warn_if_uncalibrated
from fastslim.mutators import ChannelMutator
from fastslim.mutators.plain_copy import plain_copy


def export_subnet(
    source: SlimmableAlgorithm | ChannelMutator | nn.Module,
    subnet: Mapping[str, Any] | None = None,
    *,
    fold_batch_norm: bool = False,
) -> nn.Module:
    """A subnet as a plain network, with copies of the weights it uses.

    The network's own classes and forward stay, with plain torch layers inside. Where a forward mentions channel
    counts as constants, that module becomes a `torch.fx.GraphModule` of its recorded forward, which holds for
    arguments like the example inputs', and in evaluation mode only where training mode computes something else than
    other constants (it says so when it is called). The result needs no fastslim to run or to load.

    Args:
        source: an AutoSlim, a mutator, or a model that `fastslim.convert` has converted; it stays as it is. An
            AutoSlim gives the batch-norm statistics that are calibrated for the subnet, and warns where there are
            none.
        subnet: width by unit name, as the mutator's `set_choices` takes it; the present one when None.
        fold_batch_norm: multiply batch norms into the convolutions before them, see
            `fastslim.export.fold_batch_norm`; the result is for evaluation only.

    Returns:
        The network, in the mode (training or evaluation) of the source; in evaluation mode when folded.

    Raises:
        FastslimTypeError: when source holds no subnets.
        FastslimValueError: when subnet does not fit.
    """
    mutator = mutator_from(source, "export_subnet")
    with at_subnet(source, mutator, subnet):
        warn_if_uncalibrated(source)
        plain = plain_copy(mutator)
    return fold(plain, mutator.trace.example_inputs) if fold_batch_norm else plain
