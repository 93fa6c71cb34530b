// Builds prefix_pack's entries from tensors; what the binding of the table and that of the kernels share.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "fastslim/prefix_pack.h"

namespace fastslim {

inline int8_t element_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    case ScalarType::Double: return kFloat64;
    default: STD_TORCH_CHECK(false, "prefix_pack: float32, bfloat16, float16 and float64 only"); return 0;
  }
}

// One entry per pair, in order, their first_tile set, and one more whose first_tile is the number of
// all tiles. Empty pairs are kept only with `widths`, whose rows belong to the entries.
inline std::vector<Transfer> transfers_of(const std::vector<torch::stable::Tensor>& sources,
                                          std::vector<torch::stable::Tensor>& targets, const std::vector<bool>& add,
                                          bool widths, Dense dense) {
  STD_TORCH_CHECK(sources.size() == targets.size() && add.size() == targets.size(),
                  "prefix_pack: one source and one add for every target");
  std::vector<Transfer> transfers;
  transfers.reserve(targets.size() + 1);
  const bool on_gpu = !targets.empty() && targets[0].is_cuda();
  const int32_t device = targets.empty() ? 0 : targets[0].get_device_index();
  int64_t tiles = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    const torch::stable::Tensor& source = sources[i];
    torch::stable::Tensor& target = targets[i];
    STD_TORCH_CHECK(source.is_cuda() == on_gpu && target.is_cuda() == on_gpu && source.get_device_index() == device &&
                        target.get_device_index() == device,
                    "prefix_pack: transfer ", i, " is not on the device of the first");
    const auto size = target.sizes(), source_size = source.sizes();
    STD_TORCH_CHECK(size.size() == source_size.size() && std::equal(size.begin(), size.end(), source_size.begin()),
                    "prefix_pack: source and target of transfer ", i, " differ in shape");
    if (!widths && std::find(size.begin(), size.end(), 0) != size.end()) continue;
    const auto source_stride = source.strides(), target_stride = target.strides();
    const TransferSide from{const_cast<void*>(source.const_data_ptr()), element_of(source), source_stride.data()};
    const TransferSide to{target.mutable_data_ptr(), element_of(target), target_stride.data()};
    const char* problem =
        make_transfer(from, to, int(size.size()), size.data(), add[i], widths, dense, &transfers.emplace_back());
    STD_TORCH_CHECK(!problem, "prefix_pack: transfer ", i, " ", problem ? problem : "");
    transfers.back().first_tile = int32_t(tiles);
    tiles += tiles_of(transfers.back());
    STD_TORCH_CHECK(tiles <= INT32_MAX, "prefix_pack: more than 2^31 tiles of 4096 elements");
  }
  transfers.push_back({});
  transfers.back().first_tile = int32_t(tiles);
  return transfers;
}

}  // namespace fastslim
