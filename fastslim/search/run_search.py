"""`fastslim.search.greedy` and `fastslim.search.evolution`: budgets in, a report out; interruptible."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastslim.algorithms import SlimmableAlgorithm
from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.search.budgets import Latency, absolute, check_reachable_budget, parse_budgets
from fastslim.search.candidates import candidate_widths, key_of
from fastslim.search.evolution_search import EvolutionSearch
from fastslim.search.greedy_search import GreedySearch
from fastslim.search.held_batches import update_digest
from fastslim.search.progress import make_progress
from fastslim.search.report import FoundSubnet, SearchReport
from fastslim.search.scorer import Metric, SubnetScorer
from fastslim.search.search_folder import SearchFolder
from fastslim.search.session import Search, SearchSession

Budgets = Mapping[str, float | Sequence[float]]


def greedy(
    algo: SlimmableAlgorithm,
    val_loader: Iterable[Any],
    budgets: Budgets,
    *,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int | None = None,
    num_batches: int | None = None,
    metric: Metric | None = None,
    latency: Latency | None = None,
    run: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    seed: int = 0,
) -> SearchReport:
    """Finds the best widths for each budget by greedy slimming, see :class:`GreedySearch`.

    `algo` is afterwards as it was: widths, mode, weights and statistics. The batches are read once and held on the
    network's device. What the candidates of a decision have in common is computed once, where the forward allows it.
    Ctrl-C is safe at any time when a `run` folder is given; a decision that it falls into is made again.

    In a torch.distributed group every process calls this with the same arguments: they share the candidates, come to
    the same report, and the first one writes the folder.

    Args:
        algo: the trained supernet.
        val_loader: ``(inputs, targets)`` that subnets are compared on; better not the test set.
        budgets: ``{"flops": [0.5, 0.25], "parameters": 1_000_000}``; up to 1 a fraction of the full cost, above it an
            absolute one. "flops" are multiply-adds of one sample; "memory" is the largest sum, in bytes, of one
            sample's activations that live at the same time; "latency" is in ms, see `latency`.
        calibration: batches for the statistics of batch normalisation, computed for every subnet; those of the subnets
            found stay with `algo`, as :func:`fastslim.calibrate_batch_norm` would leave them. By default every
            validation batch is normalised by its own statistics, as in AutoSlim's own code. Take large batches then:
            of 80 random subnets of a small CNN for the digits (352 images), the rank correlation with accuracies
            calibrated on all of the training data was 0.997 with batches of 88 and 0.999 when calibrated with 1024
            samples, which took four times as long. Trained until all 80 lay within two per cent, it was 0.77 (0.95
            with one batch of 352) and 0.96.
        calibration_batches: of `calibration`; None takes as many as hold 1024 samples.
        num_batches: of `val_loader`; None takes all.
        metric: ``metric(output, targets)`` -> one score per sample (N,), or the mean of the batch; higher is better.
            The accuracy of logits by default.
        latency: predicts a subnet's time, ``fastslim.cost.LatencyTable(algo).measure()``; it is then listed with the
            other costs.
        run: a folder for evaluated.jsonl (a line a subnet), state.json (after every decision) and report.json.
        resume: continue the search in `run`, to the result it would have had; begin one if there is none.
        progress: show a bar on a terminal, lines elsewhere.
        seed: of torch's and Python's generators while the loaders are read.

    Returns:
        The report; ``report.best("flops", 0.5)`` is a subnet.

    Raises:
        FastslimValueError: a budget below the smallest subnet (names it), an unknown cost, no data, nothing to
            search, or a `run` folder with another search.
        FastslimTypeError: an output that is no tensor of logits, without a `metric`.
        FastslimRuntimeError: a score that is not finite; names the subnet.
        FastslimFileError: the folder cannot be used.
    """
    return _run(
        "greedy",
        lambda cost, score, targets, **callbacks: GreedySearch(algo.mutator, cost, score, targets, **callbacks),
        {},
        algo,
        budgets,
        latency,
        lambda: SubnetScorer(
            algo,
            val_loader,
            calibration=calibration,
            calibration_batches=calibration_batches,
            num_batches=num_batches,
            metric=metric,
            seed=seed,
        ),
        run,
        resume,
        progress,
    )


def evolution(
    algo: SlimmableAlgorithm,
    val_loader: Iterable[Any],
    budgets: Budgets,
    *,
    population_size: int = 50,
    generations: int = 20,
    top_k: int = 10,
    num_mutations: int | None = None,
    num_crossovers: int | None = None,
    mutation_prob: float = 0.1,
    crossover_prob: float = 0.5,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int | None = None,
    num_batches: int | None = None,
    metric: Metric | None = None,
    latency: Latency | None = None,
    run: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    seed: int = 0,
) -> SearchReport:
    """Finds the best widths for each budget by an evolutionary search, see :class:`EvolutionSearch`.

    Args:
        algo: as for :func:`greedy`, and so on for all that is not listed here.
        val_loader: see :func:`greedy`.
        budgets: see :func:`greedy`; every one is searched on its own.
        population_size: subnets evaluated a generation.
        generations: a budget.
        top_k: the best subnets, which have children.
        num_mutations: children by mutation a generation; half the population by default.
        num_crossovers: children by crossover a generation; half the population by default.
        mutation_prob: of each unit.
        crossover_prob: of each unit.
        calibration: see :func:`greedy`.
        calibration_batches: see :func:`greedy`.
        num_batches: see :func:`greedy`.
        metric: see :func:`greedy`.
        latency: see :func:`greedy`.
        run: see :func:`greedy`.
        resume: see :func:`greedy`.
        progress: see :func:`greedy`.
        seed: of the search, and while the loaders are read.

    Returns:
        The report.

    Raises:
        FastslimError: as :func:`greedy`.
    """
    options: dict[str, Any] = dict(
        population_size=population_size,
        generations=generations,
        top_k=top_k,
        num_mutations=num_mutations,
        num_crossovers=num_crossovers,
        mutation_prob=mutation_prob,
        crossover_prob=crossover_prob,
        seed=seed,
    )

    def make(cost: Any, score: Any, targets: Sequence[float], **callbacks: Any) -> EvolutionSearch:
        return EvolutionSearch(algo.mutator, cost, score, targets, **options, **callbacks)

    return _run(
        "evolution",
        make,
        options,
        algo,
        budgets,
        latency,
        lambda: SubnetScorer(
            algo,
            val_loader,
            calibration=calibration,
            calibration_batches=calibration_batches,
            num_batches=num_batches,
            metric=metric,
            seed=seed,
        ),
        run,
        resume,
        progress,
    )


def _run(
    method: str,
    make: Callable[..., Search],
    options: Mapping[str, Any],
    algo: SlimmableAlgorithm,
    budgets: Budgets,
    latency: Latency | None,
    make_scorer: Callable[[], SubnetScorer],
    run: Path | str | None,
    resume: bool,
    progress: bool,
) -> SearchReport:
    if not isinstance(algo, SlimmableAlgorithm):
        raise FastslimTypeError(f"algo should be a fastslim.AutoSlim, but got {type(algo).__name__}")
    if resume and run is None:
        raise FastslimValueError("resume=True needs the folder of the search: run=...")
    asked = parse_budgets(budgets)
    if "latency" in asked and latency is None:
        raise FastslimValueError(
            "a budget of latency needs a table of the machine: latency=fastslim.cost.LatencyTable(algo).measure()"
        )
    session = SearchSession(method, algo, latency, make_progress(progress))
    full, smallest = session.costs(algo.mutator.max_choices), session.costs(algo.mutator.min_choices)
    limits = {name: {absolute(value, full[name]): value for value in values} for name, values in asked.items()}
    for name, values in asked.items():
        for value in values:
            check_reachable_budget(name, value, smallest[name], full[name])
    # All searches are made before one runs: an impossible budget is refused at once.
    searches = {name: session.prepare(name, make, list(limits[name])) for name in limits}
    scorer = make_scorer()
    session.scorer = scorer
    if run is not None or session.processes.size > 1:
        identity = _identity(method, options, algo, {name: sorted(values) for name, values in limits.items()}, scorer)
        identity["costs"] = {"full": full, "smallest": smallest}
        session.processes.check_same(identity)
        if run is not None:
            session.open(SearchFolder(run), identity, resume)
    with scorer, session.progress:
        if method == "greedy" and scorer.reason:
            session.progress.say(f"every subnet is computed from the input on: {scorer.reason}")
        session.score(algo.mutator.max_choices)  # the reference of the table; a broken metric shows at once
        for name, search in searches.items():
            search.run()
            session.save()
            session.progress.evaluated(f"{method} {name}", 1.0, len(session.cache), search.found[-1].score)
            session.progress.say(f"{name}: found {len(search.found)} subnets, {len(session.cache)} evaluated")
        best = list({key_of(found.choices): found.choices for s in searches.values() for found in s.found}.values())
        statistics = scorer.statistics_of(best)
    before = algo.mutator.current_choices
    for choices, own in zip(best, statistics, strict=False):
        algo.store_calibration(choices, own)
    algo.set_subnet(before)
    report = SearchReport(
        method,
        _name_of(scorer.metric),
        session.cache[key_of(algo.mutator.max_choices)],
        tuple(
            FoundSubnet(
                name, limits[name][found.target], found.target, found.choices, session.costs(found.choices), found.score
            )
            for name, search in searches.items()
            for found in search.found
        ),
        tuple(session.cache.values()),
    )
    if session.folder is not None:
        report.save(session.folder.path / "report.json")
    return report


def _identity(
    method: str,
    options: Mapping[str, Any],
    algo: SlimmableAlgorithm,
    limits: Mapping[str, list[float]],
    scorer: SubnetScorer,
) -> dict[str, Any]:
    """What a search has to share with another one to be its continuation."""
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in algo.architecture.state_dict().items():
        weights.update(name.encode())
        update_digest(weights, tensor)
    return {
        "method": method,
        "options": dict(options),
        "budgets": dict(limits),
        "network": candidate_widths(algo.mutator),
        "weights": weights.hexdigest(),
        "metric": _name_of(scorer.metric),
        "validation data": scorer.validation.digest,
        "calibration data": None if scorer.calibration is None else scorer.calibration.digest,
    }


def _name_of(metric: Metric) -> str:
    return getattr(metric, "__name__", type(metric).__name__)
