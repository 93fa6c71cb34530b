// What every convolution's binding checks and computes of its settings.
#pragma once
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

namespace fastslim {

inline void check_conv_settings(const char* op, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": stride, padding and dilation are two numbers each");
  for (int i = 0; i < 2; ++i)
    STD_TORCH_CHECK(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, op, ": bad stride, padding or dilation");
}

inline int64_t conv_out_size(const char* op, int64_t in, int64_t kernel, int64_t stride, int64_t pad,
                             int64_t dilation) {
  const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
  STD_TORCH_CHECK(room >= 0, op, ": the kernel is larger than the padded input");
  return room / stride + 1;
}

}  // namespace fastslim
