"""How a converted network is compared with the narrow one it must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Architecture

RATIOS = [i / 8 for i in range(1, 9)]


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors a model returns."""
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]


def leaves(output: Any) -> list[Any]:
    """The leaves of nested outputs; those of a dataclass too."""
    if hasattr(output, "__dataclass_fields__"):
        output = vars(output)
    return torch.utils._pytree.tree_leaves(output)


def without_dropout(model: nn.Module) -> nn.Module:
    """Switches off what is random."""
    for module in model.modules():
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def indices(mutator: Any, name: str, shape: torch.Size, choices: dict[str, int]) -> list[list[int]]:
    """Which entries of each dimension of tensor `name` a subnet uses, as the analyser has it."""
    found = mutator.trace.index_of(name, choices) if name in mutator.trace.tensors else [None] * len(shape)
    return [list(range(size)) if i is None else i.tolist() for size, i in zip(shape, found, strict=True)]


def narrow_copy(
    architecture: Architecture, plain: nn.Module, mutator: Any, choices: dict[str, int]
) -> tuple[nn.Module, dict[str, list[list[int]]]]:
    """The narrow network with the plain one's weights, and where they lie.

    The widths are read from the analyser's indices; all other indices must be what the architecture says by hand.
    """
    full = tensors(plain)
    widths = architecture.widths(lambda name, dim: len(indices(mutator, name, full[name].shape, choices)[dim]))
    narrow = without_dropout(architecture.narrow(widths).double())
    assert tensors(narrow).keys() == full.keys()
    where = {}
    with torch.no_grad():
        for name, tensor in tensors(narrow).items():
            by_hand = architecture.index(name, full[name].shape, tensor.shape, widths)
            assert indices(mutator, name, full[name].shape, choices) == by_hand, f"{name} at {widths}"
            where[name] = by_hand
            tensor.copy_(take(full[name], by_hand))
    return narrow, where


def take(tensor: Tensor, index: list[list[int]]) -> Tensor:
    """The entries at these indices of each dimension."""
    for dim, entries in enumerate(index):
        tensor = tensor.index_select(dim, torch.tensor(entries))
    return tensor


def put(shape: torch.Size, index: list[list[int]], values: Tensor) -> Tensor:
    """Zeros with `values` at these indices."""
    grid = [torch.tensor(i).view([-1 if k == d else 1 for k in range(len(shape))]) for d, i in enumerate(index)]
    return values.new_zeros(shape).index_put(grid, values) if grid else values


def close(ours: Any, theirs: Any, what: str, tolerance: float = 1e-10) -> None:
    """Asserts equality up to rounding."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def score(outputs: list[Tensor]) -> Tensor:
    """A scalar in which every output counts differently."""
    total: Any = 0
    for output in outputs:
        if output.is_floating_point():
            weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).sin().view(output.shape)
            total = total + (output * weights).sum() + output.square().mean()
    return total


def assert_same(model: nn.Module, narrow: nn.Module, where: dict[str, list[list[int]]], inputs: Any) -> None:
    """Asserts equal outputs, gradients (zero where nothing is active) and running statistics, in both modes."""
    before = {name: tensor.detach().clone() for name, tensor in tensors(model).items()}
    for training in (False, True):
        model.train(training)
        narrow.train(training)
        model.zero_grad()
        narrow.zero_grad()
        outputs, expected = call(model, inputs), call(narrow, inputs)
        assert len(outputs) == len(expected)
        for ours, theirs in zip(outputs, expected, strict=True):
            close(ours, theirs, f"output, training={training}")
        score(outputs).backward()
        score(expected).backward()
        theirs = dict(narrow.named_parameters())
        for name, parameter in model.named_parameters():
            ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = theirs[name].grad
            gradient = torch.zeros_like(theirs[name]) if gradient is None else gradient
            close(ours, put(parameter.shape, where[name], gradient), f"gradient of {name}, training={training}", 1e-8)
        statistics = dict(narrow.named_buffers())
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                expected_full = before[name].clone()
                grid = torch.meshgrid(*map(torch.tensor, where[name]), indexing="ij") if where[name] else ()
                expected_full[tuple(grid)] = statistics[name]
                close(buffer, expected_full, f"buffer {name}, training={training}")
                buffer.copy_(before[name])


def snapshot(model: nn.Module) -> Any:
    """Everything of a model that a failed conversion could have changed."""
    modules = {}
    for name, module in model.named_modules():
        attributes = {
            k: v if isinstance(v, (int, float, str, tuple, type(None))) else id(v) for k, v in vars(module).items()
        }
        members = [
            {k: id(v) for k, v in kind.items()} for kind in (module._parameters, module._buffers, module._modules)
        ]
        hooks = [list(module._forward_hooks), list(module._forward_pre_hooks)]
        modules[name] = (type(module), module.training, attributes, members, hooks, "forward" in vars(module))
    state = (
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in model.state_dict().items()}
        if not lazy(model)
        else {}
    )
    grads = {k: (p.requires_grad, id(p.grad)) for k, p in model.named_parameters()}
    return modules, grads, torch.get_rng_state(), state


def lazy(model: nn.Module) -> bool:
    """Whether some parameter has no shape yet."""
    return any(nn.parameter.is_lazy(p) for p in model.parameters())


def assert_untouched(model: nn.Module, before: Any) -> None:
    """Asserts that a model is as it was at `snapshot`, and the random state too."""
    after = snapshot(model)
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])
    assert after[3].keys() == before[3].keys()
    for key, value in before[3].items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            assert torch.equal(after[3][key], value), key
