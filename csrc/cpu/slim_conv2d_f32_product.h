// The product behind the forward pass and the input's gradient: every position of a grid gathers taps of an image,
//   out[position, n] = bias[n] + sum over taps and channels k of image[position + tap, k] * weight[tap, k, n].
#pragma once
#include "slim_conv2d_f32.h"

namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32 {

// The input's gradient gathers from grad_y; pixels with the same remainder by the stride form a class, as they
// meet the same taps. The forward pass has one class.
struct Product {
  Shape shape;
  bool transposed;
  Grid grid = {};
  int64_t n;                    // channels of the output
  const float* bias = nullptr;  // (n), or null
  float* out = nullptr;         // dense
  bool add = false;             // to what `out` holds
  SlimConv2dWeight<const float> weight = {};

  Product(const Shape& s, bool transposed);
  int64_t classes() const { return transposed ? shape.stride_h * shape.stride_w : 1; }
};

int64_t product_scratch_bytes(const Product&);
void run_product(const Product&, void* scratch, const SlimConv2dParallel&);

// Writes weights of `width` channels from n0 on (zeros beyond the last) for k0 <= k < k1, k counting channels within
// taps; `to` is (k1 - k0, width).
void pack_product_weight(const Product&, const Taps& h, const Taps& w, int64_t k0, int64_t k1, int64_t n0, int width,
                         float* to);

}  // namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32
