// The order in which a tensor's dimensions lie in memory.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastslim {

// Whether the tensor is dense with the dimensions of `order` from slowest to fastest.
inline bool dense_in(const torch::stable::Tensor& t, const std::vector<int64_t>& order) {
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    if (t.size(order[i]) != 1 && t.stride(order[i]) != expected) return false;
    expected *= t.size(order[i]);
  }
  return true;
}

}  // namespace fastslim
