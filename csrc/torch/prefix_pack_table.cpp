// Binds the builder of prefix_pack's descriptor table, which CUDA C++ and Triton kernels read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <optional>

#include "transfers.h"

namespace fastslim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (n + 1, 12) int64 on the CPU: a Transfer a row; the last row holds the number of tiles.
Tensor prefix_pack_table(std::vector<Tensor> sources, std::vector<Tensor> targets, std::vector<bool> add, bool widths,
                         int64_t dense) {
  STD_TORCH_CHECK(dense >= kNotDense && dense <= kDenseTarget, "prefix_pack: dense is 0, 1 (source) or 2 (target)");
  const std::vector<Transfer> transfers = transfers_of(sources, targets, add, widths, Dense(dense));
  Tensor table =
      torch::stable::empty({int64_t(transfers.size()), int64_t(sizeof(Transfer) / sizeof(int64_t))}, ScalarType::Long,
                           std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  std::memcpy(table.mutable_data_ptr(), transfers.data(), transfers.size() * sizeof(Transfer));
  return table;
}

}  // namespace
}  // namespace fastslim

STABLE_TORCH_LIBRARY_IMPL(fastslim, CompositeExplicitAutograd, m) {
  m.impl("prefix_pack_table", TORCH_BOX(&fastslim::prefix_pack_table));
}
