// The launchers of csrc/cuda/depthwise_conv2d.cu, run by the host, for ctypes.
#include "../../csrc/cuda/depthwise_conv2d.cu"

namespace {

using fastslim::bfloat16;
using fastslim::DepthwiseConv2dCuda;

// `numbers`: the struct's integers in order, then the segments.
DepthwiseConv2dCuda shape_from(const int64_t* p) {
  DepthwiseConv2dCuda s{};
  s.batch = p[0], s.channels = p[1], s.multiplier = p[2];
  s.in_h = p[3], s.in_w = p[4], s.out_h = p[5], s.out_w = p[6];
  s.kernel_h = int(p[7]), s.kernel_w = int(p[8]), s.stride_h = int(p[9]), s.stride_w = int(p[10]);
  s.pad_h = int(p[11]), s.pad_w = int(p[12]), s.dilation_h = int(p[13]), s.dilation_w = int(p[14]);
  s.channels_last = p[15] != 0;
  s.x = {p[16], p[17], p[18], p[19]};
  s.y = {p[20], p[21], p[22], p[23]};
  s.row = p[24], s.tap_h = p[25], s.tap_w = p[26], s.bias = p[27];
  s.num_segments = int(p[28]);
  for (int i = 0; i < s.num_segments; ++i) s.start[i] = int32_t(p[29 + 2 * i]), s.count[i] = int32_t(p[30 + 2 * i]);
  return s;
}

template <class T> void run(const char* what, const void* a, const void* b, void* c, void* d, const int64_t* numbers) {
  using Launchers = fastslim::DepthwiseConv2dCudaLaunchers<T>;
  using A = fastslim::Accumulate<T>;
  const DepthwiseConv2dCuda s = shape_from(numbers);
  const T *first = static_cast<const T*>(a), *second = static_cast<const T*>(b);
  if (!std::strcmp(what, "forward"))
    Launchers::forward(first, second, static_cast<const T*>(d), static_cast<T*>(c), s, nullptr);
  else if (!std::strcmp(what, "backward_input"))
    Launchers::backward_input(first, second, static_cast<T*>(c), s, nullptr);
  else
    Launchers::backward_weight(first, second, static_cast<A*>(c), static_cast<A*>(d), true, true, s, nullptr);
}

}  // namespace

extern "C" void run_float32(const char* what, const void* a, const void* b, void* c, void* d, const int64_t* n) {
  run<float>(what, a, b, c, d, n);
}
extern "C" void run_bfloat16(const char* what, const void* a, const void* b, void* c, void* d, const int64_t* n) {
  run<bfloat16>(what, a, b, c, d, n);
}
extern "C" void run_float64(const char* what, const void* a, const void* b, void* c, void* d, const int64_t* n) {
  run<double>(what, a, b, c, d, n);
}
