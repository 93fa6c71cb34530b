"""The network that `fastslim bench` was asked to measure, and a random batch for it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.algorithms import AutoSlim
from fastslim.bench import Task, call
from fastslim.cli.network import build_network, example_inputs, parse_kwargs, width_ratios
from fastslim.engine.build import build_data, build_model
from fastslim.engine.config import TrainConfig, find_config, load_config
from fastslim.errors import FastslimFileError, FastslimTypeError, FastslimValueError, nearest
from fastslim.models import MODEL_BUILDERS, create_model
from fastslim.mutators import convert

BATCH, PIXELS, RANDOM_SUBNETS, DIVISOR = 16, 112, 2, 8


def make_task(
    name: str,
    *,
    dtype: str | None,
    batch: int | None,
    pixels: int | None,
    random: int | None,
    input_shape: list[str] | None,
    inputs_name: str | None,
    kwargs: list[str],
    include: list[str],
    exclude: list[str],
    choices: list[str] | None,
    divisor: int | None,
) -> Task:
    """The network behind a name, as itself and as a supernet, and a random batch.

    Args:
        name: of a model, ``module:function``, or of a configuration, which then fills in what is None.
        dtype: fp32 or bf16.
        batch: images.
        pixels: a side of them.
        random: random subnets a step.
        input_shape: of the batch, instead of `batch` and `pixels`.
        inputs_name: function that returns the batch.
        kwargs: of the model or function.
        include: see `fastslim.convert`, as the others.
        exclude: see there.
        choices: see there.
        divisor: see there.

    Raises:
        FastslimError: there is no such network, or it cannot be trained so.
    """
    torch.manual_seed(0)
    if (input_shape or inputs_name) and (batch or pixels):
        raise FastslimValueError(
            "--batch and --pixels are for images; --input-shape and --inputs say all of it already"
        )
    ratios, size, widths = width_ratios(choices), (3, PIXELS, PIXELS), "per_unit"
    if name in MODEL_BUILDERS:
        network = create_model(name, **parse_kwargs(kwargs))
    elif ":" in name:
        network = build_network(name, parse_kwargs(kwargs))
    else:
        config = _config(name)
        data = build_data(config)
        network, size, widths = build_model(config, data), data.image_shape, config.random_widths
        batch, random = batch or config.batch_size, config.num_samples if random is None else random
        dtype = dtype or ("fp32" if config.autocast == "none" else "bf16")
        ratios, exclude = ratios or list(config.choices), [*exclude, *config.exclude]
        divisor = divisor or config.divisor
    if input_shape or inputs_name:
        inputs = example_inputs(input_shape, inputs_name)
        inputs = inputs if inputs_name else torch.randn(inputs)
    else:
        inputs = torch.randn(batch or BATCH, *(size if pixels is None else (size[0], pixels, pixels)))
    targets, slim = random_targets(network, inputs), copy.deepcopy(network)
    convert(
        slim,
        inputs,
        choices=ratios,
        divisor=divisor or DIVISOR,
        include=include,
        exclude=exclude,
        random_widths=widths,
        seed=0,
    )
    algo = AutoSlim(architecture=slim, num_samples=RANDOM_SUBNETS if random is None else random)
    algo.train()
    return Task(network, algo, inputs, targets, torch.bfloat16 if dtype == "bf16" else torch.float32)


def _config(name: str) -> TrainConfig:
    try:
        find_config(name)
    except FastslimFileError as error:
        raise FastslimValueError(
            f"{name!r} is no model ({nearest(name, MODEL_BUILDERS)}), not of the form module:function, and {error}"
        ) from error
    return load_config(name)


def random_targets(network: nn.Module, inputs: Any) -> Tensor:
    """A class for everything that the network returns logits of.

    Raises:
        FastslimTypeError: it returns something else.
    """
    with torch.no_grad():
        output = call(copy.deepcopy(network).eval(), inputs)
    if not isinstance(output, Tensor) or output.dim() < 2:
        raise FastslimTypeError(
            f"fastslim bench trains with cross-entropy, so a network must return logits (N, classes, ...), but "
            f"{type(network).__name__} returns {type(output).__name__}; wrap it in a module that returns them"
        )
    return torch.randint(output.shape[1], (output.shape[0], *output.shape[2:]))
