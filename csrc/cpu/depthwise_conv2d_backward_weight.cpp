// Depthwise convolution, gradient of weight and bias:
//   gw[c*m+j, kh, kw] = sum over n, oh, ow of gy[n, c*m+j, oh, ow] * x[n, c, oh*s-p+kh*d, ow*s-p+kw*d]
// A few image rows are summed in registers, these are added to the chunk's partial sums (blocked summation),
// and chunks are merged in double: the result depends on the shape only, not on threads.
#include "depthwise_conv2d_lanes.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

// One row of gy against R rows of x (null in the padding), while the columns stream by: what is loaded of gy serves
// the K / S columns of x that it meets.
template <class T, class Lanes, int R, int K, int S>
FASTSLIM_ALWAYS_INLINE void accumulate_row(const T* const (&rows)[R], const T* gy, const Shape& s,
                                           typename Lanes::V (&acc)[R * K]) {
  using V = typename Lanes::V;
  constexpr int J = (K + S - 1) / S;
  V g[J] = {};
  const auto step = [&](int64_t t, auto edge) FASTSLIM_LAMBDA_INLINE {
    constexpr bool kEdge = decltype(edge)::value;
    for (int j = J - 1; j > 0; --j) g[j] = g[j - 1];
    if (!kEdge || t < s.out_w) g[0] = Lanes::load(gy + t * s.channels, s.channels);
#pragma GCC unroll 2
    for (int q = 0; q < S; ++q) {
      const int64_t iw = t * S - s.pad_w + q;
      if (kEdge && (iw < 0 || iw >= s.in_w)) continue;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if (!rows[r]) continue;
        const V v = Lanes::load(rows[r] + iw * s.channels, s.channels);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j)
          if (q + S * j < K && (!kEdge || (t - j >= 0 && t - j < s.out_w)))
            multiply_add(acc[r * K + q + S * j], v, g[j]);
      }
    }
  };
  const int64_t end = s.out_w + J - 1;
  const int64_t first = min_of(end, max_of(J - 1, ceil_div(s.pad_w, S)));
  const int64_t last = max_of(first, min_of(s.out_w, floor_div(s.in_w + s.pad_w, S)));
  for (int64_t t = 0; t < first; ++t) step(t, Constant<true>{});
  for (int64_t t = first; t < last; ++t) step(t, Constant<false>{});
  for (int64_t t = last; t < end; ++t) step(t, Constant<true>{});
}

// Rows [row_first, row_last) of the batch for one block of channels, from kernel row kh on: R of them.
template <class T, class Lanes, int R, int K, int S>
void accumulate_rows(const T* x, const T* gy, const Shape& s, int kh, int64_t row_first, int64_t row_last,
                     float* sums) {
  using V = typename Lanes::V;
  V acc[R * K] = {};
  for (int64_t row = row_first; row < row_last; ++row) {
    const T* image = x + row / s.out_h * s.in_h * s.in_w * s.channels;
    const int64_t ih0 = row % s.out_h * S - s.pad_h + kh;
    const T* rows[R];
    for (int r = 0; r < R; ++r)
      rows[r] = ih0 + r >= 0 && ih0 + r < s.in_h ? image + (ih0 + r) * s.in_w * s.channels : nullptr;
    accumulate_row<T, Lanes, R, K, S>(rows, gy + row * s.out_w * s.channels, s, acc);
  }
  for (int i = 0; i < R * K; ++i) add_arranged<Lanes>(sums + i * Pairs::kChannels, acc[i]);
}

