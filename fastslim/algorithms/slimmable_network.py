"""Slimmable networks: a fixed list of subnets, trained together on the labels, with a batch norm for each width.

Source: Yu et al., Slimmable Neural Networks (ICLR 2019), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fastslim import errors
from fastslim.algorithms.joint_training import JointTraining
from fastslim.algorithms.parts import build_mutator, deployed, example_of, is_part
from fastslim.algorithms.slimmable import Choices
from fastslim.mutators import ChannelMutator, SlimmableChannelMutator
from fastslim.registry import MODELS


@MODELS.register_module()
class SlimmableNetwork(JointTraining):
    """Trains the subnets that its mutator lists, or the one of them that is deployed.

    One :meth:`train_step` runs every subnet on the labels, sums their gradients and makes one optimizer step;
    its losses are called ``subnet_0.loss``, ``subnet_1.loss``, ... Deployed, it is an ordinary network of one
    width, whose loss is called ``loss``.

    The first two arguments may also come in the order of MMRazor's release candidates: mutator, architecture.

    Args:
        architecture: the network; its weights are kept. A module or a config dict.
        mutator: a :class:`SlimmableChannelMutator`, a config dict, or None for the widths 0.25, 0.5, 0.75 and 1.
        deploy_index: which of the listed subnets becomes a network of exactly its size; -1 for none.
        data_preprocessor: see :class:`BaseAlgorithm`.
        init_cfg: see :class:`BaseAlgorithm`.
        example_inputs: what the network is called with, to trace it; taken from the mutator where not given.
        input_shape: shape of an example input, where none is given.
        norm_training: keep batch normalisation in training mode in evaluation, too.
        loss: see :class:`BaseAlgorithm`.
        grad_reduction: "sum" or "mean" of the subnets' gradients.
        fuse: see :class:`AutoSlim`, as for the three that follow.
        cuda_graphs: capture passes that repeat.
        overlap_students: run passes on two streams.
        share_stem: run the first layers once for all passes.

    Raises:
        FastslimTypeError: an argument of the wrong kind.
        FastslimValueError: `deploy_index` is none of a listed subnet.
    """

    mutator: SlimmableChannelMutator

    def __init__(
        self,
        architecture: nn.Module | Mapping[str, Any] | None = None,
        mutator: SlimmableChannelMutator | Mapping[str, Any] | None = None,
        deploy_index: int = -1,
        data_preprocessor: Callable[..., Any] | Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        *,
        example_inputs: Any = None,
        input_shape: Sequence[int] | None = None,
        norm_training: bool = False,
        loss: Callable[[Any, Any], Any] | None = None,
        grad_reduction: str = "sum",
        fuse: bool = True,
        cuda_graphs: bool = False,
        overlap_students: bool = False,
        share_stem: bool = True,
    ) -> None:
        if is_part(architecture, ChannelMutator):
            architecture, mutator = mutator, architecture  # type: ignore[assignment]
        super().__init__(
            architecture,
            data_preprocessor,
            init_cfg,
            loss=loss,
            norm_training=norm_training,
            grad_reduction=grad_reduction,
            cuda_graphs=cuda_graphs,
            overlap_students=overlap_students,
            share_stem=share_stem,
        )
        if example_inputs is None:
            example_inputs = example_of(input_shape)
        self.mutator = build_mutator(
            self.architecture, mutator or {"type": "SlimmableChannelMutator"}, example_inputs, SlimmableChannelMutator
        )
        #: How many subnets are listed.
        self.num_subnet = len(self.mutator.subnets)
        #: Whether one of them has become the whole network.
        self.is_deployed = deploy_index != -1
        if self.is_deployed:
            self._deploy(deploy_index)
        self.make_plan(fuse)

    def _deploy(self, index: int) -> None:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.num_subnet:
            raise errors.FastslimValueError(
                f"deploy_index={index!r}: choose one of the {self.num_subnet} subnets, 0 to {self.num_subnet - 1}, "
                "or -1 for none"
            )
        self.mutator.set_choices(self.mutator.subnets[index])
        self.architecture, self.mutator = deployed(self.mutator)

    def subnets_of_step(self) -> dict[str, Choices]:
        """The listed subnets."""
        if self.is_deployed:
            return {"": self.mutator.current_choices}
        return {f"subnet_{index}": subnet for index, subnet in enumerate(self.mutator.subnets)}
