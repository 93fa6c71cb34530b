"""Training algorithms: what one step does, and nothing else."""

from fastslim.algorithms.autoslim import AutoSlim
from fastslim.algorithms.base import BaseAlgorithm, Batch
from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.algorithms.verify import verify

__all__ = ["AutoSlim", "BaseAlgorithm", "Batch", "SlimmableAlgorithm", "verify"]
