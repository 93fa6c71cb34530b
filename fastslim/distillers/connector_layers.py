"""What connectors are built of: convolution, normalisation and activation from configs, at any width of the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from fastslim import errors
from fastslim.contract_errors import AssertedTypeError, AssertedValueError
from fastslim.nn import SlimBatchNorm2d, SlimConv2d, SlimGroupNorm, SlimInstanceNorm2d, SlimPReLU

#: Default configs.
RELU: Mapping[str, Any] = MappingProxyType({"type": "ReLU"})
BATCH_NORM: Mapping[str, Any] = MappingProxyType({"type": "BN"})

_NORMS: dict[str, tuple[str, type[nn.Module]]] = {
    "BN": ("bn", SlimBatchNorm2d),
    "BN2d": ("bn", SlimBatchNorm2d),
    "GN": ("gn", SlimGroupNorm),
    "IN": ("in", SlimInstanceNorm2d),
    "IN2d": ("in", SlimInstanceNorm2d),
}
_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "ELU": nn.ELU,
    "GELU": nn.GELU,
    "HSigmoid": nn.Hardsigmoid,
    "HSwish": nn.Hardswish,
    "LeakyReLU": nn.LeakyReLU,
    "Mish": nn.Mish,
    "PReLU": SlimPReLU,
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "SiLU": nn.SiLU,
    "Sigmoid": nn.Sigmoid,
    "Swish": nn.SiLU,
    "Tanh": nn.Tanh,
}


def _checked(argument: str, config: Any, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The type and the other keys of a config."""
    if not isinstance(config, Mapping):
        raise AssertedTypeError(f"{argument} should be None or a dict such as dict(type=...), but got {config!r}")
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in known:
        raise AssertedValueError(
            f"{argument}: a type {kind!r} is not available; {errors.nearest(str(kind), known)}. Or use a module of "
            "your own as the connector, or in a list of connectors"
        )
    return kind, options


def build_norm(norm_cfg: Mapping[str, Any], channels: int) -> tuple[str, nn.Module]:
    """A normalisation from its config, and the name that it has in a :class:`ConvModule`.

    Args:
        norm_cfg: ``type`` is ``"BN"``, ``"GN"`` or ``"IN"``; the other keys are the layer's, and ``requires_grad``.
        channels: at full width.
    """
    kind, options = _checked("norm_cfg", norm_cfg, _NORMS)
    trained = options.pop("requires_grad", True)
    name, layer = _NORMS[kind]
    if kind == "GN":
        if "num_groups" not in options:
            raise AssertedValueError("norm_cfg: GN needs num_groups, such as dict(type='GN', num_groups=8)")
        norm = layer(num_channels=channels, **options)
    else:
        norm = layer(channels, **options)
    for parameter in norm.parameters():
        parameter.requires_grad_(trained)
    return name, norm


def build_activation(act_cfg: Mapping[str, Any]) -> nn.Module:
    """An activation from its config; ``inplace`` in it has no effect."""
    kind, options = _checked("act_cfg", act_cfg, _ACTIVATIONS)
    options.pop("inplace", None)
    return _ACTIVATIONS[kind](**options)


class ConvModule(nn.Module):
    """A convolution, a normalisation and an activation in any order; state_dict keys as mmcv's.

    The input may have fewer channels than `in_channels`; all `out_channels` come out. For the arguments see
    :class:`fastslim.distillers.ConvModuleConnector`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool | str = "auto",
        *,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        padding_mode: str = "zeros",
        order: tuple[str, ...] = ("conv", "norm", "act"),
    ) -> None:
        super().__init__()
        if not isinstance(order, (tuple, list)) or sorted(order) != ["act", "conv", "norm"]:
            raise AssertedValueError(
                f"order should hold 'conv', 'norm' and 'act' once each, whether they have a config or not, but "
                f"got {order!r}"
            )
        if conv_cfg is not None:
            options = _checked("conv_cfg", conv_cfg, {"Conv": None, "Conv2d": None})[1]
            if options:
                raise errors.FastslimValueError(f"conv_cfg: {', '.join(options)} belong to the connector itself")
        if bias not in (True, False, "auto"):
            raise errors.FastslimValueError(f"bias should be True, False or 'auto', but got {bias!r}")
        self.order = tuple(order)
        self.conv = SlimConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            norm_cfg is None if bias == "auto" else bool(bias),
            padding_mode,
        )
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm_name: str | None = None
        if norm_cfg is not None:
            before = self.order.index("norm") < self.order.index("conv")
            self.norm_name, norm = build_norm(norm_cfg, in_channels if before else out_channels)
            self.add_module(self.norm_name, norm)
        self.activate = None if act_cfg is None else build_activation(act_cfg)

    @property
    def norm(self) -> nn.Module | None:
        """The normalisation, if there is one."""
        return None if self.norm_name is None else getattr(self, self.norm_name)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, c, H, W)``, c up to in_channels, to ``(N, out_channels, H_out, W_out)``."""
        for name in self.order:
            layer = {"conv": self.conv, "norm": self.norm, "act": self.activate}[name]
            if layer is not None:
                x = layer(x)
        return x
