"""The ops: each file holds one op's schema, fake, reference, autograd and choice of backend."""

from fastslim.ops import batch_norm_finalize  # noqa: F401  (defines its op)
from fastslim.ops.backend import choose, use_backend
from fastslim.ops.batch_norm_act import batch_norm_act
from fastslim.ops.depthwise_conv2d import depthwise_conv2d
from fastslim.ops.depthwise_conv2d_bn import depthwise_conv2d_bn, depthwise_conv2d_bn_backward_weight
from fastslim.ops.prefix_pack import Transfer, TransferTable, prefix_pack, prefix_unpack_add
from fastslim.ops.sandwich_loss import kl_div_loss, sandwich_loss
from fastslim.ops.slim_conv2d import slim_conv2d
from fastslim.ops.slim_linear import slim_linear

__all__ = [
    "Transfer",
    "TransferTable",
    "batch_norm_act",
    "choose",
    "depthwise_conv2d",
    "depthwise_conv2d_bn",
    "depthwise_conv2d_bn_backward_weight",
    "kl_div_loss",
    "prefix_pack",
    "prefix_unpack_add",
    "sandwich_loss",
    "slim_conv2d",
    "slim_linear",
    "use_backend",
]
