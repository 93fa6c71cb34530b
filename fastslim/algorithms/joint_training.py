"""`JointTraining`: one step trains several subnets on one batch; what each of them learns is the algorithm's to say."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.algorithms.base import Batch
from fastslim.algorithms.members import members
from fastslim.algorithms.optim_wrapper import count_passes, is_optim_wrapper
from fastslim.algorithms.ranks import Ranks
from fastslim.algorithms.sandwich_step import SandwichStep
from fastslim.algorithms.shared_stem import reason_against, report_stem
from fastslim.algorithms.slimmable import Choices, SlimmableAlgorithm
from fastslim.distillers import ConfigurableDistiller
from fastslim.graph import make_plan


class JointTraining(SlimmableAlgorithm):
    """Runs the passes of a step and takes the optimizer's.

    Args:
        *args: see :class:`SlimmableAlgorithm`.
        grad_reduction: "sum" of the passes' gradients (the paper), or "mean".
        cuda_graphs: on a GPU, capture passes that repeat as CUDA graphs; see :attr:`graph_report`.
        overlap_students: on a GPU, overlap the passes behind the first on two streams.
        share_stem: run the layers once whose result at a narrow width is a part of that at a wide one.
        **kwargs: see :class:`SlimmableAlgorithm`.
    """

    _step: SandwichStep
    _plan: nn.Module | None
    distiller: ConfigurableDistiller | None

    def __init__(
        self,
        *args: Any,
        grad_reduction: str = "sum",
        cuda_graphs: bool = False,
        overlap_students: bool = False,
        share_stem: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.grad_reduction = one_of("grad_reduction", grad_reduction, ("sum", "mean"))
        self.cuda_graphs, self.overlap_students, self.share_stem = cuda_graphs, overlap_students, share_stem
        self.distiller = None
        #: The processes that train together, see :meth:`distribute`.
        self.ranks: Ranks | None = None
        #: What the execution plan fused and what it left to the network's own forward, and why; and whether the
        #: passes share their stem.
        self.plan_report: list[str] = []
        self._warned_of_mode = False
        self._optim_wrapper_count_status_reinitialized = False
        # Not registered as submodules: they share the architecture's layers.
        self.__dict__.update(_plan=None, _step=SandwichStep(self))

    def make_plan(self, fuse: bool = True) -> None:
        """Prepares the fast path; called once the layers are in place and the distiller knows them."""
        keep = set() if self.distiller is None else self.distiller.recorded_modules
        if not fuse:
            self.plan_report = ["fuse=False"]
        elif not self.mutator.is_traced:
            self.plan_report = ["the model defines its own units, and nothing was traced"]
        elif self.distiller is not None and self.distiller.needs_own_forward:
            self.plan_report = ["the distiller watches functions or the whole network, which a plan would hide"]
        else:
            self.__dict__["_plan"], self.plan_report = make_plan(self.mutator.trace, keep=keep)
        report_stem(self, reason_against(self))

    @property
    def fast_architecture(self) -> nn.Module:
        """What a training pass runs: the plan, where there is one."""
        return self._plan if self._plan is not None and self.training else self.architecture

    def subnets_of_step(self) -> dict[str, Choices]:
        """The subnets that the next step trains, by the name of their pass; the first is the others' teacher."""
        raise NotImplementedError(f"{type(self).__name__} must say which subnets a step trains")

    def choose_subnet(self, index: int, choices: Mapping[str, int]) -> None:
        """Sets the widths of the step's `index`-th pass."""
        self.mutator.set_choices(choices)

    def losses_of_pass(self, batch: Batch, teacher: Any, *, first: bool) -> tuple[dict[str, Tensor], Any]:
        """Losses and output of one pass: the first is the teacher's, the others are its students'."""
        return self.losses_of(batch, self.fast_architecture)

    def train_step(self, data: Any, optimizer: Any = None, *, optim_wrapper: Any = None) -> dict[str, Any]:
        """All passes on one batch, then one optimizer step on the sum (or mean) of their gradients.

        Args:
            data: a batch, see :meth:`unpack`.
            optimizer: any torch optimizer over this module's parameters whose step needs no closure. Or an
                mmengine ``OptimWrapper``, whose own rules then hold: every pass is one of its updates, so that
                it needs ``accumulative_counts`` equal to the number of passes to make one optimizer step of them.
            optim_wrapper: mmengine's name of `optimizer`.

        Returns:
            Detached scalars, ``max_subnet.loss``, ``min_subnet.loss_kl``, ``random_subnet_0.loss_kl``, ...
            Called the MMRazor 0.x way (``data["img"]``): ``dict(loss=, log_vars=, num_samples=)``.

        Raises:
            FastslimRuntimeError: a non-finite loss (looked for on the CPU only: a GPU would have to
                wait); names the pass. Or a CUDA graph is being captured. After these, and after an
                error such as running out of memory, parameters, optimizer and running statistics
                are as before the step (parameters only, if a wrapper had made no step yet).
        """
        optimizer = optim_wrapper if optimizer is None else optimizer
        if isinstance(optimizer, torch.optim.LBFGS):
            raise errors.FastslimTypeError(
                "LBFGS evaluates the loss several times a step, which a sandwich step does not offer; "
                "choose an optimizer whose step() needs no closure"
            )
        if is_optim_wrapper(optimizer):
            losses = self._passes(data, accumulate=True, scale=1.0, wrapper=optimizer)
        elif isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "step"):
            losses = self._passes(data, accumulate=False, scale=1.0)
            optimizer.step()
        else:
            raise errors.FastslimTypeError(
                f"optimizer should be a torch.optim.Optimizer or an mmengine OptimWrapper, but got {type(optimizer)}"
            )
        if isinstance(data, Mapping) and "img" in data:
            total, log_vars = self.parse_losses(losses)
            numbers = {name: float(value) for name, value in log_vars.items()}
            return {"loss": total, "log_vars": numbers, "num_samples": len(data["img"])}
        return losses

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

    def _passes(self, data: Any, *, accumulate: bool, scale: float, wrapper: Any = None) -> dict[str, Tensor]:
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
            for p in members(self)[0]:
                if not p.requires_grad:
                    p.grad = None
        if self.ranks is not None:
            self.ranks.begin_step(self)
        subnets = self.subnets_of_step()
        if self.grad_reduction == "mean":
            scale /= len(subnets)
        if wrapper is not None:
            self._check_wrapper(wrapper, len(subnets))
        return self._step.run(batch, subnets, accumulate=accumulate, scale=scale, wrapper=wrapper)

    def _check_wrapper(self, wrapper: Any, passes: int) -> None:
        if self.grad_reduction == "mean":
            raise errors.FastslimValueError(
                f"grad_reduction='mean' is what an optim wrapper with accumulative_counts={passes} does: leave it out"
            )
        if not self._optim_wrapper_count_status_reinitialized:
            count_passes(wrapper, self, passes)
            self._optim_wrapper_count_status_reinitialized = True

    def distribute(self, process_group: Any = None, *, broadcast_buffers: bool = True) -> JointTraining:
        """From now on trains together with the other processes of a group; call it in all of them.

        Every process starts from the first one's weights, statistics and random widths and draws the same
        widths afterwards; a step averages the gradients of all with one all-reduce. Take the place of
        ``DistributedDataParallel``, whose hooks never see gradients that kernels write into ``param.grad``.

        Args:
            process_group: None for the default one.
            broadcast_buffers: start every step from the first process's running statistics.

        Returns:
            The algorithm itself.

        Raises:
            FastslimRuntimeError: no process group has been started.
        """
        self.ranks = Ranks(process_group, broadcast_buffers=broadcast_buffers)
        self.ranks.start(self, self.mutator)
        return self

    @property
    def graph_report(self) -> list[str]:
        """Which passes run as CUDA graphs, and why others do not."""
        return self._step.graph_report

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the step's memory and the other processes behind."""
        return {**super().__getstate__(), "_step": None, "ranks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy."""
        super().__setstate__(state)
        self.__dict__["_step"] = SandwichStep(self)


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """`value`, if it is one of the known ones; FastslimValueError if not."""
    if value not in known:
        raise errors.FastslimValueError(f"{name}={value!r}: {errors.nearest(value, known)}")
    return value
