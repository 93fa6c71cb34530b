"""AutoSlim's second stage as a test loop: the best widths for every target, by greedy slimming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.runner import TestLoop

from fastslim.integrations.mmengine.costs import make_costs, supernet_of
from fastslim.integrations.mmengine.keywords import checks_keywords
from fastslim.integrations.mmengine.registry import LOOPS
from fastslim.integrations.mmengine.search_state import load_state, save_state, save_subnet
from fastslim.integrations.mmengine.subnet_scores import SubnetScores
from fastslim.search import Evaluated, GreedySearch

STATE = "greedy_search.json"


@LOOPS.register_module()
@checks_keywords()
class AutoSlimGreedySearchLoop(SubnetScores, TestLoop):
    """Narrows one unit after the other, always the one that costs the least score, see :class:`GreedySearch`.

    Writes ``FLOPS_<cost>M.yaml`` into the work_dir for every target, ``"unit": width`` a line, and
    ``greedy_search.json`` after every decision.

    Args:
        runner: holds the supernet.
        dataloader: what subnets are compared on; better not the test set. A loader or its config.
        evaluator: an evaluator or its config.
        target_flops: largest costs, in millions of multiply-adds of one sample in convolutions and linear layers.
        estimator_cfg: of what counts the cost, see :func:`make_costs`.
        score_key: which metric is maximised.
        resume_from: the ``greedy_search.json`` of a search to continue.
        calibrate_sample_num: see :class:`SubnetScores`.
        fp16: evaluate under autocast.

    Attributes:
        searched_subnet: the subnets found so far, the largest target's first; width by unit.
        searched_subnet_flops: what they cost.

    Raises:
        FastslimValueError: a target below the smallest subnet, or nothing to search.
        FastslimFileError: `resume_from` is no state of a greedy search; a pickle is never opened.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any,
        target_flops: Sequence[float] | float,
        estimator_cfg: Mapping[str, Any] | None = None,
        score_key: str = "accuracy/top1",
        resume_from: str | None = None,
        calibrate_sample_num: int = -1,
        fp16: bool = False,
    ) -> None:
        super().__init__(runner, dataloader, evaluator, fp16)
        self.score_key, self.resume_from, self.calibrate_sample_num = score_key, resume_from, calibrate_sample_num
        self.model = supernet_of(runner)
        self.costs = make_costs(estimator_cfg, self.model)
        targets = [target_flops] if isinstance(target_flops, (int, float)) else list(target_flops)
        self.search = GreedySearch(
            self.model.mutator,
            lambda choices: self.costs(choices)["flops"],
            self.score,
            targets,
            on_step=self._decided,
            on_evaluated=self._evaluated,
        )
        self.target_flops = self.search.targets

    @property
    def current_subnet(self) -> dict[str, int]:
        """The subnet that the search has come to."""
        return dict(self.search.choices)

    @property
    def current_flops(self) -> float:
        """What it costs."""
        return self.search.cost_now

    @property
    def searched_subnet(self) -> list[dict[str, int]]:
        """See the class."""
        return [dict(found.choices) for found in self.search.found]

    @property
    def searched_subnet_flops(self) -> list[float]:
        """See the class."""
        return [found.cost for found in self.search.found]

    def run(self) -> dict[str, float]:
        """Searches.

        Returns:
            The score of every subnet found, ``"FLOPS_220.00M.accuracy/top1"``.
        """
        if self.resume_from:
            self.search.load_state_dict(load_state(self.resume_from, "greedy"))
            self.runner.logger.info(f"Search goes on at {self.current_flops:.2f}M: {self.current_subnet}")
        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        with self.comparing_subnets():
            self.search.run()
        metrics = {}
        for found in self.search.found:
            name = f"FLOPS_{found.cost:.2f}M"
            metrics[f"{name}.{self.score_key}"] = found.score
            self.runner.logger.info(f"For {found.target:g}M: {name}, {self.score_key}: {found.score:.4f}")
            if self.runner.rank == 0:
                remarks = f"{found.cost:.2f} M multiply-adds (at most {found.target:g}), {self.score_key} {found.score}"
                save_subnet(Path(self.runner.work_dir, f"{name}.yaml"), found.choices, remarks)
        self._save()
        self.runner.call_hook("after_test_epoch", metrics=metrics)
        self.runner.call_hook("after_test")
        return metrics

    def _evaluated(self, record: Evaluated) -> None:
        self.runner.logger.info(f"Slimming unit {record.origin}, {self.score_key}: {record.score}")

    def _decided(self, kept: Evaluated) -> None:
        self.runner.logger.info(f"Greedily find model, score: {kept.score}, {kept.choices}, FLOPS: {kept.cost:.2f}M")
        self._save()

    def _save(self) -> None:
        if self.runner.rank == 0:
            save_state(Path(self.runner.work_dir, STATE), "greedy", self.search.state_dict())
