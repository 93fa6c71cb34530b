"""depthwise_conv2d names the fix for a bad call; its raw ops refuse what would leave a buffer."""

from __future__ import annotations

import pytest
import torch

import fastslim
from fastslim.ops import backend
from fastslim.ops.depthwise_conv2d import depthwise_conv2d

X, WEIGHT = torch.zeros(1, 4, 5, 5), torch.zeros(4, 1, 3, 3)
BAD_CALLS = {
    "too many channels": ((torch.zeros(1, 5, 5, 5), WEIGHT), {}, ValueError, "has only 4"),
    "segments beyond the layer": ((X, WEIGHT), {"segments": ((0, 2), (3, 2))}, ValueError, "inside the layer's 4"),
    "segments of another width": ((X, WEIGHT), {"segments": ((0, 2),)}, ValueError, "take 2 channels"),
    "integer images": ((X.int(), WEIGHT), {}, TypeError, r"images.float\(\)"),
    "another dtype": ((X.double(), WEIGHT), {}, TypeError, "torch.autocast"),
    "no batch": ((X[0], WEIGHT), {}, ValueError, "add the batch dimension"),
    "dense weight": ((X, torch.zeros(4, 4, 3, 3)), {}, ValueError, "slim_conv2d"),
    "large kernel": ((X, torch.zeros(4, 1, 7, 7)), {}, ValueError, "padding .* is too small"),
    "stride 0": ((X, WEIGHT), {"stride": 0}, ValueError, "stride="),
    "sliced bias": ((X, WEIGHT, torch.zeros(3)), {}, ValueError, "full layer's bias"),
    "multiplier": ((X, WEIGHT), {"multiplier": 3}, ValueError, "does not divide"),
    "another device": ((X, WEIGHT.to("meta")), {}, ValueError, "one device"),
}


@pytest.mark.parametrize(("arguments", "conv", "kind", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls_name_the_fix(arguments, conv, kind, message):
    with pytest.raises(fastslim.errors.FastslimError, match=message) as caught:
        depthwise_conv2d(*arguments, **conv)
    assert isinstance(caught.value, kind)


RAW = ((1, 1), (1, 1), (1, 1))
REFUSED = {
    "rows beyond the weight": lambda o: o.depthwise_conv2d(X, WEIGHT[:3], None, *RAW, [], 1),
    "negative start": lambda o: o.depthwise_conv2d(X, WEIGHT, None, *RAW, [-1, 4], 1),
    "overflowing start": lambda o: o.depthwise_conv2d(X, WEIGHT, None, *RAW, [2**63 - 2, 4], 1),
    "odd segments": lambda o: o.depthwise_conv2d(X, WEIGHT, None, *RAW, [0, 4, 0], 1),
    "short bias": lambda o: o.depthwise_conv2d(X, WEIGHT, torch.zeros(3), *RAW, [], 1),
    "gaps in x": lambda o: o.depthwise_conv2d(X[..., ::2], WEIGHT, None, *RAW, [], 1),
    "float16": lambda o: o.depthwise_conv2d(X.half(), WEIGHT.half(), None, *RAW, [], 1),
    "small gradient": lambda o: o.depthwise_conv2d_backward_input(
        X[..., :4].contiguous(), WEIGHT, X.shape, False, *RAW, [], 1
    ),
    "gradient in another format": lambda o: o.depthwise_conv2d_backward_input(X, WEIGHT, X.shape, True, *RAW, [], 1),
    "bfloat16 weight gradient": lambda o: o.depthwise_conv2d_backward_weight(
        X, X, WEIGHT.bfloat16(), None, *RAW, [], 1, False, False
    ),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_the_raw_op_refuses_what_would_leave_a_buffer(call):
    with pytest.raises(RuntimeError, match="depthwise_conv2d"):
        call(torch.ops.fastslim)


@pytest.mark.parametrize(
    ("dtype", "direction", "channels_last", "stride", "expected"),
    [
        (torch.float32, "forward", True, 1, "cpp"),
        (torch.bfloat16, "forward", True, 1, "cpp"),
        (torch.bfloat16, "backward_input", True, 2, "cpp"),
        (torch.bfloat16, "backward_input", False, 2, "cpp"),
        (torch.bfloat16, "backward_weight", True, 1, "cpp"),
        (torch.float32, "forward", False, 1, "library"),
        (torch.float16, "forward", True, 1, "library"),
    ],
)
def test_the_measured_winner_is_chosen_and_says_why(dtype, direction, channels_last, stride, expected):
    with backend.use_backend(None):
        choice = backend.choose(
            "depthwise_conv2d", "cpu", dtype, direction, channels_last, (3, 3), (stride, stride), (1, 1), 1
        )
    assert choice.backend == expected
    assert choice.reason
