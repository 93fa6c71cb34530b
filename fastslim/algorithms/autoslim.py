"""AutoSlim's first stage: slimmable training by the sandwich rule with in-place distillation.

Source: Yu and Huang, Universally Slimmable Networks (ICCV 2019), sections 3.2 and 4; AutoSlim
(arXiv:1903.11728), section 3.1.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.algorithms.base import Batch
from fastslim.algorithms.sandwich_step import SandwichStep
from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.distillers import ConfigurableDistiller
from fastslim.graph import make_plan
from fastslim.mutators import OneShotChannelMutator, mutator_of, one_shot_units
from fastslim.ops import kl_div_loss, sandwich_loss
from fastslim.registry import MODELS


@MODELS.register_module()
class AutoSlim(SlimmableAlgorithm):
    """Trains one network at every width.

    One :meth:`train_step` runs the max subnet on the ground truth, then the min subnet and
    `num_samples` random ones on the max subnet's detached output, sums the gradients of all passes
    and makes one optimizer step.

    Args:
        mutator: chooses widths; an :class:`OneShotChannelMutator`, a config dict, or None for the
            one of a converted architecture, else one-shot units with `choices` and `divisor`.
        distiller: makes the students' losses; a :class:`ConfigurableDistiller`, a config dict, or
            None for KL divergence on the network's output.
        architecture: the network; its weights are kept, its layers become slim ones in place. Or
            one that `fastslim.convert` has converted.
        data_preprocessor: see :class:`BaseAlgorithm`.
        init_cfg: see :class:`BaseAlgorithm`.
        num_samples: random subnets per step.
        num_random_samples: the same under its MMRazor 1.0.0 name.
        norm_training: keep batch normalisation in training mode in evaluation, too.
        example_inputs: what the network is called with, to trace it: a tensor, a tuple or a dict.
        input_shape: shape of an example input, where none is given.
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
        seed: of the random widths.

    Raises:
        FastslimTypeError: an argument of the wrong kind.
        FastslimRuntimeError: the network cannot be traced, or another mutator has converted it.
    """

    _step: SandwichStep

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
        seed: int | None = None,
    ) -> None:
        super().__init__(architecture, data_preprocessor, init_cfg, norm_training=norm_training)
        self.num_samples = num_samples if num_random_samples is None else num_random_samples
        if not isinstance(self.num_samples, int) or self.num_samples < 0:
            raise errors.FastslimValueError(f"num_samples={self.num_samples!r} must be 0 or a positive integer")
        self.student_loss = _one_of("student_loss", student_loss, ("kd", "ce+kd"))
        self.grad_reduction = _one_of("grad_reduction", grad_reduction, ("sum", "mean"))
        self.loss = _check_loss(loss)
        self.cuda_graphs, self.overlap_students = cuda_graphs, overlap_students

        if example_inputs is None and input_shape is not None:
            example_inputs = torch.zeros(*input_shape)
        self.mutator = self._build_mutator(mutator, example_inputs, choices, divisor, exclude, random_widths, seed)
        # The mutator replaces layers, so it comes before anything that looks at them.
        if not self.mutator.is_prepared_for(self.architecture):
            self.mutator.prepare_from_supernet(self.architecture)
        self.distiller = self._build_distiller(distiller)
        if self.distiller is not None:
            self.distiller.prepare_from_teacher(self.architecture)
            self.distiller.prepare_from_student(self.architecture)

        keep = set() if self.distiller is None else self.distiller.recorded_modules
        if self.distiller is not None and self.distiller.needs_own_forward:
            plan, report = None, ["the distiller watches functions or the whole network, which a plan would hide"]
        else:
            plan, report = make_plan(self.mutator.trace, keep=keep) if fuse else (None, ["fuse=False"])
        #: What the execution plan fused and what it left to the network's own forward, and why.
        self.plan_report: list[str] = list(report)
        # Not registered as submodules: they share the architecture's layers.
        self.__dict__["_plan"] = plan
        self.__dict__["_step"] = SandwichStep(self)
        self._warned_of_mode = False

    def _build_mutator(
        self,
        mutator: OneShotChannelMutator | Mapping[str, Any] | None,
        example_inputs: Any,
        choices: Sequence[float] | None,
        divisor: int,
        exclude: Sequence[str],
        random_widths: str,
        seed: int | None,
    ) -> OneShotChannelMutator:
        converted = mutator_of(self.architecture)
        if converted is not None and mutator is None:
            if choices is not None or divisor != 8 or exclude or random_widths != "per_unit" or seed is not None:
                raise errors.FastslimValueError(
                    "the architecture is converted already: give choices, divisor, exclude, random_widths and seed "
                    "to fastslim.convert"
                )
            mutator = converted
        if mutator is None:
            return OneShotChannelMutator(
                channel_unit_cfg=one_shot_units(choices, divisor),
                example_inputs=example_inputs,
                exclude=tuple(exclude),
                random_widths=random_widths,
                seed=seed,
            )
        if isinstance(mutator, Mapping):
            config = dict(mutator)
            if example_inputs is not None:
                config.setdefault("example_inputs", example_inputs)
            mutator = MODELS.build(config)
        if converted is not None and mutator is not converted:
            raise errors.FastslimRuntimeError(
                "the architecture is converted already, by another mutator; leave out mutator= or convert a new network"
            )
        if not isinstance(mutator, OneShotChannelMutator):
            raise errors.FastslimTypeError(
                f"mutator should be a `dict` or `OneShotChannelMutator` instance, but got {type(mutator)}"
            )
        return mutator

    def _build_distiller(
        self, distiller: ConfigurableDistiller | Mapping[str, Any] | None
    ) -> ConfigurableDistiller | None:
        if isinstance(distiller, Mapping):
            distiller = MODELS.build(dict(distiller))
        if distiller is not None and not isinstance(distiller, ConfigurableDistiller):
            raise errors.FastslimTypeError(
                f"distiller should be a `dict` or `ConfigurableDistiller` instance, but got {type(distiller)}"
            )
        return distiller

    def train_step(self, data: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """All passes on one batch, then one optimizer step on the sum (or mean) of their gradients.

        Args:
            data: a batch, see :meth:`unpack`.
            optimizer: any torch optimizer over this module's parameters whose step needs no closure.

        Returns:
            Detached scalars ``max_subnet.loss``, ``min_subnet.loss_kl``, ``random_subnet_0.loss_kl``, ...
            Called the MMRazor 0.x way (``data["img"]``): ``dict(loss=, log_vars=, num_samples=)``.

        Raises:
            FastslimRuntimeError: a non-finite loss (looked for on the CPU only: a GPU would have to
                wait); names the pass. Or a CUDA graph is being captured. After these, and after an
                error such as running out of memory, parameters, optimizer and running statistics
                are as before the step.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise errors.FastslimTypeError(
                "LBFGS evaluates the loss several times a step, which a sandwich step does not offer; "
                "choose an optimizer whose step() needs no closure"
            )
        losses = self._passes(data, accumulate=False, scale=1.0)
        optimizer.step()
        if isinstance(data, Mapping) and "img" in data:
            total = sum(value for name, value in losses.items() if "loss" in name)
            return {
                "loss": total,
                "log_vars": {name: float(value) for name, value in losses.items()},
                "num_samples": len(data["img"]),
            }
        return losses

    @property
    def graph_report(self) -> list[str]:
        """Which passes run as CUDA graphs, and why others do not."""
        return self._step.graph_report

    def accumulate(self, data: Any, *, scale: float = 1.0) -> dict[str, Tensor]:
        """All passes on one batch; gradients are added to ``param.grad``, no optimizer step is made.

        For gradient accumulation over several batches, clipping, or anything between gradients and
        step. Start from ``optimizer.zero_grad()``.

        Args:
            data: a batch, see :meth:`unpack`.
            scale: factor of all losses, such as one over the number of batches.

        Returns:
            The unscaled losses, as :meth:`train_step`.
        """
        return self._passes(data, accumulate=True, scale=scale)

    def _passes(self, data: Any, *, accumulate: bool, scale: float) -> dict[str, Tensor]:
        batch = self.unpack(data)
        self.drop_calibration()
        if not self.training and not self._warned_of_mode:
            self._warned_of_mode = True
            warnings.warn(
                "training in evaluation mode: batch normalisation uses and keeps its running statistics. "
                "Call algo.train() first",
                stacklevel=4,
            )
        if not accumulate:  # a parameter frozen since the last step must not be moved by its old gradient
            for p in self.parameters():
                if not p.requires_grad:
                    p.grad = None
        subnets = {"max_subnet": self.mutator.max_choices, "min_subnet": self.mutator.min_choices}
        for index in range(self.num_samples):
            subnets[f"random_subnet_{index}"] = self.sample_subnet()
        if self.grad_reduction == "mean":
            scale /= len(subnets)
        return self._step.run(batch, subnets, accumulate=accumulate, scale=scale)

    def losses_of_pass(self, batch: Batch, teacher: Any, *, first: bool) -> tuple[dict[str, Tensor], Any]:
        """Losses and output of one pass: the first is the teacher's, the others are its students'."""
        network: Any = self._plan if self._plan is not None and self.training else self.architecture
        if first:
            with contextlib.nullcontext() if self.distiller is None else self.distiller.teacher_pass():
                output = self.call(network, batch.inputs)
            return self._task_losses(output, batch.targets), output
        with contextlib.nullcontext() if self.distiller is None else self.distiller.student_pass():
            output = self.call(network, batch.inputs)
        losses = {} if self.student_loss == "kd" else self._task_losses(output, batch.targets)
        if self.distiller is None:
            losses["loss_kl"] = kl_div_loss(_logits(output), _logits(teacher))
        else:
            losses.update(self.distiller.compute_distill_losses())
        return losses, output

    def _task_losses(self, output: Any, targets: Any) -> dict[str, Tensor]:
        if targets is None:
            raise errors.FastslimValueError("the batch has no targets, and the max subnet learns from them")
        if self.loss is None:
            return {"loss": sandwich_loss(_logits(output), [], targets)[0]}
        if type(self.loss) is nn.CrossEntropyLoss and self.loss.reduction == "mean":
            fused = sandwich_loss(
                _logits(output),
                [],
                targets,
                label_smoothing=self.loss.label_smoothing,
                class_weight=self.loss.weight,
                ignore_index=self.loss.ignore_index,
            )
            return {"loss": fused[0]}
        losses = self.loss(output, targets)
        return dict(losses) if isinstance(losses, Mapping) else {"loss": losses}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the step's memory behind; it is made anew at the next step."""
        return {**super().__getstate__(), "_step": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy."""
        super().__setstate__(state)
        self.__dict__["_step"] = SandwichStep(self)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise errors.FastslimValueError(f"{name}={value!r}: {errors.nearest(value, known)}")
    return value


def _check_loss(loss: Any) -> Any:
    if loss is not None and not callable(loss):
        raise errors.FastslimTypeError(f"loss should be callable as loss(output, targets), but got {type(loss)}")
    return loss


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise errors.FastslimTypeError(
            f"the network returns {type(output).__name__}, not a tensor of logits; pass `loss=` for the max subnet "
            "and a `distiller` with recorders for the others"
        )
    return output
