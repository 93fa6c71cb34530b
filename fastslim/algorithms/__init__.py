"""Training algorithms: what one step does, and nothing else."""

from fastslim.algorithms.autoslim import AutoSlim
from fastslim.algorithms.base import BaseAlgorithm, Batch
from fastslim.algorithms.joint_training import JointTraining
from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.algorithms.slimmable_network import SlimmableNetwork
from fastslim.algorithms.task_loss import add_prefix
from fastslim.algorithms.verify import verify

__all__ = [
    "AutoSlim",
    "BaseAlgorithm",
    "Batch",
    "JointTraining",
    "SlimmableAlgorithm",
    "SlimmableNetwork",
    "add_prefix",
    "verify",
]
