"""Fastslim under mmengine: importing this package puts fastslim's classes into mmengine's registries.

Their scope is ``fastslim``, and ``mmrazor`` where MMRazor is not installed: ``type="fastslim.AutoSlim"``.
"""

from fastslim import errors

try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise errors.FastslimRuntimeError(
        "fastslim.integrations.mmengine needs mmengine: pip install 'fastslim[mmengine]'"
    ) from error

from fastslim.integrations.mmengine import checkpoints as _checkpoints  # noqa: F401  # lets mmengine read its own files
from fastslim.integrations.mmengine.calibration import CalibrateBNMixin
from fastslim.integrations.mmengine.costs import ResourceEstimator
from fastslim.integrations.mmengine.data import Accuracy, Digits
from fastslim.integrations.mmengine.evolution_search_loop import EvolutionSearchLoop
from fastslim.integrations.mmengine.greedy_search_loop import AutoSlimGreedySearchLoop
from fastslim.integrations.mmengine.models import AutoSlim, BaseAlgorithm, SlimmableNetwork
from fastslim.integrations.mmengine.registry import HOOKS, LOOPS, MODEL_WRAPPERS, MODELS
from fastslim.integrations.mmengine.subnet_val_loops import SlimmableValLoop, SubnetValLoop
from fastslim.integrations.mmengine.wrappers import AutoSlimDDP, SlimmableNetworkDDP

__all__ = [
    "HOOKS",
    "LOOPS",
    "MODELS",
    "MODEL_WRAPPERS",
    "Accuracy",
    "AutoSlim",
    "AutoSlimDDP",
    "AutoSlimGreedySearchLoop",
    "BaseAlgorithm",
    "CalibrateBNMixin",
    "Digits",
    "EvolutionSearchLoop",
    "ResourceEstimator",
    "SlimmableNetwork",
    "SlimmableNetworkDDP",
    "SlimmableValLoop",
    "SubnetValLoop",
]
