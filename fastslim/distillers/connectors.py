"""Connectors: modules that bring a student's feature to the shape of its teacher's, at every width of the student."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.contract_errors import AssertedValueError
from fastslim.distillers.connector_layers import RELU, ConvModule, build_norm
from fastslim.nn import SlimBatchNorm2d, SlimConv2d, SlimLinear
from fastslim.registry import MODELS

_FUNCTIONS = (
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "dropout",
    "dropout2d",
    "interpolate",
    "max_pool2d",
    "normalize",
    "relu",
    "softmax",
)
# Layers with weights run at any width of their input.
_MODULES: dict[str, type[nn.Module]] = {
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d,
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d,
    "AvgPool2d": nn.AvgPool2d,
    "BatchNorm2d": SlimBatchNorm2d,
    "Conv2d": SlimConv2d,
    "Dropout": nn.Dropout,
    "Dropout2d": nn.Dropout2d,
    "Linear": SlimLinear,
    "MaxPool2d": nn.MaxPool2d,
    "ReLU": nn.ReLU,
    "Softmax": nn.Softmax,
}


class BaseConnector(nn.Module, abc.ABC):
    """Base of connectors. A subclass says in :meth:`forward_train` what it does with a feature.

    A connector with weights is made for the full width and must take the first channels of a narrower feature, as the
    layers of :mod:`fastslim.nn` do: the student of a sandwich step has another width in every pass.
    A feature behind a concatenation holds the first channels of several features side by side; connect those by
    themselves, before they are concatenated.

    Args:
        init_cfg: how :meth:`init_weights` of a framework that has one (mmengine) initialises; only kept here.
    """

    def __init__(self, init_cfg: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.init_cfg = init_cfg

    def forward(self, feature: Tensor) -> Any:
        """What the loss gets of a feature."""
        return self.forward_train(feature)

    @abc.abstractmethod
    def forward_train(self, feature: Tensor) -> Any:
        """What the loss gets of a feature: a tensor or a tuple of them."""


@MODELS.register_module()
class ConvModuleConnector(BaseConnector):
    """A convolution with normalisation and activation; by default 1x1 and ReLU. See :class:`ConvModule`.

    Args:
        in_channel: channels of the feature at full width; it may have fewer.
        out_channel: channels that come out at every width.
        kernel_size: as of :class:`torch.nn.Conv2d`, like the next four.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.
        bias: True, False or ``"auto"``: if nothing normalises.
        conv_cfg: None or ``dict(type="Conv2d")``.
        norm_cfg: such as ``dict(type="BN")``; None for none.
        act_cfg: such as ``dict(type="ReLU")``; None for none.
        inplace: accepted, and without effect: fused normalisation keeps its output for the backward pass.
        with_spectral_norm: must be False: a narrow slice of the weight would have another norm.
        padding_mode: as of :class:`torch.nn.Conv2d`.
        order: ``"conv"``, ``"norm"`` and ``"act"`` in the order in which they run.
        init_cfg: see :class:`BaseConnector`.

    Raises:
        FastslimTypeError: a config that is neither a dict nor None.
        FastslimValueError: an unknown type in it, or an order without one of the three.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool | str = "auto",
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = RELU,
        inplace: bool = True,
        with_spectral_norm: bool = False,
        padding_mode: str = "zeros",
        order: tuple[str, ...] = ("conv", "norm", "act"),
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if with_spectral_norm:
            raise errors.FastslimValueError(
                "with_spectral_norm=True: a narrow slice of the weight would have another norm; leave it False, or use "
                "a module of your own as the connector"
            )
        self.inplace = inplace
        self.conv_module = ConvModule(
            in_channel,
            out_channel,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            conv_cfg=conv_cfg,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            padding_mode=padding_mode,
            order=order,
        )

    def forward_train(self, feature: Tensor) -> Tensor:
        """Maps ``(N, c, H, W)``, c up to in_channel, to ``(N, out_channel, H_out, W_out)``."""
        return self.conv_module(feature)


@MODELS.register_module()
class LinearConnector(BaseConnector):
    """A linear layer for features ``(N, c)``.

    Args:
        in_channel: entries of the feature at full width; it may have fewer.
        out_channel: entries that come out at every width.
        bias: whether something is added.
        init_cfg: see :class:`BaseConnector`.
    """

    def __init__(
        self, in_channel: int, out_channel: int, bias: bool = True, init_cfg: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.linear = SlimLinear(in_channel, out_channel, bias=bias)

    def forward_train(self, feature: Tensor) -> Tensor:
        """Maps ``(N, c)`` to ``(N, out_channel)``."""
        return self.linear(feature)


@MODELS.register_module()
class NormConnector(BaseConnector):
    """Normalisation alone.

    Args:
        in_channels: channels of the feature at full width; it may have fewer.
        norm_cfg: such as ``dict(type="BN", affine=False, track_running_stats=False)``.
        init_cfg: see :class:`BaseConnector`.
    """

    def __init__(
        self, in_channels: int, norm_cfg: Mapping[str, Any], init_cfg: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.norm = build_norm(norm_cfg, in_channels)[1]

    def forward_train(self, feature: Tensor) -> Tensor:
        """Normalises ``(N, c, H, W)``."""
        return self.norm(feature)


@MODELS.register_module()
class TorchFunctionalConnector(BaseConnector):
    """A function of ``torch.nn.functional``: ``TorchFunctionalConnector("avg_pool2d", dict(kernel_size=4))``.

    Args:
        function_name: of a pooling function, ``dropout``, ``dropout2d``, ``interpolate``, ``normalize``, ``relu`` or
            ``softmax``.
        func_args: its keywords.
        init_cfg: see :class:`BaseConnector`.

    Raises:
        FastslimValueError: no or an unknown name.
    """

    def __init__(
        self,
        function_name: str | None = None,
        func_args: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.func = getattr(F, _known_name("function_name", function_name, _FUNCTIONS))
        self.func_args = dict(func_args or {})

    def forward_train(self, x: Tensor) -> Tensor:
        """The function's result."""
        return self.func(x, **self.func_args)


@MODELS.register_module()
class TorchNNConnector(BaseConnector):
    """A module of ``torch.nn``: ``TorchNNConnector("AvgPool2d", dict(kernel_size=4))``.

    ``Conv2d``, ``Linear`` and ``BatchNorm2d`` take features narrower than they are made for.

    Args:
        module_name: of a pooling module, ``BatchNorm2d``, ``Conv2d``, ``Dropout``, ``Dropout2d``, ``Linear``, ``ReLU``
            or ``Softmax``.
        module_args: its keywords.
        init_cfg: see :class:`BaseConnector`.

    Raises:
        FastslimValueError: no or an unknown name.
    """

    def __init__(
        self,
        module_name: str | None = None,
        module_args: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.func = _MODULES[_known_name("module_name", module_name, tuple(_MODULES))](**dict(module_args or {}))

    def forward_train(self, x: Tensor) -> Tensor:
        """The module's result."""
        return self.func(x)


def _known_name(argument: str, name: str | None, known: tuple[str, ...]) -> str:
    if name is None:
        raise AssertedValueError(f"{argument} cannot be None: choose one of {', '.join(known)}")
    if name not in known:
        raise AssertedValueError(f"{argument}={name!r} is not available: {errors.nearest(name, known)}")
    return name
