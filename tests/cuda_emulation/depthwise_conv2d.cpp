// The launchers of csrc/cuda/depthwise_conv2d*.cu, run by the host, for ctypes.
#include <cstring>

#include "fastslim/depthwise_conv2d_cuda.h"

namespace {

using namespace fastslim;

// `numbers`: the struct's integers in order, then the segments. `width`: where the active channels stand, or null.
DepthwiseConv2dCuda shape_from(const int64_t* p, const int32_t* width) {
  DepthwiseConv2dCuda s{};
  s.batch = p[0], s.channels = Width(int32_t(p[1]), width), s.multiplier = int32_t(p[2]);
  s.in_h = int32_t(p[3]), s.in_w = int32_t(p[4]), s.out_h = int32_t(p[5]), s.out_w = int32_t(p[6]);
  s.kernel_h = int32_t(p[7]), s.kernel_w = int32_t(p[8]), s.stride_h = int32_t(p[9]), s.stride_w = int32_t(p[10]);
  s.pad_h = int32_t(p[11]), s.pad_w = int32_t(p[12]), s.dilation_h = int32_t(p[13]), s.dilation_w = int32_t(p[14]);
  s.channels_last = p[15] != 0;
  s.x = {p[16], p[17], p[18], p[19]};
  s.y = {p[20], p[21], p[22], p[23]};
  s.row = p[24], s.tap_h = p[25], s.tap_w = p[26], s.bias = p[27];
  s.multiple = int32_t(p[28]);
  s.num_segments = int32_t(p[29]);
  for (int i = 0; i < s.num_segments; ++i) s.start[i] = int32_t(p[30 + 2 * i]), s.count[i] = int32_t(p[31 + 2 * i]);
  return s;
}

template <class T>
int run(const char* what, const void* a, const void* b, void* c, void* d, float* extra, const int64_t* numbers,
        const int32_t* width, const DepthwiseConv2dFusion* fusion) {
  using Launchers = DepthwiseConv2dCudaLaunchers<T>;
  using A = Accumulate<T>;
  const DepthwiseConv2dCuda s = shape_from(numbers, width);
  const T *first = static_cast<const T*>(a), *second = static_cast<const T*>(b);
  if (!std::strcmp(what, "forward"))
    return Launchers::forward(first, second, static_cast<const T*>(d), static_cast<T*>(c), s, fusion, nullptr);
  if (!std::strcmp(what, "backward_input"))
    return Launchers::backward_input(first, second, static_cast<T*>(c), s, nullptr);
  return Launchers::backward_weight(first, second, static_cast<A*>(c), static_cast<A*>(d), extra, true, true, s, fusion,
                                    nullptr);
}

}  // namespace

// `prologue` and `partials` may be null; with `fused` they go to the kernels that know both.
extern "C" int run_kernel(int dtype, const char* what, const void* a, const void* b, void* c, void* d, float* workspace,
                          const int64_t* numbers, const int32_t* width, int fused, const float* prologue, float low,
                          float high, float* partials) {
  const DepthwiseConv2dFusion fusion{prologue, low, high, partials};
  const auto call = [&](auto type) {
    return run<decltype(type)>(what, a, b, c, d, workspace, numbers, width, fused ? &fusion : nullptr);
  };
  return dtype == 0 ? call(float()) : dtype == 1 ? call(bfloat16()) : dtype == 2 ? call(float16()) : call(double());
}
extern "C" int64_t workspace_floats(const int64_t* numbers, const int32_t* width) {
  return DepthwiseConv2dCudaLaunchers<float>::backward_weight_workspace(shape_from(numbers, width));
}
extern "C" int has_vectors(const int64_t* numbers) {
  return depthwise_conv2d_has_vectors(shape_from(numbers, nullptr));
}
extern "C" int statistics_chunks(const int64_t* numbers) {
  return depthwise_conv2d_statistics_chunks(shape_from(numbers, nullptr)).chunks;
}
