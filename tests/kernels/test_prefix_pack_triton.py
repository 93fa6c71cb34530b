"""prefix_pack's Triton kernel in the interpreter: the same bits as torch's copies and adds."""

from __future__ import annotations

import pytest
import torch
from prefix_pack_cases import KINDS, WIDTHS, assert_same_memory, copied, full_size

from fastslim.ops import backend, prefix_pack, use_backend
from fastslim.ops.prefix_pack import TransferTable

pytestmark = [
    pytest.mark.skipif(not backend.interpreting(), reason="Triton's interpreter is off"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast"),  # an infinite float16 is meant
]


@pytest.mark.parametrize("low", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_equals_torch_in_every_bit(kind, low):
    torch.manual_seed(0)
    ours = KINDS[kind](low)
    expected = copied(ours)
    with use_backend("reference"):
        prefix_pack(expected)
    with use_backend("triton"):
        prefix_pack(ours)
    assert_same_memory(ours, expected)


@pytest.mark.parametrize("dense", ["source", "target"])
@pytest.mark.parametrize("name", WIDTHS)
def test_widths_read_from_memory_equal_slices(name, dense):
    torch.manual_seed(0)
    ours, widths = full_size(torch.float16, dense), torch.tensor(WIDTHS[name], dtype=torch.int32)
    expected = copied(ours)
    with use_backend("reference"):
        reference = TransferTable(expected, dense=dense)
        reference.run(widths)
    with use_backend("triton"):
        table = TransferTable(ours, dense=dense)
        table.run(widths)
    assert_same_memory(ours, expected)
    reference.run()
    table.run()
    assert_same_memory(ours, expected)
