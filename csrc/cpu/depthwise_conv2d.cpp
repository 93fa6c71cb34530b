// Packing of depthwise weights and merging of their partial gradients.
#include "depthwise_conv2d_common.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

constexpr int64_t kBlock = 64;  // channels whose weights are in the L1 cache while taps are gathered or spread

// Calls body(first packed row, first full row, rows <= kBlock) until all active rows are taken.
template <class Body> void for_each_block(const DepthwiseConv2dRows& rows, int64_t multiplier, Body body) {
  int64_t packed = 0;
  for (int64_t i = 0; i < rows.num_segments; ++i) {
    const int64_t first = rows.segments[2 * i] * multiplier, count = rows.segments[2 * i + 1] * multiplier;
    for (int64_t r = 0; r < count; r += kBlock) body(packed + r, first + r, min_of(kBlock, count - r));
    packed += count;
  }
}

template <class T> void pack(const T* weight, const DepthwiseConv2dRows& rows, const Shape& s, Accumulate<T>* packed) {
  const int64_t out_channels = s.channels * s.multiplier, stride = rows.stride_row;
  for_each_block(rows, s.multiplier, [&](int64_t to, int64_t from, int64_t n) {
    for (int64_t kh = 0; kh < s.kernel_h; ++kh)
      for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
        const T* p = weight + from * stride + kh * rows.stride_h + kw * rows.stride_w;
        Accumulate<T>* out = packed + (kh * s.kernel_w + kw) * out_channels + to;
        for (int64_t i = 0; i < n; ++i) out[i] = to_accumulate(p[i * stride]);
      }
  });
}

// grad[i * stride] (+)= the sum of chunks of partial[i].
template <class A>
void merge_block(const A* partial, int64_t chunks, int64_t chunk_stride, A* grad, int64_t stride, bool add, int64_t n) {
  double sums[kBlock];
  for (int64_t i = 0; i < n; ++i) sums[i] = add ? double(grad[i * stride]) : 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < n; ++i) sums[i] += double(partial[chunk * chunk_stride + i]);
  for (int64_t i = 0; i < n; ++i) grad[i * stride] = A(sums[i]);
}

template <class A>
void merge(const A* partial, A* grad_weight, bool add_weight, const DepthwiseConv2dRows& rows, A* grad_bias,
           bool add_bias, int64_t stride_bias, const Shape& s) {
  const int64_t out_channels = s.channels * s.multiplier, taps = s.kernel_h * s.kernel_w;
  const int64_t chunks = depthwise_conv2d_chunks(s).count, chunk_stride = (taps + 1) * out_channels;
  for_each_block(rows, s.multiplier, [&](int64_t from, int64_t to, int64_t n) {
    for (int64_t kh = 0; kh < s.kernel_h; ++kh)
      for (int64_t kw = 0; kw < s.kernel_w; ++kw)
        merge_block(partial + (kh * s.kernel_w + kw) * out_channels + from, chunks, chunk_stride,
                    grad_weight + to * rows.stride_row + kh * rows.stride_h + kw * rows.stride_w, rows.stride_row,
                    add_weight, n);
    if (grad_bias)
      merge_block(partial + taps * out_channels + from, chunks, chunk_stride, grad_bias + to * stride_bias, stride_bias,
                  add_bias, n);
  });
}

}  // namespace

extern const DepthwiseConv2dPackingTable depthwise_conv2d_packing_table;
const DepthwiseConv2dPackingTable depthwise_conv2d_packing_table = {
    {pack<float>, merge<float>}, {pack<bfloat16>, merge<float>}, {pack<double>, merge<double>}};

}  // namespace fastslim::FASTSLIM_ISA
