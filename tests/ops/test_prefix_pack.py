"""prefix_pack moves what it is told, nothing else, and names what it cannot."""

from __future__ import annotations

import pytest
import torch
from prefix_pack_cases import KINDS, LAST, copied, image, memory, prefix

from fastslim import errors
from fastslim.ops import prefix_pack, prefix_unpack_add, use_backend
from fastslim.ops.prefix_pack import Transfer, TransferTable

OPS = torch.ops.fastslim


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_rounded_once(kind, low):
    torch.manual_seed(0)
    transfers = KINDS[kind](low)
    before = copied(transfers)
    prefix_pack(transfers)
    for after, start in zip(transfers, before, strict=True):
        wide = torch.float64 if torch.float64 in (after.source.dtype, after.target.dtype) else torch.float32
        exact = start.source.to(wide) + (start.target.to(wide) if start.add else 0)
        assert torch.equal(after.target, exact.to(after.target.dtype))


def test_memory_around_a_region_keeps_every_bit():
    gradient = prefix((8, 8, 3, 3), (5, 3, 3, 3), torch.float32)
    (before,) = copied([Transfer(gradient, gradient)])
    prefix_unpack_add([image((5, 3, 3, 3), torch.bfloat16, LAST)], [gradient])
    gradient.copy_(before.target)
    assert torch.equal(memory(Transfer(gradient, gradient)), memory(before))


def test_unpack_adds_unless_told_to_overwrite():
    regions = [torch.ones(3), torch.ones(3)]
    prefix_unpack_add([torch.full((3,), 2.0), torch.full((3,), 2.0)], regions, [True, False])
    assert [region.tolist() for region in regions] == [[3.0] * 3, [2.0] * 3]


def test_a_parameter_is_read_without_autograd():
    weight, packed = torch.nn.Parameter(torch.randn(4, 4)), torch.empty(2, 3, dtype=torch.bfloat16)
    prefix_pack([Transfer(weight[:2, :3], packed)])
    assert not packed.requires_grad
    assert torch.equal(packed, weight.detach()[:2, :3].bfloat16())


def test_nothing_to_move():
    prefix_pack([])
    prefix_unpack_add([], [])
    TransferTable([]).run()
    prefix_pack([Transfer(torch.empty(0, 3), torch.empty(0, 3))])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("source", "target", "error", "message"),
    [
        (torch.zeros(2), torch.zeros(3), errors.FastslimValueError, "transfer 1: source .2,. and target .3,. differ"),
        (torch.zeros(2), torch.zeros(2).int(), errors.FastslimTypeError, "transfer 1 goes from torch.float32 to"),
        (torch.zeros(17, 2)[::2], torch.zeros(3, 3), errors.FastslimValueError, "source .9, 2. and target .3, 3."),
    ],
    ids=["shape", "dtype", "strided"],
)
def test_what_cannot_be_moved_is_named(backend, source, target, error, message):
    transfers = [Transfer(torch.zeros(2), torch.ones(2)), Transfer(source, target)]
    with use_backend(backend):
        with pytest.raises(error, match=message):
            prefix_pack(transfers)
        with pytest.raises(error, match=message):
            TransferTable(transfers)


def test_several_devices_are_refused():
    transfers = [Transfer(torch.zeros(2), torch.ones(2)), Transfer(torch.zeros(2), torch.zeros(2, device="meta"))]
    for move in (prefix_pack, TransferTable):
        with pytest.raises(errors.FastslimValueError, match="transfer 1 goes from cpu to meta, the first to cpu; make"):
            move(transfers)


def test_what_only_a_kernel_cannot_move_is_named():
    source, target = torch.zeros(4, 4, 4, 6, 6)[::2, ::2, ::2, ::2, ::2], torch.zeros(2, 2, 2, 3, 3)
    prefix_pack([Transfer(source, target)])
    with use_backend("triton"), pytest.raises(errors.FastslimValueError, match="transfer 0 has more than 4 dim"):
        prefix_pack([Transfer(source, target)])


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(errors.FastslimValueError, match="1 sources, 2 targets and 2 add differ"):
        prefix_unpack_add([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)])


def test_table_packs_the_active_channels_one_behind_the_other():
    weight = image((8, 6, 3, 3), torch.float32)
    packed = torch.full((8, 6, 3, 3), torch.nan, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    TransferTable([Transfer(weight, packed)], dense="target").run(torch.tensor([[5, 4]], dtype=torch.int32))
    flat = packed.permute(0, 2, 3, 1).flatten()
    expected = weight[:5, :4].permute(0, 2, 3, 1).flatten().bfloat16()
    assert torch.equal(flat[: expected.numel()], expected)
    assert flat[expected.numel() :].isnan().all()


def test_table_sees_what_its_memory_holds_now():
    source, target = torch.zeros(4), torch.empty(4)
    table = TransferTable([Transfer(source, target)])
    source.fill_(7)
    table.run()
    assert target.tolist() == [7.0] * 4


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (torch.ones(1, 2), "must be int32 .1, 2. on cpu, not torch.float32"),
        (torch.ones(2, 2, dtype=torch.int32), r"not torch.int32 .2, 2. on cpu"),
        (torch.ones(1, 4, dtype=torch.int32)[:, ::2], "contiguous"),
    ],
    ids=["dtype", "shape", "strides"],
)
def test_wrong_widths_are_refused(widths, message):
    table = TransferTable([Transfer(torch.zeros(2, 2), torch.zeros(2, 2))])
    with pytest.raises(errors.FastslimValueError, match=message):
        table.run(widths)


def test_a_dense_side_with_gaps_is_refused():
    with pytest.raises(errors.FastslimValueError, match="leave gaps"):
        TransferTable([Transfer(torch.zeros(2, 2), torch.zeros(2, 3)[:, :2])], dense="target")
    with pytest.raises(errors.FastslimValueError, match='choose "source", "target"'):
        TransferTable([], dense="both")


@pytest.mark.parametrize("op", [OPS.prefix_pack, OPS.prefix_pack_triton], ids=["reference", "triton"])
def test_op_keeps_its_contract(op):
    sources, targets = [torch.randn(3, 4), torch.randn(5)], [torch.zeros(3, 4), torch.zeros(5)]
    torch.library.opcheck(op, (sources, targets, [True, False]))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (torch.zeros(4, 4, 4, 6, 6)[::2, ::2, ::2, ::2, ::2], torch.zeros(2, 2, 2, 3, 3), "more than 4 dimensions"),
        (torch.zeros(1).expand(2**16, 2**15), torch.zeros(1).expand(2**16, 2**15), "2.31 elements or more"),
        (torch.zeros(2).as_strided((2,), (1,)), torch.zeros(3), "differ in shape"),
    ],
    ids=["dimensions", "elements", "shape"],
)
def test_table_refuses_what_a_kernel_would_read_wrongly(source, target, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.prefix_pack_table([source], [target], [False], False, 0)
