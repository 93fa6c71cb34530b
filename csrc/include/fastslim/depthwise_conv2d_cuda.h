// Depthwise convolution on a GPU: launchers, torch-free. The maths stands in depthwise_conv2d.h.
// channels_last with a square 3x3, 5x5 or 7x7 kernel, stride 1 or 2, no dilation and multiplier 1 goes
// through vectors of channels (csrc/cuda/depthwise_conv2d_vector*.cu), all else one element a thread.
#pragma once
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>

#include "fastslim/scalar.h"
#include "fastslim/width.h"

namespace fastslim {

// A strided view of (N, C, H, W); strides in elements, so NCHW and channels_last are alike.
struct ImageStrides {
  int64_t n, c, h, w;
};

constexpr int kDepthwiseMaxSegments = 64;

// An image of a sample, in and out, has fewer than 2^31 elements.
struct DepthwiseConv2dCuda {
  int64_t batch;
  Width channels;    // active input channels; outputs: channels * multiplier
  int32_t multiple;  // of all values the width can have: the width itself if the host knows it
  int32_t multiplier;
  int32_t in_h, in_w, out_h, out_w;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool channels_last;         // which index runs fastest over neighbouring threads
  ImageStrides x, y;          // of x and grad_x; of y and grad_y; dense if `channels` lies in device memory
  int64_t row, tap_h, tap_w;  // strides of the full weight, or of its gradient
  int64_t bias;               // stride of the full bias, or of its gradient
  int32_t num_segments;       // channel ranges of the full layer, in order
  int32_t start[kDepthwiseMaxSegments], count[kDepthwiseMaxSegments];
};

// What the vector kernels do besides the convolution.
//   prologue  x' = clamp((x - center) * scale + shift, low, high), a channel each; the padding stays 0
//   partials  of the rounded output, for every chunk of rows: its first value, sum(y - first), sum((y - first)^2)
struct DepthwiseConv2dFusion {
  const float* prologue = nullptr;         // (3, channels): center, scale, shift; or null
  float low = -INFINITY, high = INFINITY;  // none; relu from 0; relu6 from 0 to 6
  float* partials = nullptr;               // (chunks, 3, channels) or null, forward only
};

// Whether the vector kernels take a call; they alone know a fusion. T's size is 2 (16-bit types) or 4.
bool depthwise_conv2d_has_vectors(const DepthwiseConv2dCuda&);

// How forward cuts its N * Ho output rows for the statistics: every chunk but the last has `rows` of
// them, and rows = ceil(N * Ho / chunks).
struct DepthwiseConv2dRowChunks {
  int32_t rows, chunks;
};
DepthwiseConv2dRowChunks depthwise_conv2d_statistics_chunks(const DepthwiseConv2dCuda&);

// T: float, bfloat16, float16, double; sums and gradients of parameters are in A = Accumulate<T>.
template <class T> struct DepthwiseConv2dCudaLaunchers {
  using A = Accumulate<T>;
  static cudaError_t forward(const T* x,       // (N, C, H, W)
                             const T* weight,  // (C_full * m, 1, kh, kw)
                             const T* bias,    // (C_full * m) or null
                             T* y,             // (N, C * m, Ho, Wo)
                             const DepthwiseConv2dCuda&, const DepthwiseConv2dFusion*, cudaStream_t);
  // With a prologue: the gradient of the prologue's output.
  static cudaError_t backward_input(const T* grad_y,  // (N, C * m, Ho, Wo)
                                    const T* weight,  // (C_full * m, 1, kh, kw)
                                    T* grad_x,        // (N, C, H, W)
                                    const DepthwiseConv2dCuda&, cudaStream_t);
  // Writes (or adds to) the active rows only.
  static cudaError_t backward_weight(const T* grad_y,   // (N, C * m, Ho, Wo)
                                     const T* x,        // (N, C, H, W)
                                     A* grad_weight,    // (C_full * m, 1, kh, kw)
                                     A* grad_bias,      // (C_full * m) or null
                                     float* workspace,  // backward_weight_workspace() floats
                                     bool add_weight, bool add_bias, const DepthwiseConv2dCuda&,
                                     const DepthwiseConv2dFusion*, cudaStream_t);
  static int64_t backward_weight_workspace(const DepthwiseConv2dCuda&);
};

}  // namespace fastslim
