"""What a subnet costs, in the units that MMRazor's loops count in: millions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.model import is_model_wrapper
from torch import Tensor

from fastslim import errors
from fastslim.algorithms import SlimmableAlgorithm
from fastslim.export import export_subnet
from fastslim.integrations.mmengine.keywords import checks_keywords
from fastslim.integrations.mmengine.registry import TASK_UTILS

CostFunction = Callable[[Mapping[str, int]], dict[str, float]]
_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9}


@TASK_UTILS.register_module()
@checks_keywords()
class ResourceEstimator:
    """Counts multiply-adds and parameters of a supernet's subnet, from its widths; nothing is run.

    "flops" are multiply-adds of one sample in convolutions and linear layers, at the size of input that the mutator
    has traced. MMRazor's estimator also counts normalisation, activations and pooling, about a percent more.

    Args:
        input_shape: of one sample's batch, where given it must be the one that was traced.
        units: of the numbers, "K", "M" or "G" for "flops" and "params".
        as_strings: not supported.
        flops_params_cfg: ``dict(input_shape=...)``, the same as `input_shape`.
        latency_cfg: not supported.

    Raises:
        FastslimValueError: an option that is not supported.
    """

    def __init__(
        self,
        input_shape: Any = None,
        units: Mapping[str, str] | None = None,
        as_strings: bool = False,
        flops_params_cfg: Mapping[str, Any] | None = None,
        latency_cfg: Any = None,
    ) -> None:
        if as_strings or latency_cfg:
            raise errors.FastslimValueError(
                "ResourceEstimator counts, and gives numbers: leave out as_strings and latency_cfg"
            )
        for key in flops_params_cfg or ():
            if key != "input_shape":
                raise errors.FastslimValueError(
                    f"flops_params_cfg has no key {key!r}: {errors.nearest(key, ['input_shape'])}"
                )
        self.input_shape = (flops_params_cfg or {}).get("input_shape", input_shape)
        self.units = {"flops": "M", "params": "M", **(units or {})}
        for key in ("flops", "params"):
            if self.units[key] not in _UNITS:
                raise errors.FastslimValueError(f"the unit {self.units[key]!r} of {key} is none of {', '.join(_UNITS)}")

    def estimate(self, model: SlimmableAlgorithm, choices: Mapping[str, int] | None = None) -> dict[str, float]:
        """``{"flops": ..., "params": ...}`` of a subnet; by default of the present one.

        Raises:
            FastslimValueError: an `input_shape` that was not traced.
        """
        self._check_shape(model)
        cost = model.subnet_cost(model.mutator.current_choices if choices is None else choices)
        return {
            "flops": cost.multiply_adds / _UNITS[self.units["flops"]],
            "params": cost.parameters / _UNITS[self.units["params"]],
        }

    def _check_shape(self, model: SlimmableAlgorithm) -> None:
        if self.input_shape is None:
            return
        example = model.mutator.trace.example_inputs
        tensors = [value for value in _flat(example) if isinstance(value, Tensor)]
        asked = tuple(self.input_shape)[-3:]
        if not tensors or tuple(tensors[0].shape[-len(asked) :]) != asked:
            traced = tuple(tensors[0].shape) if tensors else None
            raise errors.FastslimValueError(
                f"input_shape={tuple(self.input_shape)}, but the mutator has traced inputs of {traced}: give the "
                f"mutator parse_cfg=dict(type='ChannelAnalyzer', demo_input={tuple(self.input_shape)})"
            )


def make_costs(config: Mapping[str, Any] | None, model: SlimmableAlgorithm) -> CostFunction:
    """A function from choices to costs by name, from a loop's `estimator_cfg`.

    Args:
        config: of an estimator; None or without a type, :class:`ResourceEstimator`. Another estimator's
            ``estimate(model=...)`` is asked about each subnet as a network of its own, which takes time.
        model: the supernet.
    """
    estimator = TASK_UTILS.build({"type": ResourceEstimator, **(config or {})})
    if isinstance(estimator, ResourceEstimator):
        return lambda choices: estimator.estimate(model, choices)

    def estimated(choices: Mapping[str, int]) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "exporting a subnet with running statistics")  # they cost the same
            network = export_subnet(model, dict(choices))
        return dict(estimator.estimate(model=network))

    return estimated


def supernet_of(runner: Any) -> SlimmableAlgorithm:
    """The supernet that a runner holds, without its wrapper.

    Raises:
        FastslimTypeError: another kind of model.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not isinstance(model, SlimmableAlgorithm):
        raise errors.FastslimTypeError(
            f"this loop needs a supernet, such as model=dict(type='fastslim.AutoSlim', ...), but got "
            f"{type(model).__name__}"
        )
    return model


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, (list, tuple)) else [value]
