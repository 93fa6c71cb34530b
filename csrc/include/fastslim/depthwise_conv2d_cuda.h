// Depthwise convolution on a GPU: launchers, torch-free. The maths stands in depthwise_conv2d.h.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "fastslim/scalar.h"

namespace fastslim {

// A strided view of (N, C, H, W); strides in elements, so NCHW and channels_last are alike.
struct ImageStrides {
  int64_t n, c, h, w;
};

constexpr int kDepthwiseMaxSegments = 64;

struct DepthwiseConv2dCuda {
  int64_t batch, channels, multiplier;  // active input channels; outputs: channels * multiplier
  int64_t in_h, in_w, out_h, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool channels_last;         // which index runs fastest over neighbouring threads
  ImageStrides x, y;          // of x and grad_x; of y and grad_y
  int64_t row, tap_h, tap_w;  // strides of the full weight, or of its gradient
  int64_t bias;               // stride of the full bias, or of its gradient
  int num_segments;           // channel ranges of the full layer, in order
  int32_t start[kDepthwiseMaxSegments], count[kDepthwiseMaxSegments];
};

// T: float, bfloat16, double; sums and gradients of parameters are in A = Accumulate<T>.
template <class T> struct DepthwiseConv2dCudaLaunchers {
  using A = Accumulate<T>;
  static cudaError_t forward(const T* x,       // (N, C, H, W)
                             const T* weight,  // (C_full * m, 1, kh, kw)
                             const T* bias,    // (C_full * m) or null
                             T* y,             // (N, C * m, Ho, Wo)
                             const DepthwiseConv2dCuda&, cudaStream_t);
  static cudaError_t backward_input(const T* grad_y,  // (N, C * m, Ho, Wo)
                                    const T* weight,  // (C_full * m, 1, kh, kw)
                                    T* grad_x,        // (N, C, H, W)
                                    const DepthwiseConv2dCuda&, cudaStream_t);
  // Writes (or adds to) the active rows only.
  static cudaError_t backward_weight(const T* grad_y,  // (N, C * m, Ho, Wo)
                                     const T* x,       // (N, C, H, W)
                                     A* grad_weight,   // (C_full * m, 1, kh, kw)
                                     A* grad_bias,     // (C_full * m) or null
                                     bool add_weight, bool add_bias, const DepthwiseConv2dCuda&, cudaStream_t);
};

}  // namespace fastslim
