// Packing of depthwise weights and merging of their partial gradients.
#include "depthwise_conv2d_common.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

// Calls body(packed row, full row) for every active row.
template <class Body> void for_each_row(const DepthwiseConv2dRows& rows, int64_t multiplier, Body body) {
  int64_t packed = 0;
  for (int64_t i = 0; i < rows.num_segments; ++i) {
    const int64_t first = rows.segments[2 * i] * multiplier, count = rows.segments[2 * i + 1] * multiplier;
    for (int64_t r = 0; r < count; ++r) body(packed++, first + r);
  }
}

template <class T> void pack(const T* weight, const DepthwiseConv2dRows& rows, const Shape& s, Accumulate<T>* packed) {
  const int64_t out_channels = s.channels * s.multiplier;
  for_each_row(rows, s.multiplier, [&](int64_t to, int64_t from) {
    for (int64_t kh = 0; kh < s.kernel_h; ++kh)
      for (int64_t kw = 0; kw < s.kernel_w; ++kw)
        packed[(kh * s.kernel_w + kw) * out_channels + to] =
            to_accumulate(weight[from * rows.stride_row + kh * rows.stride_h + kw * rows.stride_w]);
  });
}

template <class A>
void merge(const A* partial, A* grad_weight, bool add_weight, const DepthwiseConv2dRows& rows, A* grad_bias,
           bool add_bias, int64_t stride_bias, const Shape& s) {
  const int64_t out_channels = s.channels * s.multiplier, taps = s.kernel_h * s.kernel_w;
  const int64_t chunks = depthwise_conv2d_chunks(s).count;
  constexpr int64_t kBlock = 256;  // channels whose sums are held at a time
  for (int64_t tap = 0; tap <= taps; ++tap) {
    if (tap == taps && !grad_bias) break;
    A* grad =
        tap == taps ? grad_bias : grad_weight + tap / s.kernel_w * rows.stride_h + tap % s.kernel_w * rows.stride_w;
    const int64_t stride = tap == taps ? stride_bias : rows.stride_row;
    const bool add = tap == taps ? add_bias : add_weight;
    double sums[kBlock];
    int64_t first = 0, last = 0;
    for_each_row(rows, s.multiplier, [&](int64_t from, int64_t to) {
      if (from == last) {
        first = last;
        last = min_of(first + kBlock, out_channels);
        for (int64_t i = first; i < last; ++i) sums[i - first] = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const A* row = partial + (chunk * (taps + 1) + tap) * out_channels;
          for (int64_t i = first; i < last; ++i) sums[i - first] += double(row[i]);
        }
      }
      A* p = grad + to * stride;
      *p = A(add ? double(*p) + sums[from - first] : sums[from - first]);
    });
  }
}

}  // namespace

extern const DepthwiseConv2dPackingTable depthwise_conv2d_packing_table;
const DepthwiseConv2dPackingTable depthwise_conv2d_packing_table = {
    {pack<float>, merge<float>}, {pack<bfloat16>, merge<float>}, {pack<double>, merge<double>}};

}  // namespace fastslim::FASTSLIM_ISA
