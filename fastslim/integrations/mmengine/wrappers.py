"""Model wrappers for training with several processes: the passes stay the model's, one all-reduce a step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import MMDistributedDataParallel
from torch import nn

from fastslim import errors
from fastslim.algorithms import AutoSlim, JointTraining, SlimmableNetwork
from fastslim.integrations.mmengine.registry import MODEL_WRAPPERS


class JointTrainingDDP(MMDistributedDataParallel):
    """What both wrappers share.

    ``DistributedDataParallel`` itself never sees the gradients that kernels write into ``param.grad``; the model
    averages them over the processes where the optim wrapper says that they are to be synchronised, see
    :meth:`fastslim.algorithms.JointTraining.distribute`.

    Args:
        module: the model.
        device_ids: the process's GPU, ``LOCAL_RANK`` by default; of no meaning for a model on the CPU.
        **kwargs: of ``MMDistributedDataParallel``; `broadcast_buffers` and `process_group` are obeyed.

    Raises:
        FastslimTypeError: `module` is another model.
        FastslimValueError: its slim layers have been replaced (``sync_bn``).
    """

    wrapped: type[JointTraining] = JointTraining

    def __init__(self, module: nn.Module, *, device_ids: Sequence[Any] | int | None = None, **kwargs: Any) -> None:
        if not isinstance(module, self.wrapped):
            raise errors.FastslimTypeError(
                f"{type(self).__name__} wraps a {self.wrapped.__name__}, but got {type(module).__name__}"
            )
        replaced = [
            n for n, layer in module.mutator.layers.items() if module.architecture.get_submodule(n) is not layer
        ]
        if replaced:
            raise errors.FastslimValueError(
                f"{len(replaced)} slim layers, {replaced[0]!r} for one, have been replaced by others, as sync_bn does: "
                "leave sync_bn out of the config; every process normalises by its own part of the batch"
            )
        on_cpu = all(p.device.type == "cpu" for p in module.parameters())
        if on_cpu:
            device_ids = None  # mmengine's Runner names one whatever the device
        elif device_ids is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
            device_ids = [int(os.environ["LOCAL_RANK"])]
        super().__init__(module=module, device_ids=device_ids, **kwargs)
        self.module.distribute(self.process_group, broadcast_buffers=self.broadcast_buffers)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Any]:
        """All passes of the model's step, with the gradients of all processes."""
        return self.module.train_step(data, optim_wrapper)

    @property
    def _optim_wrapper_count_status_reinitialized(self) -> bool:
        return self.module._optim_wrapper_count_status_reinitialized

    @_optim_wrapper_count_status_reinitialized.setter
    def _optim_wrapper_count_status_reinitialized(self, value: bool) -> None:
        self.module._optim_wrapper_count_status_reinitialized = value


@MODEL_WRAPPERS.register_module()
class AutoSlimDDP(JointTrainingDDP):
    """Trains :class:`AutoSlim` with several processes: ``model_wrapper_cfg=dict(type="fastslim.AutoSlimDDP")``."""

    wrapped = AutoSlim


@MODEL_WRAPPERS.register_module()
class SlimmableNetworkDDP(JointTrainingDDP):
    """Trains :class:`SlimmableNetwork` with several processes."""

    wrapped = SlimmableNetwork
