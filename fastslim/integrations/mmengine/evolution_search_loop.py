"""Evolutionary search as a train loop: the best subnet within constraints on its cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.runner import EpochBasedTrainLoop

from fastslim import errors
from fastslim.algorithms.calibrate import calibrate_batch_norm
from fastslim.export import export_subnet
from fastslim.files import replace_file
from fastslim.integrations.mmengine.calibration import FirstSamples
from fastslim.integrations.mmengine.costs import make_costs, supernet_of
from fastslim.integrations.mmengine.keywords import checks_keywords
from fastslim.integrations.mmengine.registry import LOOPS
from fastslim.integrations.mmengine.search_state import load_state, save_state, save_subnet
from fastslim.integrations.mmengine.subnet_scores import SubnetScores
from fastslim.search import Evaluated, EvolutionSearch

_COSTS = ("flops", "params")
_SAMPLES = 4096  # for the statistics of the best subnet; MMRazor's number
_MOBILE = {"flops": (0.0, 330.0)}


@LOOPS.register_module()
@checks_keywords()
class EvolutionSearchLoop(SubnetScores, EpochBasedTrainLoop):
    """Crosses and mutates the best subnets, generation after generation, see :class:`EvolutionSearch`.

    Writes ``search_epoch_<n>.json`` into the work_dir after every generation, and at the end
    ``best_fix_subnet.yaml`` (``"unit": width`` a line) and ``best_subnet.pth`` (the state dict of the subnet as a
    network of its own, with statistics calibrated on the dataloader). Every process of a distributed run draws the
    same subnets.

    Args:
        runner: holds the supernet.
        dataloader: what subnets are compared on; better not the test set. A loader or its config.
        evaluator: an evaluator or its config.
        max_epochs: generations.
        max_keep_ckpts: of the files of generations, the last so many are kept; all for 0 or less.
        resume_from: the ``search_epoch_<n>.json`` of a search to continue.
        num_candidates: subnets evaluated a generation.
        top_k: the best subnets, which have children.
        num_mutation: children by mutation a generation.
        num_crossover: children by crossover a generation.
        mutate_prob: of each unit.
        crossover_prob: of each unit.
        calibrate_sample_num: see :class:`SubnetScores`.
        constraints_range: bounds by cost, ``dict(flops=(0, 330), params=5)``, in millions; None for none.
        estimator_cfg: of what counts the costs, see :func:`make_costs`.
        predictor_cfg: not supported.
        score_key: which metric is maximised.
        init_candidates: not supported.

    Attributes:
        top_k_candidates: the best subnets so far, best first.

    Raises:
        FastslimValueError: constraints that no subnet meets, or an option that is not supported.
        FastslimFileError: `resume_from` is no state of an evolution; a pickle is never opened.
    """

    fp16 = False

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any,
        max_epochs: int = 20,
        max_keep_ckpts: int = 3,
        resume_from: str | None = None,
        num_candidates: int = 50,
        top_k: int = 10,
        num_mutation: int = 25,
        num_crossover: int = 25,
        mutate_prob: float = 0.1,
        crossover_prob: float = 0.5,
        calibrate_sample_num: int = -1,
        constraints_range: Mapping[str, Any] | None = _MOBILE,
        estimator_cfg: Mapping[str, Any] | None = None,
        predictor_cfg: Any = None,
        score_key: str = "accuracy/top1",
        init_candidates: Any = None,
    ) -> None:
        for name, value in dict(predictor_cfg=predictor_cfg, init_candidates=init_candidates).items():
            if value is not None:
                raise errors.FastslimValueError(f"{name} is not supported: leave it out; every subnet is evaluated")
        super().__init__(runner, dataloader, max_epochs)
        listed = isinstance(evaluator, (dict, list, tuple))
        self.evaluator: Evaluator = runner.build_evaluator(evaluator) if listed else evaluator
        self.evaluator.dataset_meta = getattr(self.dataloader.dataset, "metainfo", None)
        self.score_key, self.resume_from, self.calibrate_sample_num = score_key, resume_from, calibrate_sample_num
        self.max_keep_ckpts, self.constraints_range = max_keep_ckpts, constraints_range
        self.model = supernet_of(runner)
        self.costs = make_costs(estimator_cfg, self.model)
        ranges = _ranges(constraints_range)
        cost = next(iter(ranges), "flops")
        self.search = EvolutionSearch(
            self.model.mutator,
            lambda choices: self.costs(choices)[cost],
            self.score,
            [ranges.pop(cost, (0.0, self.costs(self.model.mutator.max_choices)[cost]))],
            population_size=num_candidates,
            generations=max_epochs,
            top_k=top_k,
            num_mutations=num_mutation,
            num_crossovers=num_crossover,
            mutation_prob=mutate_prob,
            crossover_prob=crossover_prob,
            seed=_seed(runner),
            allowed=(lambda choices: _within(ranges, self.costs(choices))) if ranges else None,
            on_step=self._generation_done,
            on_evaluated=self._evaluated,
        )
        self.top_k_candidates: list[Evaluated] = []

    def run(self) -> torch.nn.Module:
        """Searches.

        Returns:
            The supernet, which is as it was.
        """
        if self.resume_from:
            self.search.load_state_dict(load_state(self.resume_from, "evolution"))
            self._epoch = self.search.generation
            self.runner.logger.info(f"Search goes on at generation {self._epoch}")
        self.runner.call_hook("before_train")
        with self.comparing_subnets():
            best = self.search.run()[0]
        self.runner.logger.info(f"Best subnet, {self.score_key} {best.score:.4f}: {best.choices}")
        if self.runner.rank == 0:
            folder = Path(self.runner.work_dir)
            remarks = f"{best.cost:.2f} M (at most {best.target:g}), {self.score_key} {best.score}"
            save_subnet(folder / "best_fix_subnet.yaml", best.choices, remarks)
            # Alone it is evaluated with running statistics, so they have to be its own.
            calibrate_batch_norm(self.model, FirstSamples(self.dataloader, _SAMPLES), [best.choices])
            weights = {"state_dict": export_subnet(self.model, best.choices).state_dict(), "meta": {}}
            replace_file(folder / "best_subnet.pth", lambda stream: torch.save(weights, stream))
        self.runner.call_hook("after_train")
        return self.runner.model

    def _evaluated(self, record: Evaluated) -> None:
        self.runner.logger.info(
            f"Epoch:[{record.step}/{self._max_epochs}] {record.origin}, cost: {record.cost:.2f}M, score: {record.score}"
        )

    def _generation_done(self, best: Evaluated) -> None:
        self._epoch = self.search.generation
        self.top_k_candidates = list(self.search.top)
        self.runner.logger.info(f"Epoch:[{self._epoch}/{self._max_epochs}], top1_score: {best.score}")
        if self.runner.rank == 0:
            folder = Path(self.runner.work_dir)
            save_state(folder / f"search_epoch_{self._epoch}.json", "evolution", self.search.state_dict())
            if self.max_keep_ckpts > 0:
                (folder / f"search_epoch_{self._epoch - self.max_keep_ckpts}.json").unlink(missing_ok=True)


def _ranges(constraints: Mapping[str, Any] | None) -> dict[str, tuple[float, float]]:
    ranges = {}
    for name, bounds in (constraints or {}).items():
        if name not in _COSTS:
            raise errors.FastslimValueError(f"constraints_range has no key {name!r}: {errors.nearest(name, _COSTS)}")
        low, high = bounds if isinstance(bounds, (list, tuple)) else (0.0, bounds)
        ranges[name] = (float(low), float(high))
    return ranges


def _within(ranges: Mapping[str, tuple[float, float]], costs: Mapping[str, float]) -> bool:
    return all(low <= costs[name] <= high for name, (low, high) in ranges.items())


def _seed(runner: Any) -> int:
    seed = getattr(runner, "seed", 0)
    return seed if isinstance(seed, int) else 0
