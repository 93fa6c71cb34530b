"""Validation of several subnets: the ones AutoSlim trains, or the ones a slimmable network lists."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from mmengine.runner import ValLoop

from fastslim.integrations.mmengine.calibration import CalibrateBNMixin, training_loader
from fastslim.integrations.mmengine.costs import make_costs, supernet_of
from fastslim.integrations.mmengine.keywords import checks_keywords
from fastslim.integrations.mmengine.registry import LOOPS

Subnets = dict[str, dict[str, int]]


class SubnetsLoop(ValLoop):
    """Evaluates one subnet after the other; metrics are called ``"<subnet>.<metric>"``."""

    def subnets(self) -> Subnets:
        """What to evaluate, by name."""
        raise NotImplementedError

    def costs_of(self, choices: Mapping[str, int]) -> dict[str, float]:
        """Numbers that stand beside a subnet's metrics."""
        return {}

    def run(self) -> dict[str, float]:
        """Evaluates all subnets.

        Returns:
            The metrics of all.
        """
        mutator = supernet_of(self.runner).mutator
        before = mutator.current_choices
        metrics: dict[str, float] = {}
        # Once, not for every subnet: a hook that swaps in averaged weights would swap them out again.
        self.runner.call_hook("before_val")
        self.runner.call_hook("before_val_epoch")
        self.runner.model.eval()
        try:
            for name, choices in self.subnets().items():
                supernet_of(self.runner).set_subnet(choices)
                self.val_loss.clear()
                for index, data in enumerate(self.dataloader):
                    self.run_iter(index, data)
                own = {**self.evaluator.evaluate(len(self.dataloader.dataset)), **self.costs_of(choices)}
                metrics.update({f"{name}.{key}": value for key, value in own.items()})
        finally:
            mutator.set_choices(before)
        self.runner.call_hook("after_val_epoch", metrics=metrics)
        self.runner.call_hook("after_val")
        return metrics


@LOOPS.register_module()
@checks_keywords()
class SubnetValLoop(SubnetsLoop, CalibrateBNMixin):
    """Evaluates the max, the min and random subnets, with batch normalisation calibrated for each.

    Metrics are ``max_subnet.accuracy/top1``, ``min_subnet...``, ``random_subnet_0...`` and, beside them, each
    subnet's ``flops`` and ``params`` in millions. The random subnets are the same at every validation, and drawn
    apart from those of training, which go on as if there had been no validation.

    Args:
        runner: holds the supernet.
        dataloader: validation data, or its config.
        evaluator: an evaluator or its config.
        fp16: evaluate under autocast.
        evaluate_fixed_subnet: evaluate the present subnet only, as ``fix_subnet``.
        calibrate_sample_num: training samples that statistics are calibrated from; 0 or less: none are, which
            makes all but batch-independent normalisation useless.
        estimator_cfg: of what counts the costs.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any,
        fp16: bool = False,
        evaluate_fixed_subnet: bool = False,
        calibrate_sample_num: int = 4096,
        estimator_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(runner, dataloader, evaluator, fp16)
        self.model = supernet_of(runner)
        self.evaluate_fixed_subnet, self.calibrate_sample_num = evaluate_fixed_subnet, calibrate_sample_num
        self.costs_of = make_costs(estimator_cfg, self.model)  # type: ignore[assignment]

    def subnets(self) -> Subnets:
        """The max, the min and the random subnets, calibrated."""
        mutator = self.model.mutator
        if self.evaluate_fixed_subnet:
            chosen = {"fix_subnet": mutator.current_choices}
        else:
            chosen = {"max_subnet": mutator.max_choices, "min_subnet": mutator.min_choices}
            generator, mutator.rng = mutator.rng, random.Random(0)
            try:
                for index in range(getattr(self.model, "num_samples", 0)):
                    chosen[f"random_subnet_{index}"] = mutator.sample_choices()
            finally:
                mutator.rng = generator
        if self.calibrate_sample_num > 0:
            self.calibrate_bn_statistics(training_loader(self.runner), self.calibrate_sample_num, list(chosen.values()))
        return chosen


@LOOPS.register_module()
@checks_keywords()
class SlimmableValLoop(SubnetsLoop):
    """Evaluates every subnet that a slimmable network lists: ``subnet_0.accuracy/top1`` and so on.

    Args:
        runner: holds the network.
        dataloader: validation data, or its config.
        evaluator: an evaluator or its config.
        fp16: evaluate under autocast.
    """

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any, fp16: bool = False) -> None:
        super().__init__(runner, dataloader, evaluator, fp16)

    def subnets(self) -> Subnets:
        """The listed subnets."""
        mutator: Any = supernet_of(self.runner).mutator
        return {f"subnet_{index}": subnet for index, subnet in enumerate(mutator.subnets)}
