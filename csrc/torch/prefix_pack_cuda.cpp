// Binds prefix_pack's CUDA kernels: builds the entries, launches on torch's current stream.
#include "fastslim/prefix_pack_cuda.h"

#include "cuda_common.h"
#include "transfers.h"

namespace fastslim {
namespace {

void prefix_pack(std::vector<Tensor> sources, std::vector<Tensor> targets, std::vector<bool> add) {
  if (targets.empty()) return;
  STD_TORCH_CHECK(targets[0].is_cuda(), "prefix_pack: transfer 0 is not on the GPU");
  std::vector<Transfer> transfers = transfers_of(sources, targets, add, false, kNotDense);
  torch::stable::accelerator::DeviceGuard guard(targets[0].get_device_index());
  STD_CUDA_CHECK(launch_prefix_pack(transfers.data(), int64_t(transfers.size()) - 1, current_stream(targets[0])));
}

// `table` as prefix_pack_table made it, on the GPU; the entries' tensors must still be alive.
void prefix_pack_run(const Tensor& table, const std::optional<Tensor>& widths, int64_t tiles) {
  const int64_t count = table.size(0) - 1;
  STD_TORCH_CHECK(table.is_cuda() && table.is_contiguous() && table.scalar_type() == ScalarType::Long &&
                      table.dim() == 2 && table.size(1) * sizeof(int64_t) == sizeof(Transfer),
                  "prefix_pack: not a table of transfers on the GPU");
  STD_TORCH_CHECK(!widths || (widths->is_cuda() && widths->get_device_index() == table.get_device_index() &&
                              widths->scalar_type() == ScalarType::Int && widths->is_contiguous() &&
                              widths->dim() == 2 && widths->size(0) == count && widths->size(1) == 2),
                  "prefix_pack: widths must be a contiguous int32 tensor (transfers, 2) on the table's GPU");
  STD_TORCH_CHECK(tiles >= 0 && tiles <= INT32_MAX, "prefix_pack: tiles out of range");
  torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  STD_CUDA_CHECK(launch_prefix_pack_table(read<Transfer>(table), int32_t(count), int32_t(tiles), read<int32_t>(widths),
                                          current_stream(table)));
}

}  // namespace
}  // namespace fastslim

STABLE_TORCH_LIBRARY_IMPL(fastslim, CUDA, m) {
  m.impl("prefix_pack", TORCH_BOX(&fastslim::prefix_pack));
  m.impl("prefix_pack_run", TORCH_BOX(&fastslim::prefix_pack_run));
}
