"""A network for inference that switches between fixed widths while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError, nearest
from fastslim.mutators import ChannelMutator
from fastslim.nn import SlimBatchNorm

#: What a batch norm holds for each width.
VECTORS = ("weight", "bias", "running_mean", "running_var")


class BatchNormPerWidth(nn.Module):
    """Batch normalisation for inference with a set of vectors for every width.

    Args:
        sets: for each width the vectors of its active channels, as `VECTORS` names them; None where there is none.
        eps: added to the variances.
    """

    def __init__(self, sets: Sequence[Mapping[str, Tensor | None]], eps: Any) -> None:
        super().__init__()
        self.index, self.eps = 0, eps
        for number, vectors in enumerate(sets):
            for name in VECTORS:
                self.register_buffer(f"{name}_{number}", vectors.get(name))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(N, c, ...)`` by the chosen set."""
        weight, bias, mean, var = (getattr(self, f"{name}_{self.index}") for name in VECTORS)
        # Without stored statistics a batch is normalised by its own, as in training.
        return F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, self.eps)

    def extra_repr(self) -> str:
        """The chosen set."""
        return f"index={self.index}, eps={self.eps}"


class SwitchableNetwork(nn.Module):
    """A supernet in evaluation mode that runs at one of several subnets, each with its own batch-norm statistics.

    Made by `load_slimmable`. Choosing a width copies no weights.

    Args:
        mutator: of the network.
        subnets: width of every unit that may change, by the subnet's name.
        norms: for each batch norm, by name, its sets of vectors in the order of the subnets.
        description: what the file said: costs by subnet's name, metrics, normalisation, versions.
    """

    def __init__(
        self,
        mutator: ChannelMutator,
        subnets: Mapping[str, Mapping[str, int]],
        norms: Mapping[str, Sequence[Mapping[str, Tensor | None]]],
        description: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.network = mutator.trace.model
        self.description = dict(description)
        self._subnets = {name: dict(subnet) for name, subnet in subnets.items()}
        # Neither is a submodule: their layers are the network's.
        self.__dict__["_mutator"] = mutator
        self._own_forward: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        self._norms: list[BatchNormPerWidth] = []
        for name, sets in norms.items():
            self._put_in(name, sets)
        self.requires_grad_(False)
        super().train(False)
        self.set_width(len(self._subnets) - 1)

    def _put_in(self, name: str, sets: Sequence[Mapping[str, Tensor | None]]) -> None:
        layer: Any = self.network.get_submodule(name)
        if not isinstance(layer, SlimBatchNorm):  # a forward of its own, which asks for statistics alone
            self._own_forward[layer] = [(vectors["running_mean"], vectors["running_var"]) for vectors in sets]
            return
        norm = BatchNormPerWidth(sets, layer.eps)
        for like in (*layer.parameters(), *layer.buffers()):
            norm.to(like.device)
            break
        self._norms.append(norm)
        for part in list(self.network.modules()):
            for key, child in part._modules.items():
                if child is layer:
                    part._modules[key] = norm

    @property
    def widths(self) -> list[str]:
        """Names of the subnets, in the order of their indices."""
        return list(self._subnets)

    @property
    def width(self) -> str:
        """Name of the present subnet."""
        return self._width

    def subnet(self, width: str | int | None = None) -> dict[str, int]:
        """The channels of every unit at a width; the present one when None."""
        return dict(self._subnets[self.width if width is None else self._name_of(width)])

    def set_width(self, width: str | int) -> None:
        """Runs at this subnet from now on.

        Args:
            width: its name, or its index; negative ones count from the end.

        Raises:
            FastslimValueError: there is none of that name or index.
        """
        name = self._name_of(width)
        index = self.widths.index(name)
        self._mutator.set_choices(self._subnets[name])
        for norm in self._norms:
            norm.index = index
        for layer, sets in self._own_forward.items():
            layer.calibrated = tuple(tensor.to(layer.running_mean) for tensor in sets[index])
        self._width = name

    def _name_of(self, width: str | int) -> str:
        if isinstance(width, str) and width in self._subnets:
            return width
        if isinstance(width, int) and not isinstance(width, bool) and -len(self.widths) <= width < len(self.widths):
            return self.widths[width]
        if not isinstance(width, (str, int)) or isinstance(width, bool):
            raise FastslimTypeError(f"a width is the name or the index of a subnet, got {width!r}")
        hint = nearest(width, self._subnets) if isinstance(width, str) else f"choose 0 to {len(self.widths) - 1}"
        raise FastslimValueError(f"there is no width {width!r}; {hint}")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts; the statistics that are no buffers follow."""
        super()._apply(fn, recurse)
        self.set_width(self.width)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output at the present width."""
        with torch.no_grad():
            return self.network(*args, **kwargs)

    def train(self, mode: bool = True) -> SwitchableNetwork:
        """Evaluation mode is the only one.

        Raises:
            FastslimRuntimeError: training mode is asked for.
        """
        if mode:
            raise FastslimRuntimeError(
                "this network holds no training state; train the supernet it was saved from, and save it again"
            )
        super().train(False)
        return self