// channels_last, kernel width K, stride S.
template <class T, int K, int S>
void chunk_fast(const T* x, const T* gy, float* partial, const Shape& s, int64_t row_first, int64_t row_last,
                int64_t c_first, int64_t c_last) {
  constexpr int R = K == 3 ? 3 : 1;                             // kernel rows whose sums fit the registers
  const int64_t together = max_of(1, 64 / max_of(1, s.out_w));  // rows summed in registers
  for_each_block(c_first, c_last, [&](auto lanes, int64_t c, int64_t fresh) {
    using Lanes = decltype(lanes);
    float sums[K * K * Pairs::kChannels] = {};
    for (int64_t row = row_first; row < row_last; row += together)
      for (int kh = 0; kh < K; kh += R)
        accumulate_rows<T, Lanes, R, K, S>(x + c, gy + c, s, kh, row, min_of(row + together, row_last),
                                           sums + kh * K * Pairs::kChannels);
    const int n = int(min_of(Lanes::kChannels, s.channels));
    for (int tap = 0; tap < K * K; ++tap)
      for (int i = int(fresh - c); i < n; ++i)  // lanes that the neighbour has counted are left alone
        partial[tap * s.channels + c + i] = sums[tap * Pairs::kChannels + Lanes::template place<T>(i)];
  });
}

// channels_last, everything else: tap by tap.
template <class T>
void chunk_general(const T* x, const T* gy, Accumulate<T>* partial, const Shape& s, int64_t row_first, int64_t row_last,
                   int64_t c_first, int64_t c_last) {
  using A = Accumulate<T>;
  const int64_t m = s.multiplier, out_channels = s.channels * m;
  for (int64_t row = row_first; row < row_last; ++row)
    for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
      const int64_t ih = row % s.out_h * s.stride_h - s.pad_h + kh * s.dilation_h;
      if (ih < 0 || ih >= s.in_h) continue;
      const T* in = x + (row / s.out_h * s.in_h + ih) * s.in_w * s.channels;
      const T* grad = gy + row * s.out_w * out_channels;
      for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
        const Range valid = valid_outputs(kw, s.stride_w, s.pad_w, s.dilation_w, s.in_w, s.out_w);
        for (int64_t c = c_first; c < c_last; c += kLanes<A>) {
          const int64_t n = c_last - c;
          Vec<A> acc{};
          for (int64_t ow = valid.first; ow < valid.last; ++ow) {
            const T* pixel = in + (ow * s.stride_w - s.pad_w + kw * s.dilation_w) * s.channels;
            const Vec<A> v = m == 1 ? load_up_to(pixel + c, n) : gather(pixel, n, [&](int i) { return (c + i) / m; });
            acc += v * load_up_to(grad + ow * out_channels + c, n);
          }
          A* sum = partial + (kh * s.kernel_w + kw) * out_channels + c;
          store_up_to(sum, load_up_to(sum, n) + acc, n);
        }
      }
    }
}

template <class T>
void chunk_bias(const T* gy, Accumulate<T>* partial, const Shape& s, int64_t row_first, int64_t row_last,
                int64_t c_first, int64_t c_last) {
  using A = Accumulate<T>;
  const int64_t out_channels = s.channels * s.multiplier;
  for (int64_t row = row_first; row < row_last; ++row)
    for (int64_t c = c_first; c < c_last; c += kLanes<A>) {
      const int64_t n = c_last - c;
      Vec<A> acc{};
      for (int64_t ow = 0; ow < s.out_w; ++ow) acc += load_up_to(gy + (row * s.out_w + ow) * out_channels + c, n);
      store_up_to(partial + c, load_up_to(partial + c, n) + acc, n);
    }
}

template <class T>
using Chunk = void (*)(const T*, const T*, Accumulate<T>*, const Shape&, int64_t, int64_t, int64_t, int64_t);

template <class T> Chunk<T> choose_chunk(const Shape& s) {
  switch (fast_path(s)) {
    case kFast<3, 1>: return chunk_fast<T, 3, 1>;
    case kFast<3, 2>: return chunk_fast<T, 3, 2>;
    case kFast<5, 1>: return chunk_fast<T, 5, 1>;
    case kFast<5, 2>: return chunk_fast<T, 5, 2>;
    case kFast<7, 1>: return chunk_fast<T, 7, 1>;
    case kFast<7, 2>: return chunk_fast<T, 7, 2>;
    default: return chunk_general<T>;
  }
}
// float64 is for checking gradients, not for speed.
template <> Chunk<double> choose_chunk<double>(const Shape&) { return chunk_general<double>; }

