"""`SlimmableAlgorithm`: a network that runs at chosen widths, with statistics calibrated per subnet."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastslim.algorithms.base import BaseAlgorithm
from fastslim.graph import Cost, count_cost
from fastslim.mutators import ChannelMutator
from fastslim.nn import SlimBatchNorm, SwitchableBatchNorm2d

Choices = dict[str, int]
Statistics = dict[str, tuple[Tensor, Tensor]]


class SlimmableAlgorithm(BaseAlgorithm):
    """What every algorithm over subnets shares: choosing widths, and evaluating at them.

    Args:
        *args: see :class:`BaseAlgorithm`.
        norm_training: keep batch normalisation in training mode in evaluation, too.
        **kwargs: see :class:`BaseAlgorithm`.
    """

    mutator: ChannelMutator

    def __init__(self, *args: Any, norm_training: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm_training = norm_training
        self._calibrated: dict[tuple[tuple[str, int], ...], Statistics] = {}
        self._calibrated_weights: int | None = -1
        self._warned: set[tuple[tuple[str, int], ...]] = set()

    def set_max_subnet(self) -> None:
        """Runs at full width from now on."""
        self.set_subnet(self.mutator.max_choices)

    def set_min_subnet(self) -> None:
        """Runs every unit at its smallest width from now on."""
        self.set_subnet(self.mutator.min_choices)

    def sample_subnet(self) -> Choices:
        """Random widths: a dict from unit name to active channels."""
        return self.mutator.sample_choices("random")

    def set_subnet(self, choices: Mapping[str, int]) -> None:
        """Runs at these widths from now on, with the statistics calibrated for them if there are any."""
        self.mutator.set_choices(choices)
        self._drop_if_weights_changed()
        if self._calibrated:
            self._select_statistics(self._calibrated.get(self.current_key()))

    def uniform_subnet(self, ratio: float) -> Choices:
        """Every unit at the candidate width nearest to `ratio` of its channels."""
        return self.mutator.uniform_choices(ratio)

    def subnet_cost(self, choices: Mapping[str, int]) -> Cost:
        """Multiply-adds (of one sample) and parameters of a subnet, analytic."""
        return count_cost(self.mutator.trace, dict(choices))

    def current_key(self) -> tuple[tuple[str, int], ...]:
        """The current widths as a dictionary key."""
        return tuple(sorted(self.mutator.current_choices.items()))

    def forward(self, *inputs: Any, mode: str | None = None, **keywords: Any) -> Any:
        """As :meth:`BaseAlgorithm.forward`; warns when the current width's statistics are not calibrated."""
        if not self.training and not self.norm_training:
            self._drop_if_weights_changed()
            self._warn_if_uncalibrated()
        return super().forward(*inputs, mode=mode, **keywords)

    def train(self, mode: bool = True) -> SlimmableAlgorithm:
        """Training or evaluation mode; `norm_training` keeps batch normalisation in training mode."""
        super().train(mode)
        if not mode and self.norm_training:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()
        return self

    def store_calibration(self, choices: Mapping[str, int], statistics: Statistics) -> None:
        """Keeps the statistics of a subnet; :meth:`set_subnet` selects them from now on."""
        self.mutator.set_choices(choices)
        self._drop_if_weights_changed()
        self._calibrated_weights = self._weights_version()
        self._calibrated[self.current_key()] = statistics
        self._select_statistics(statistics)

    def drop_calibration(self) -> None:
        """Forgets all calibrated statistics, as happens by itself when weights change."""
        if self._calibrated:
            self._calibrated.clear()
            self._select_statistics(None)
        self._warned.clear()

    def _weights_version(self) -> int:
        """Grows with every change of a weight in place: optimizer steps, load_state_dict, swapped averages."""
        return sum(p._version for p in self.architecture.parameters())

    def _drop_if_weights_changed(self) -> None:
        if self._calibrated and self._weights_version() != self._calibrated_weights:
            self.drop_calibration()

    def __getstate__(self) -> dict[str, Any]:
        """A copy's weights count their changes anew; None says that the calibration is theirs."""
        fits = self._weights_version() == self._calibrated_weights
        return {**self.__dict__, "_calibrated_weights": None if fits else -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy."""
        super().__setstate__(state)
        if self._calibrated_weights is None:
            self._calibrated_weights = self._weights_version()

    def slim_batch_norms(self) -> dict[str, Any]:
        """The network's slim batch normalisation layers by name; those with a forward of their own, too."""
        return {
            name: module
            for name, module in self.architecture.named_modules()
            if isinstance(module, SlimBatchNorm) or getattr(module.__dict__.get("forward"), "normalises", False)
        }

    def _norms_that_widths_share(self) -> list[str]:
        """Slim batch norms but those that have statistics of their own for every width."""
        layers = self.slim_batch_norms()
        own = tuple(f"{name}." for name, layer in layers.items() if isinstance(layer, SwitchableBatchNorm2d))
        return [name for name in layers if not f"{name}.".startswith(own)]

    def _select_statistics(self, statistics: Statistics | None) -> None:
        for name, module in self.slim_batch_norms().items():
            module.calibrated = None if statistics is None else statistics.get(name)

    def _warn_if_uncalibrated(self) -> None:
        key = self.current_key()
        if key in self._calibrated or key in self._warned or not self._norms_that_widths_share():
            return
        self._warned.add(key)
        warnings.warn(
            "evaluating a subnet with running statistics that all widths share; its accuracy will be low. "
            "Calibrate first: fastslim.calibrate_batch_norm(algo, loader, subnets=[...])",
            stacklevel=3,
        )
