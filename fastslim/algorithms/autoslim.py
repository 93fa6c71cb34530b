"""AutoSlim's first stage: slimmable training by the sandwich rule with in-place distillation.

Source: Yu and Huang, Universally Slimmable Networks (ICCV 2019), sections 3.2 and 4; AutoSlim
(arXiv:1903.11728), section 3.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastslim import errors
from fastslim.algorithms.base import Batch
from fastslim.algorithms.joint_training import JointTraining, one_of
from fastslim.algorithms.parts import build_distiller, build_mutator, distiller_of_modes, example_of, is_part
from fastslim.algorithms.retraining import prepare_retraining
from fastslim.algorithms.slimmable import Choices
from fastslim.algorithms.task_loss import logits_of
from fastslim.distillers import ConfigurableDistiller
from fastslim.mutators import ChannelMutator, OneShotChannelMutator, RatioPruner
from fastslim.ops import kl_div_loss
from fastslim.registry import MODELS


@MODELS.register_module()
class AutoSlim(JointTraining):
    """Trains one network at every width.

    One :meth:`train_step` runs the max subnet on the ground truth, then the min subnet and
    `num_samples` random ones on the max subnet's detached output, sums the gradients of all passes
    and makes one optimizer step.

    The first three arguments may also come in MMRazor 1.0.0's order: architecture, mutator, distiller.

    Args:
        mutator: chooses widths; an :class:`OneShotChannelMutator`, a config dict, or None for the
            one of a converted architecture, else one-shot units with `choices` and `divisor`.
        distiller: makes the students' losses; a :class:`ConfigurableDistiller`, a config dict, or
            None for KL divergence on the network's output (in mode "tensor", where it has modes).
        architecture: the network; its weights are kept, its layers become slim ones in place. Or
            one that `fastslim.convert` has converted.
        data_preprocessor: see :class:`BaseAlgorithm`.
        init_cfg: see :class:`BaseAlgorithm`.
        num_samples: random subnets per step.
        num_random_samples: the same under its MMRazor 1.0.0 name.
        norm_training: keep batch normalisation in training mode in evaluation, too.
        example_inputs: what the network is called with, to trace it: a tensor, a tuple or a dict.
        input_shape: shape of an example input, where none is given; three numbers are one image's.
        choices: width ratios of the default mutator; i/12 for i in 2..12 by default.
        divisor: widths of the default mutator are multiples of this.
        exclude: patterns of module names whose output channels stay full.
        random_widths: "per_unit" draws a width for every unit, "uniform" one ratio for all.
        student_loss: "kd" (soft labels only, the paper) or "ce+kd" (MMRazor 1.0.0).
        grad_reduction: "sum" of the passes' gradients (the paper), or "mean".
        loss: loss of the max subnet, ``loss(output, targets)`` -> scalar or dict of scalars;
            cross-entropy by default. A :class:`torch.nn.CrossEntropyLoss` runs as the fused kernel.
        cuda_graphs: on a GPU, capture the max and the min pass as CUDA graphs once their shapes repeat, and
            replay them: the host then issues two of the passes with one call each. For networks whose
            forward does the same every time; not with a distiller. :attr:`graph_report` says what was done.
        overlap_students: on a GPU, run students on two streams, so that one's backward pass overlaps
            the next one's forward pass; the activations of two students are then held at once.
        fuse: run batch normalisation, residual addition and activation as one kernel where the
            traced graph allows; :attr:`plan_report` says where not.
        share_stem: run the first layers, whose channels are the same at every width (a convolution of the images,
            its batch norm, activation and pool, a depthwise convolution behind them), once for all passes of a step;
            the gradients and running statistics are those of separate passes. :attr:`plan_report` says which layers
            these are, or why there are none.
        seed: of the random widths.
        pruner: `mutator` under its MMRazor 0.x name, as the four that follow.
        retraining: train the subnets of `channel_cfg` on the labels instead of sampling, see
            :func:`~fastslim.algorithms.retraining.prepare_retraining`; the distiller has no part in it.
        channel_cfg: one subnet, or a list of them: dicts, or paths of JSON or YAML files.
        bn_training_mode: `norm_training`.
        num_sample_training: all passes of a step, so two more than `num_samples`.

    Raises:
        FastslimTypeError: an argument of the wrong kind.
        FastslimRuntimeError: the network cannot be traced, or another mutator has converted it.
    """

    def __init__(
        self,
        mutator: OneShotChannelMutator | Mapping[str, Any] | None = None,
        distiller: ConfigurableDistiller | Mapping[str, Any] | None = None,
        architecture: nn.Module | Mapping[str, Any] | None = None,
        data_preprocessor: Callable[..., Any] | Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        num_samples: int = 2,
        *,
        num_random_samples: int | None = None,
        norm_training: bool = False,
        example_inputs: Any = None,
        input_shape: Sequence[int] | None = None,
        choices: Sequence[float] | None = None,
        divisor: int = 8,
        exclude: Sequence[str] = (),
        random_widths: str = "per_unit",
        student_loss: str = "kd",
        grad_reduction: str = "sum",
        loss: Callable[[Any, Any], Tensor | dict[str, Tensor]] | None = None,
        fuse: bool = True,
        cuda_graphs: bool = False,
        overlap_students: bool = False,
        share_stem: bool = True,
        seed: int | None = None,
        pruner: OneShotChannelMutator | Mapping[str, Any] | None = None,
        retraining: bool = False,
        channel_cfg: Any = None,
        bn_training_mode: bool = False,
        num_sample_training: int | None = None,
    ) -> None:
        if mutator is not None and not is_part(mutator, ChannelMutator):
            if architecture is None or is_part(architecture, ConfigurableDistiller):
                architecture, mutator, distiller = mutator, distiller, architecture  # type: ignore[assignment]
        super().__init__(
            architecture,
            data_preprocessor,
            init_cfg,
            loss=loss,
            norm_training=norm_training or bn_training_mode,
            grad_reduction=grad_reduction,
            cuda_graphs=cuda_graphs,
            overlap_students=overlap_students,
            share_stem=share_stem,
        )
        self.num_samples = _random_subnets(num_samples, num_random_samples, num_sample_training)
        self.student_loss = one_of("student_loss", student_loss, ("kd", "ce+kd"))
        if mutator is not None and pruner is not None:
            raise errors.FastslimValueError("pruner is the old name of mutator: give one of them")
        if example_inputs is None:
            example_inputs = example_of(input_shape)
        self.retraining = retraining
        self._retrained: list[Choices] = []
        given = pruner if mutator is None else mutator
        if retraining:
            parts = prepare_retraining(self.architecture, given, example_inputs, channel_cfg)
            self.architecture, self.mutator, self._retrained = parts
        else:
            self.mutator = build_mutator(
                self.architecture,
                given,
                example_inputs,
                choices=choices,
                divisor=divisor,
                exclude=exclude,
                random_widths=random_widths,
                seed=seed,
            )
            if distiller is None and self.has_modes:
                distiller = distiller_of_modes(self.architecture, self.mutator.trace.example_inputs)
            # The mutator replaces layers, so it comes before the recorders, which look at them.
            self.distiller = build_distiller(self.architecture, distiller)
        self.make_plan(fuse)

    def subnets_of_step(self) -> dict[str, Choices]:
        """The max, the min and the random subnets; when retraining, the listed ones."""
        if self.retraining:
            return {f"subnet_{i}": subnet for i, subnet in enumerate(self._retrained)} or {"": {}}
        subnets = {"max_subnet": self.mutator.max_choices, "min_subnet": self.mutator.min_choices}
        for index in range(self.num_samples):
            subnets[f"random_subnet_{index}"] = self.sample_subnet()
        return subnets

    def choose_subnet(self, index: int, choices: Mapping[str, int]) -> None:
        """Sets the widths of the step's `index`-th pass, and when retraining its batch norms."""
        if isinstance(self.mutator, RatioPruner) and self._retrained:
            self.mutator.switch_subnet(choices, index)
        elif not self.retraining:
            self.mutator.set_choices(choices)

    def losses_of_pass(self, batch: Batch, teacher: Any, *, first: bool) -> tuple[dict[str, Tensor], Any]:
        """Losses and output of one pass: the max subnet's on the labels, a student's on the max subnet's output."""
        if self.retraining:
            return self.losses_of(batch, self.fast_architecture)
        if first:
            with contextlib.nullcontext() if self.distiller is None else self.distiller.teacher_pass():
                return self.losses_of(batch, self.fast_architecture)
        with contextlib.nullcontext() if self.distiller is None else self.distiller.student_pass():
            if self.student_loss == "ce+kd":
                losses, output = self.losses_of(batch, self.fast_architecture)
            else:
                losses, output = {}, self.call(self.fast_architecture, batch.inputs)
        if self.distiller is None:
            losses["loss_kl"] = kl_div_loss(logits_of(output), logits_of(teacher))
        else:
            losses.update(self.distiller.compute_distill_losses())
        return losses, output


def _random_subnets(num_samples: int, num_random_samples: int | None, num_sample_training: int | None) -> int:
    """How many random subnets a step has, by whichever name it was given."""
    if num_random_samples is not None:
        num_samples = num_random_samples
    elif num_sample_training is not None:
        num_samples = num_sample_training - 2
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 0:
        raise errors.FastslimValueError(f"num_samples={num_samples!r} must be 0 or a positive integer")
    return num_samples
