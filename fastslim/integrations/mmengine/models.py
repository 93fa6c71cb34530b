"""`AutoSlim`, `SlimmableNetwork` and their base as mmengine's `Runner` wants a model."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastslim import algorithms, errors
from fastslim.algorithms import Batch, JointTraining
from fastslim.algorithms.parts import is_part
from fastslim.integrations.mmengine.keywords import checks_keywords
from fastslim.integrations.mmengine.registry import MODELS
from fastslim.mutators import ChannelMutator, mutator_of

# What Python's Mersenne Twister is made of: 624 words and the position among them.
_GENERATOR_WORDS = 625


class MmengineModel(algorithms.BaseAlgorithm):
    """What all models share.

    The state dict has one entry besides the architecture's, ``_extra_state``: the state of the generator that draws
    random widths, so that a resumed run draws the same widths as one that was never stopped.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(super().__init__).bind(*args, **kwargs)
        preprocessor = bound.arguments.get("data_preprocessor")
        if callable(preprocessor) and not isinstance(preprocessor, nn.Module):
            bound.arguments["data_preprocessor"] = _Called(preprocessor)  # mmengine's is a submodule
        super().__init__(*bound.args, **bound.kwargs)
        if hasattr(self, "mutator") and not _has_own_seed(bound.arguments, self.architecture):
            # A Runner's `randomness` seeds Python's generator, and its user expects that to be all.
            self.mutator.rng.seed(random.getrandbits(64))

    def unpack(self, data: Any, *, training: bool = True) -> Batch:
        """As :meth:`fastslim.algorithms.BaseAlgorithm.unpack`, and stacks what mmengine's `pseudo_collate` only lists.

        Labels are left as a list where the architecture has modes: it knows what its data samples are.
        """
        inputs, targets = super().unpack(data, training=training)
        inputs = _stacked(inputs)
        if not self.has_modes:
            targets = _stacked(targets)
            if isinstance(targets, list) and targets and all(isinstance(label, int) for label in targets):
                targets = torch.tensor(targets)
        if isinstance(targets, Tensor) and isinstance(inputs, Tensor):
            targets = targets.to(inputs.device)
        return Batch(inputs, targets)

    def get_extra_state(self) -> Tensor:
        """The state of the random widths, as numbers that can be copied to and from any device; none: no mutator."""
        mutator = getattr(self, "mutator", None)
        return torch.tensor([] if mutator is None else mutator.rng.getstate()[1], dtype=torch.int64)

    def set_extra_state(self, state: Any) -> None:
        """Takes back what :meth:`get_extra_state` gave.

        Raises:
            FastslimValueError: it is something else.
        """
        mutator = getattr(self, "mutator", None)
        if not isinstance(state, Tensor) or state.shape not in ((_GENERATOR_WORDS,), (0,)):
            raise errors.FastslimValueError(
                "the checkpoint's '_extra_state' is no state of random widths: delete it from the state dict"
            )
        if mutator is not None and len(state):
            version, _, gauss = mutator.rng.getstate()
            mutator.rng.setstate((version, tuple(state.tolist()), gauss))


class RunnerModel(MmengineModel, JointTraining):
    """What the models share that train several subnets in a step."""

    def forward(self, *inputs: Any, mode: str | None = None, **keywords: Any) -> Any:
        """As :meth:`fastslim.algorithms.BaseAlgorithm.forward`.

        Raises:
            FastslimRuntimeError: the model is wrapped in a plain ``MMDistributedDataParallel``, which would train
                the present subnet only.
        """
        if mode == "loss" and self.training and self.ranks is None and _inside_plain_wrapper(self):
            raise errors.FastslimRuntimeError(
                f"a plain DistributedDataParallel would train one width only: write "
                f"model_wrapper_cfg=dict(type='fastslim.{type(self).__name__}DDP')"
            )
        return super().forward(*inputs, mode=mode, **keywords)


@MODELS.register_module(force=True)  # before the plain algorithm of that name, as below
class BaseAlgorithm(MmengineModel, BaseModel):
    """:class:`fastslim.algorithms.BaseAlgorithm` as a model of mmengine: what algorithms of one's own derive from.

    Its own step trains the architecture as it is. A `mutator` that a subclass adds keeps its random state in
    checkpoints.
    """

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Any]:
        """One update with the architecture's losses.

        Returns:
            All losses as scalars, and their sum as ``loss``.
        """
        with optim_wrapper.optim_context(self):
            losses = self.loss(*self.unpack(data))
        total, scalars = self.parse_losses(losses)
        optim_wrapper.update_params(total)
        return scalars


@MODELS.register_module(force=True)
@checks_keywords(algorithms.AutoSlim)
class AutoSlim(RunnerModel, algorithms.AutoSlim, BaseModel):
    """:class:`fastslim.AutoSlim` as a model of mmengine, with the same arguments.

    Trains by ``Runner``; has ``val_step``, ``test_step`` and ``init_weights``. Without a `data_preprocessor`, and
    where the architecture has none, mmengine's ``BaseDataPreprocessor`` moves batches to the model's device.
    """


@MODELS.register_module(force=True)
@checks_keywords(algorithms.SlimmableNetwork)
class SlimmableNetwork(RunnerModel, algorithms.SlimmableNetwork, BaseModel):
    """:class:`fastslim.algorithms.SlimmableNetwork` as a model of mmengine, with the same arguments."""


class _Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, data: Any, training: bool = False) -> Any:
        return self.function(data, training)


def _has_own_seed(arguments: Mapping[str, Any], architecture: nn.Module) -> bool:
    mutator = next((value for value in arguments.values() if is_part(value, ChannelMutator)), None)
    if arguments.get("seed") is not None:
        return True
    if mutator is None:
        return mutator_of(architecture) is not None
    return not isinstance(mutator, Mapping) or mutator.get("seed") is not None


def _stacked(values: Any) -> Any:
    """A list of tensors of one shape as one tensor; anything else as it is."""
    if isinstance(values, list) and values and all(isinstance(value, Tensor) for value in values):
        if len({value.shape for value in values}) == 1:
            return torch.stack(values)
    return values


def _inside_plain_wrapper(model: nn.Module) -> bool:
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return wrapper is not None and wrapper.module is model
