// Dense convolution (and matrix product: kernel 1x1) with the active part of a slimmable layer's weight,
//   y[n, oh, ow, o] = bias[o] + sum_{kh,kw,i} w[o, i, kh, kw] * x[n, oh*s-p+kh*d, ow*s-p+kw*d, i],
// on channels_last images. Torch-free: raw pointers and sizes. The weight is the layer's full float32 one,
// read through its strides and rounded to T while it is packed; its gradient goes straight into the active
// region of a full-size float32 gradient. Nothing here is generated per shape: random widths cost nothing extra.
#pragma once
#include <cstdint>

#include "fastslim/scalar.h"

namespace fastslim {

struct SlimConv2dShape {
  int64_t batch, c_in, c_out;  // active channels
  int64_t in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  // Elements from one pixel of the input to the next: c_in, or more where x is a prefix of wider pixels.
  // The pixels follow each other row by row, image by image. y and both gradients of images are dense.
  int64_t x_pixel;
};

// The full-size weight, or its gradient. Rows 0..c_out are active; `segments` are the pairs (first, count) of input
// channels of the full weight that x holds, in order.
template <class W> struct SlimConv2dWeight {
  W* data;
  int64_t stride_out, stride_in, stride_h, stride_w;
  const int64_t* segments;
  int64_t num_segments;
};

// Runs body(context, begin, end) over [0, items) on torch's threads and waits. An item's result does not depend on
// how items are grouped into calls. A raw function pointer: a std::function would be merged across instruction sets.
struct SlimConv2dParallel {
  void (*run)(int64_t items, void* context, void (*body)(void* context, int64_t begin, int64_t end));
};

// `scratch` holds scratch_bytes() bytes, aligned to 64, of any content.
template <class T> struct SlimConv2dForward {
  int64_t (*scratch_bytes)(const SlimConv2dShape&);
  void (*run)(const T* x, const SlimConv2dWeight<const float>& weight, const float* bias /* c_out, or null */, T* y,
              const SlimConv2dShape&, void* scratch, const SlimConv2dParallel&);
};

template <class T> struct SlimConv2dBackwardInput {
  int64_t (*scratch_bytes)(const SlimConv2dShape&);
  // Overwrites grad_x, or adds to it.
  void (*run)(const T* grad_y, const SlimConv2dWeight<const float>& weight, T* grad_x, bool add, const SlimConv2dShape&,
              void* scratch, const SlimConv2dParallel&);
};

template <class T> struct SlimConv2dBackwardWeight {
  int64_t (*scratch_bytes)(const SlimConv2dShape&);
  // Overwrites the active region, or adds to it; leaves the rest alone.
  void (*run)(const T* grad_y, const T* x, const SlimConv2dWeight<float>& grad_weight, bool add, const SlimConv2dShape&,
              void* scratch, const SlimConv2dParallel&);
};

template <class T> struct SlimConv2dTable {
  SlimConv2dForward<T> forward;
  SlimConv2dBackwardInput<T> backward_input;
  SlimConv2dBackwardWeight<T> backward_weight;
};

struct SlimConv2dFloatTable {
  SlimConv2dTable<float> f;
};
// Null where the processor, or the system, has no AMX (Linux lets a process ask for it).
struct SlimConv2dBfloat16Table {
  SlimConv2dTable<bfloat16> b;
  bool (*usable)();
};

const SlimConv2dFloatTable& slim_conv2d_float();
const SlimConv2dBfloat16Table& slim_conv2d_bfloat16();

}  // namespace fastslim
