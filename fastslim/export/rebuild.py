"""A plain network of a saved subnet's size, made from a freshly built network, with the saved weights in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.export.calls import from_description
from fastslim.export.description import check_units
from fastslim.export.fold import fold_batch_norm
from fastslim.export.sources import at_subnet, find_mutator
from fastslim.export.weights import load_strictly
from fastslim.mutators import ChannelMutator
from fastslim.mutators.plain_copy import plain_copy


def rebuild(
    path: Path,
    description: Mapping[str, Any],
    choices: Mapping[str, int],
    weights: Mapping[str, Tensor],
    model: Any,
    example_inputs: Any,
) -> nn.Module:
    """The plain network.

    Args:
        path: of the file, for messages.
        description: its units, inputs, and how its supernet was traced.
        choices: the width of every unit that may change.
        weights: by name.
        model: a supernet, its plain full-size network, or a plain network of the subnet's size.
        example_inputs: what the latter two are called with; None for what the description says.

    Raises:
        FastslimFileError: the file is that of another network.
        FastslimTypeError: model is none.
    """
    mutator = find_mutator(model)
    if mutator is None and not isinstance(model, nn.Module):
        raise FastslimTypeError(f"model must be a network or a supernet, got {type(model).__name__}")
    if mutator is None:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        units = description["units"]
        if not units or shapes == {name: tensor.shape for name, tensor in weights.items()}:
            plain = copy.deepcopy(model)
            load_strictly(plain, weights, path)
            return plain.eval()
        mutator = prepared(copy.deepcopy(model), description, example_inputs, path)
    check_units(path, description["units"], mutator)
    with at_subnet(mutator, mutator, choices):
        plain = plain_copy(mutator)
    if set(plain.state_dict()) - set(weights) and _folds(plain, weights):
        plain = fold_batch_norm(plain, mutator.trace.example_inputs)
    load_strictly(plain, weights, path)
    return plain.eval()


def prepared(model: nn.Module, description: Mapping[str, Any], example_inputs: Any, path: Path) -> ChannelMutator:
    """A mutator that can give a plain full-size network, in place, every width.

    Raises:
        FastslimValueError: the file does not say what the network is called with, and neither does the caller.
    """
    if example_inputs is None:
        if not description["inputs"]:
            raise FastslimValueError(f"{path} does not say what the network is called with: pass example_inputs")
        example_inputs = {name: from_description(value) for name, value in description["inputs"].items()}
    mutator = ChannelMutator(example_inputs=example_inputs, **description["traced"])
    mutator.prepare_from_supernet(model)
    return mutator


def _folds(plain: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether batch norms are all that the weights lack: they were multiplied into the layers before them."""
    missing = {name.rpartition(".")[0] for name in plain.state_dict() if name not in weights}
    return all(isinstance(plain.get_submodule(name), nn.modules.batchnorm._BatchNorm) for name in missing)