template <class T>
void backward_weight_rows(const T* gy, const T* x, Accumulate<T>* partial, bool with_bias, const Shape& s,
                          int64_t begin, int64_t end) {
  const DepthwiseConv2dChunks chunks = depthwise_conv2d_chunks(s);
  const int64_t out_channels = s.channels * s.multiplier, taps = s.kernel_h * s.kernel_w;
  const Chunk<T> chunk = choose_chunk<T>(s);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t index = item / chunks.groups, group = item % chunks.groups;
    const int64_t row_first = index * chunks.rows, row_last = min_of(row_first + chunks.rows, s.batch * s.out_h);
    const int64_t c_first = group * kDepthwiseGroup, c_last = min_of(c_first + kDepthwiseGroup, out_channels);
    Accumulate<T>* sums = partial + index * (taps + 1) * out_channels;
    chunk(x, gy, sums, s, row_first, row_last, c_first, c_last);
    if (with_bias) chunk_bias(gy, sums + taps * out_channels, s, row_first, row_last, c_first, c_last);
  }
}

// NCHW: one output channel at a time over the whole batch, vectors run along the row.
template <class T>
void backward_weight_planes(const T* gy, const T* x, Accumulate<T>* partial, bool with_bias, const Shape& s,
                            Accumulate<T>* scratch, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const UnfoldedBand band(s, kLanes<A>);
  const int64_t out_channels = s.channels * s.multiplier, taps = s.kernel_h * s.kernel_w;
  for (int64_t co = begin; co < end; ++co)
    for (int64_t n = 0; n < s.batch; ++n) {
      const T* plane = x + (n * s.channels + co / s.multiplier) * s.in_h * s.in_w;
      const T* grad = gy + (n * out_channels + co) * s.out_h * s.out_w;
      for (int64_t oh0 = 0; oh0 < s.out_h; oh0 += band.out_rows) {
        const int64_t oh_end = min_of(oh0 + band.out_rows, s.out_h);
        band.fill(plane, scratch, oh0, s);
        for (int64_t k = 0; k < taps; ++k) {
          const Tap tap = tap_of(k % s.kernel_w, s.dilation_w, s.stride_w);
          Vec<A> acc{};
          for (int64_t oh = oh0; oh < oh_end; ++oh) {
            const int64_t r = (oh - oh0) * s.stride_h + k / s.kernel_w * s.dilation_h;
            const A* row = scratch + (r * s.stride_w + tap.phase) * band.columns + tap.quotient;
            for (int64_t ow = 0; ow < s.out_w; ow += kLanes<A>)
              acc += load_up_to(grad + oh * s.out_w + ow, s.out_w - ow) * load_up_to(row + ow, s.out_w - ow);
          }
          partial[k * out_channels + co] += sum_lanes<A>(acc);
        }
      }
      if (with_bias) {
        Vec<A> acc{};
        const int64_t size = s.out_h * s.out_w;
        for (int64_t i = 0; i < size; i += kLanes<A>) acc += load_up_to(grad + i, size - i);
        partial[taps * out_channels + co] += sum_lanes<A>(acc);
      }
    }
}

template <class T> int64_t backward_weight_scratch(const Shape& s) {
  return s.channels_last ? 0 : UnfoldedBand(s, kLanes<Accumulate<T>>).elements(s);
}

template <class T>
void backward_weight(const T* gy, const T* x, Accumulate<T>* partial, bool with_bias, const Shape& s,
                     Accumulate<T>* scratch, int64_t begin, int64_t end) {
  if (s.channels_last)
    backward_weight_rows(gy, x, partial, with_bias, s, begin, end);
  else
    backward_weight_planes(gy, x, partial, with_bias, s, scratch, begin, end);
}

}  // namespace

extern const DepthwiseConv2dBackwardWeightTable depthwise_conv2d_backward_weight_table;
const DepthwiseConv2dBackwardWeightTable depthwise_conv2d_backward_weight_table = {
    {backward_weight_scratch<float>, backward_weight<float>},
    {backward_weight_scratch<bfloat16>, backward_weight<bfloat16>},
    {backward_weight_scratch<double>, backward_weight<double>}};

}  // namespace fastslim::FASTSLIM_ISA
