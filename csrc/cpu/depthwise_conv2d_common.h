// What the depthwise kernels share: lane-exact loads, and planes unfolded for contiguous access.
#pragma once
#include "fastslim/depthwise_conv2d.h"
#include "vec.h"

#define FASTSLIM_ALWAYS_INLINE inline __attribute__((always_inline))
#define FASTSLIM_LAMBDA_INLINE __attribute__((always_inline))

namespace fastslim::FASTSLIM_ISA {
namespace {

using Shape = DepthwiseConv2dShape;

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }  // b > 0
inline int64_t floor_div(int64_t a, int64_t b) { return -ceil_div(-a, b); }

template <class T> inline Vec<Accumulate<T>> load_up_to(const T* p, int64_t n) {
  return n >= kLanes<Accumulate<T>> ? load(p) : load_n(p, int(n));
}
template <class T> inline void store_up_to(T* p, Vec<Accumulate<T>> v, int64_t n) {
  if (n >= kLanes<Accumulate<T>>)
    store(p, v);
  else
    store_n(p, v, int(n));
}

template <bool B> struct Constant {
  static constexpr bool value = B;
};

// Lane i reads p[index(i)]: channels spread or repeated by the channel multiplier.
template <class T, class Index> inline Vec<Accumulate<T>> gather(const T* p, int64_t n, Index index) {
  Vec<Accumulate<T>> v{};
  for (int i = 0; i < kLanes<Accumulate<T>> && i < n; ++i) v[i] = to_accumulate(p[index(i)]);
  return v;
}

// Output positions [first, last) whose input position o*stride - pad + k*dilation lies in [0, size).
struct Range {
  int64_t first, last;
};
inline Range valid_outputs(int64_t k, int64_t stride, int64_t pad, int64_t dilation, int64_t size, int64_t outputs) {
  const int64_t offset = pad - k * dilation;
  const int64_t first = max_of(0, ceil_div(offset, stride));
  const int64_t last = min_of(outputs, ceil_div(size + offset, stride));
  return {first, max_of(first, last)};
}

// A kernel position's place in a row split by column phase: column k*dilation = quotient*stride + phase.
struct Tap {
  int64_t phase, quotient;
};
inline Tap tap_of(int64_t k, int64_t dilation, int64_t stride) {
  return {k * dilation % stride, k * dilation / stride};
}

// Names the compiled fast path of a channels_last shape: kernel width, stride. 0: none.
template <int K, int S> constexpr int kFast = K * 4 + S;

inline int fast_path(const Shape& s) {
  const bool square = s.kernel_h == s.kernel_w && s.stride_h == s.stride_w && s.dilation_h == 1 && s.dilation_w == 1;
  return square && s.multiplier == 1 && s.stride_w <= 2 ? int(s.kernel_w * 4 + s.stride_w) : 0;
}

// Planes are processed in bands of rows that keep the unfolded copy within the L2 cache (2 MiB here).
constexpr int64_t kBandElements = 1 << 16;

// A band of an input plane, zero-padded, converted to A and split by column phase, so that every tap
// of a strided or dilated kernel reads contiguous columns: band[row][phase][column].
struct UnfoldedBand {
  int64_t out_rows, rows, columns;
  explicit UnfoldedBand(const Shape& s, int64_t lanes) {
    columns = round_up(s.out_w, lanes) + (s.kernel_w - 1) * s.dilation_w / s.stride_w;
    const int64_t halo = (s.kernel_h - 1) * s.dilation_h + 1;
    const int64_t affordable = kBandElements / (columns * s.stride_w) - halo;
    out_rows = min_of(max_of(1, affordable / s.stride_h + 1), max_of(1, s.out_h));
    rows = (out_rows - 1) * s.stride_h + halo;
  }
  int64_t elements(const Shape& s) const { return rows * s.stride_w * columns; }

  template <class T> void fill(const T* plane, Accumulate<T>* band, int64_t first_out_row, const Shape& s) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t ih = first_out_row * s.stride_h - s.pad_h + r;
      for (int64_t phase = 0; phase < s.stride_w; ++phase) {
        Accumulate<T>* out = band + (r * s.stride_w + phase) * columns;
        int64_t first = 0, last = 0;
        if (ih >= 0 && ih < s.in_h) {
          first = min_of(max_of(0, ceil_div(s.pad_w - phase, s.stride_w)), columns);
          last = max_of(first, min_of(columns, ceil_div(s.in_w + s.pad_w - phase, s.stride_w)));
        }
        for (int64_t i = 0; i < first; ++i) out[i] = 0;
        const int64_t shift = ih * s.in_w + phase - s.pad_w;
        if (s.stride_w == 1)
          for (int64_t i = first; i < last; ++i) out[i] = to_accumulate(plane[i + shift]);
        else
          for (int64_t i = first; i < last; ++i) out[i] = to_accumulate(plane[i * s.stride_w + shift]);
        for (int64_t i = last; i < columns; ++i) out[i] = 0;
      }
    }
  }
};

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA
