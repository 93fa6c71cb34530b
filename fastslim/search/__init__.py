"""Find the best widths of a trained supernet for a budget."""

from fastslim.search.candidates import Evaluated, Found
from fastslim.search.evolution_search import EvolutionSearch
from fastslim.search.greedy_search import GreedySearch
from fastslim.search.report import EvaluatedSubnet, FoundSubnet, SearchReport
from fastslim.search.run_search import evolution, greedy

__all__ = [
    "Evaluated",
    "EvaluatedSubnet",
    "EvolutionSearch",
    "Found",
    "FoundSubnet",
    "GreedySearch",
    "SearchReport",
    "evolution",
    "greedy",
]
