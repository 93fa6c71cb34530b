"""RatioPruner: MMRazor 0.x's way to say which widths there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastslim.mutators.one_shot import OneShotChannelMutator
from fastslim.registry import MODELS


@MODELS.register_module()
class RatioPruner(OneShotChannelMutator):
    """A one-shot mutator whose units take the first ``round(n * ratio)`` of n channels.

    Args:
        ratios: parts of the full width to choose from.
        except_start_keys: the outputs of modules whose names start with one of these stay at full width; names that
            no module has are ignored, as in MMRazor.
        **kwargs: as for `OneShotChannelMutator`.
    """

    def __init__(self, ratios: Sequence[float], except_start_keys: Sequence[str] = (), **kwargs: Any) -> None:
        unit = dict(candidate_choices=list(ratios), choice_mode="ratio", divisor=1, min_ratio=0.0)
        super().__init__(dict(type="OneShotMutableChannelUnit", default_args=unit), **kwargs)
        self.except_start_keys = tuple(except_start_keys)

    def prepare_from_supernet(self, supernet: nn.Module) -> None:
        """As `OneShotChannelMutator.prepare_from_supernet`."""
        spared = [name for name, _ in supernet.named_modules() if name and name.startswith(self.except_start_keys)]
        self.analyzer.exclude = (*self.analyzer.exclude, *spared)
        super().prepare_from_supernet(supernet)
