// Depthwise convolution with channel multiplier m, on the active channels of a slimmable layer:
//   y[n, c*m+j, oh, ow] = bias[c*m+j] + sum_{kh,kw} w[c*m+j, kh, kw] * x[n, c, oh*s-p+kh*d, ow*s-p+kw*d]
// Torch-free: raw pointers and sizes. The kernels work on packed operands (T: float, bfloat16, double;
// A = Accumulate<T>), so they know nothing of segments and weight strides.
#pragma once
#include <cstdint>

#include "fastslim/scalar.h"

namespace fastslim {

struct DepthwiseConv2dShape {
  int64_t batch, channels, multiplier;  // active input channels; outputs: channels * multiplier
  int64_t in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool channels_last;  // of x and y alike: (N, H, W, C) in memory, else (N, C, H, W)
};

// Where the active rows of a full weight (or gradient) lie: pairs [first channel, channels], in order.
struct DepthwiseConv2dRows {
  const int64_t* segments;
  int64_t num_segments;
  int64_t stride_row, stride_h, stride_w;
};

// Work is split into independent items; a call computes items [begin, end). An item's result does
// not depend on how items are grouped into calls. `scratch` holds depthwise_conv2d_*_scratch() A's.

// The rows of one chunk of the weight gradient are summed in A, chunks in double: a chunk is large
// enough to keep the merge cheap (1024 pixels), and depends on the shape only.
struct DepthwiseConv2dChunks {
  int64_t count, rows, groups;  // row chunks, rows in a chunk, channel groups
};
constexpr int64_t kDepthwiseGroup = 64;  // channels of a group

static inline DepthwiseConv2dChunks depthwise_conv2d_chunks(const DepthwiseConv2dShape& s) {
  if (!s.channels_last) return {1, s.batch * s.out_h, 0};
  const int64_t total = s.batch * s.out_h;
  int64_t count = total * s.out_w / 1024;
  count = count < 1 ? 1 : count > 64 ? 64 : count;
  const int64_t rows = total > 0 ? (total + count - 1) / count : 1;
  return {total > 0 ? (total + rows - 1) / rows : 1, rows,
          (s.channels * s.multiplier + kDepthwiseGroup - 1) / kDepthwiseGroup};
}

// One image row (channels_last) or one plane an item.
static inline int64_t depthwise_conv2d_forward_items(const DepthwiseConv2dShape& s) {
  return s.batch * (s.channels_last ? s.out_h : s.channels * s.multiplier);
}
static inline int64_t depthwise_conv2d_backward_input_items(const DepthwiseConv2dShape& s) {
  return s.batch * (s.channels_last ? s.in_h : s.channels);
}
// One chunk and channel group (channels_last) or one output channel an item.
static inline int64_t depthwise_conv2d_backward_weight_items(const DepthwiseConv2dShape& s) {
  const DepthwiseConv2dChunks chunks = depthwise_conv2d_chunks(s);
  return s.channels_last ? chunks.count * chunks.groups : s.channels * s.multiplier;
}

template <class T> struct DepthwiseConv2dForward {
  using A = Accumulate<T>;
  int64_t (*scratch)(const DepthwiseConv2dShape&);
  void (*run)(const T* x,       // (N, C, H, W)
              const A* weight,  // (kh*kw, C*m), packed
              const A* bias,    // (C*m) or null, packed
              T* y,             // (N, C*m, Ho, Wo)
              const DepthwiseConv2dShape&, A* scratch, int64_t begin, int64_t end);
};

template <class T> struct DepthwiseConv2dBackwardInput {
  using A = Accumulate<T>;
  int64_t (*scratch)(const DepthwiseConv2dShape&);
  void (*run)(const T* grad_y,  // (N, C*m, Ho, Wo)
              const A* weight,  // (kh*kw, C*m), packed
              T* grad_x,        // (N, C, H, W)
              const DepthwiseConv2dShape&, A* scratch, int64_t begin, int64_t end);
};

template <class T> struct DepthwiseConv2dBackwardWeight {
  using A = Accumulate<T>;
  int64_t (*scratch)(const DepthwiseConv2dShape&);
  void (*run)(const T* grad_y,  // (N, C*m, Ho, Wo)
              const T* x,       // (N, C, H, W)
              A* partial,       // (chunks, kh*kw + 1, C*m), zeroed by the caller; the last row is the bias's
              bool with_bias, const DepthwiseConv2dShape&, A* scratch, int64_t begin, int64_t end);
};

template <class T> struct DepthwiseConv2dPacking {
  using A = Accumulate<T>;
  void (*pack)(const T* weight, const DepthwiseConv2dRows&, const DepthwiseConv2dShape&, A* packed);
  // grad[row] (+)= sum over chunks of partial, for the active rows only; grad_bias may be null.
  void (*merge)(const A* partial, A* grad_weight, bool add_weight, const DepthwiseConv2dRows&, A* grad_bias,
                bool add_bias, int64_t stride_bias, const DepthwiseConv2dShape&);
};

template <template <class> class Functions> struct DepthwiseConv2dTypes {
  Functions<float> float32;
  Functions<bfloat16> bf16;
  Functions<double> float64;
};
using DepthwiseConv2dForwardTable = DepthwiseConv2dTypes<DepthwiseConv2dForward>;
using DepthwiseConv2dBackwardInputTable = DepthwiseConv2dTypes<DepthwiseConv2dBackwardInput>;
using DepthwiseConv2dBackwardWeightTable = DepthwiseConv2dTypes<DepthwiseConv2dBackwardWeight>;
using DepthwiseConv2dPackingTable = DepthwiseConv2dTypes<DepthwiseConv2dPacking>;

const DepthwiseConv2dForwardTable& depthwise_conv2d_forward();
const DepthwiseConv2dBackwardInputTable& depthwise_conv2d_backward_input();
const DepthwiseConv2dBackwardWeightTable& depthwise_conv2d_backward_weight();
const DepthwiseConv2dPackingTable& depthwise_conv2d_packing();

}  // namespace fastslim
