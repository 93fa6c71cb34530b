"""prefix_pack's CUDA kernels: run on the CPU always, compiled where nvcc is, run on a GPU if there is one."""

from __future__ import annotations

import ctypes

import pytest
import resources
import torch
from emulation import emulated, pointer
from prefix_pack_cases import KINDS, WIDTHS, assert_same_memory, copied, full_size

from fastslim.ops import backend, prefix_pack, use_backend
from fastslim.ops.prefix_pack import Transfer, TransferTable

LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated("prefix_pack", tmp_path_factory.mktemp("emulation"))


def table_of(transfers: list[Transfer], widths: bool = False, dense: int = 0) -> torch.Tensor:
    sources, targets, add = map(list, zip(*transfers, strict=True))
    return torch.ops.fastslim.prefix_pack_table(sources, targets, add, widths, dense)


def run(library: ctypes.CDLL, way: str, table: torch.Tensor, widths: torch.Tensor | None = None) -> None:
    if way == "arguments":
        library.run_batch(pointer(table), ctypes.c_int64(len(table) - 1))
    else:
        library.run_table(pointer(table), len(table) - 1, int(table[-1, -1]) >> 32, pointer(widths))


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["arguments", "table"])
def test_kernels_run_by_the_host_equal_torch_in_every_bit(library, way, kind, low):
    torch.manual_seed(0)
    ours = KINDS[kind](low)
    expected = copied(ours)
    prefix_pack(expected)
    run(library, way, table_of(ours))
    assert_same_memory(ours, expected)


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("dense", ["source", "target"])
@pytest.mark.parametrize("name", WIDTHS)
def test_widths_read_from_memory_equal_slices(library, name, dense, low):
    torch.manual_seed(0)
    ours, widths = full_size(low, dense), torch.tensor(WIDTHS[name], dtype=torch.int32)
    expected = copied(ours)
    TransferTable(expected, dense=dense).run(widths)
    run(library, "table", table_of(ours, widths=True, dense=1 if dense == "source" else 2), widths)
    assert_same_memory(ours, expected)


def test_more_transfers_than_one_launch_takes(library):
    ours = [Transfer(torch.randn(1 + i % 5), torch.empty(1 + i % 5)) for i in range(700)]
    expected = copied(ours)
    prefix_pack(expected)
    run(library, "arguments", table_of(ours))
    assert_same_memory(ours, expected)


@pytest.mark.skipif(not resources.tool("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_kernels_compile_within_the_chips_limits(architecture):
    kernels = resources.cuda_resources("prefix_pack", architecture)
    assert {kernel.name: kernel.problems() for kernel in kernels if kernel.problems()} == {}
    assert len(kernels) == 2
    assert all(kernel.wide for kernel in kernels)
    assert min(kernel.occupancy for kernel in kernels) >= 0.375  # 768 threads with 64 bytes in flight each


def on_gpu(transfers: list[Transfer]) -> list[Transfer]:
    """The same transfers between copies of all their memory on the GPU."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).cuda()
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return [transfer._replace(source=moved(transfer.source), target=moved(transfer.target)) for transfer in transfers]


def on_cpu(transfers: list[Transfer], like: list[Transfer]) -> list[Transfer]:
    """The transfers' targets back in memory like that of the others."""
    results = copied(like)
    for result, transfer in zip(results, transfers, strict=True):
        whole = torch.empty(0, dtype=result.target.dtype).set_(result.target.untyped_storage())
        gpu = torch.empty(0, dtype=result.target.dtype, device="cuda").set_(transfer.target.untyped_storage())
        whole.copy_(gpu)
    return results


@pytest.fixture(params=["cuda", "triton"])
def kernel(request):
    if reason := backend.unusable(request.param, backend.target_of(torch.empty(0, device="cuda"))):
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@pytest.mark.gpu
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_on_the_gpu_equal_torch_in_every_bit(kernel, kind, low):
    torch.manual_seed(0)
    expected = KINDS[kind](low)
    ours = on_gpu(expected)
    prefix_pack(ours)
    with use_backend("reference"):
        before = copied(expected)
        prefix_pack(expected)
    assert_same_memory(on_cpu(ours, before), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dense", ["source", "target"])
def test_one_captured_graph_replays_any_width(kernel, dense):
    torch.manual_seed(0)
    expected = full_size(torch.bfloat16, dense)
    ours = on_gpu(expected)
    table = TransferTable(ours, dense=dense)
    widths = torch.tensor(WIDTHS["full"], dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        table.run(widths)  # loads the kernel, which a capture may not
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        table.run(widths)
    with use_backend("reference"):
        reference = TransferTable(expected, dense=dense)
        reference.run(torch.tensor(WIDTHS["full"], dtype=torch.int32))
        for name in WIDTHS:
            widths.copy_(torch.tensor(WIDTHS[name], dtype=torch.int32))
            graph.replay()
            reference.run(torch.tensor(WIDTHS[name], dtype=torch.int32))
    assert_same_memory(on_cpu(ours, expected), expected)


@pytest.mark.gpu
def test_no_host_sync_on_the_gpu(kernel):
    ours = on_gpu(KINDS["gradients"](torch.bfloat16))
    prefix_pack(ours)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefix_pack(ours)
    finally:
        torch.cuda.set_sync_debug_mode("default")
