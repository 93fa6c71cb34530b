// Depthwise convolution, gradient of weight and bias:
//   gw[c*m+j, kh, kw] = sum over n, oh, ow of gy[n, c*m+j, oh, ow] * x[n, c, oh*s-p+kh*d, ow*s-p+kw*d]
// Each image row is summed in registers, rows are added to the chunk's partial sums (blocked
// summation), and chunks are merged in double: the result depends on the shape only, not on threads.
#include "depthwise_conv2d_common.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

// W output pixels from column ow of one row, for R kernel rows of width K at stride S.
template <class T, int R, int K, int S, int W, bool Edge, bool Part>
FASTSLIM_ALWAYS_INLINE void accumulate_block(const T* x, const T* gy, const Shape& s, int64_t ow,
                                             Vec<Accumulate<T>> (&acc)[R * K]) {
  using A = Accumulate<T>;
  const int64_t iw0 = ow * S - s.pad_w;
  Vec<A> g[W];
  for (int j = 0; j < W; ++j) g[j] = load_channels<Part>(gy + (ow + j) * s.channels, s.channels);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
    for (int column = 0; column < (W - 1) * S + K; ++column) {
      if (Edge && (iw0 + column < 0 || iw0 + column >= s.in_w)) continue;
      const Vec<A> v = load_channels<Part>(x + (r * s.dilation_h * s.in_w + iw0 + column) * s.channels, s.channels);
#pragma GCC unroll 8
      for (int kw = 0; kw < K; ++kw)
        if (column >= kw && (column - kw) % S == 0 && (column - kw) / S < W)
          acc[r * K + kw] += v * g[(column - kw) / S];
    }
}

// One row of gy against R rows of x, for the channel vectors that start in [c_first, c_last).
template <class T, int R, int K, int S, bool Part>
void accumulate_row(const T* x, const T* gy, Accumulate<T>* partial, const Shape& s, int64_t c_first, int64_t c_last) {
  using A = Accumulate<T>;
  constexpr int W = 4;
  const int64_t inner = max_of(0, min_of(s.out_w, floor_div(s.in_w + s.pad_w - K, S) + 1));
  const int64_t edge = min_of(ceil_div(s.pad_w, S), inner);
  // Whole rows at a time: tiles that fit L1 were 5 to 40 % slower.
  for (int64_t start = c_first; start < c_last; start += kLanes<A>) {
    const int64_t c = Part ? 0 : min_of(start, s.channels - kLanes<A>);  // the last vector overlaps its neighbour
    Vec<A> acc[R * K] = {};
    int64_t ow = 0;
    for (; ow < edge; ++ow) accumulate_block<T, R, K, S, 1, true, Part>(x + c, gy + c, s, ow, acc);
    for (; ow + W <= inner; ow += W) accumulate_block<T, R, K, S, W, false, Part>(x + c, gy + c, s, ow, acc);
    for (; ow < inner; ++ow) accumulate_block<T, R, K, S, 1, false, Part>(x + c, gy + c, s, ow, acc);
    for (; ow < s.out_w; ++ow) accumulate_block<T, R, K, S, 1, true, Part>(x + c, gy + c, s, ow, acc);
    for (int i = 0; i < R * K; ++i) {
      A* sum = partial + i * s.channels + c;
      if (start == c)
        store_channels<Part>(sum, load_channels<Part>(sum, s.channels) + acc[i], s.channels);
      else  // lanes that the neighbour has counted are left alone
        for (int64_t lane = start - c; lane < kLanes<A>; ++lane) sum[lane] += acc[i][lane];
    }
  }
}

// channels_last, kernel width K, stride S, dilation 1, multiplier 1.
template <class T, int K, int S, bool Part>
void chunk_fast(const T* x, const T* gy, Accumulate<T>* partial, const Shape& s, int64_t row_first, int64_t row_last,
                int64_t c_first, int64_t c_last) {
  for (int64_t row = row_first; row < row_last; ++row) {
    const T* image = x + row / s.out_h * s.in_h * s.in_w * s.channels;
    const T* grad = gy + row * s.out_w * s.channels;
    const int64_t ih0 = row % s.out_h * s.stride_h - s.pad_h, row_size = s.in_w * s.channels;
    if (K == 3 && s.kernel_h == 3 && ih0 >= 0 && ih0 + 2 * s.dilation_h < s.in_h) {
      accumulate_row<T, K == 3 ? 3 : 1, K, S, Part>(image + ih0 * row_size, grad, partial, s, c_first, c_last);
      continue;
    }
    for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
      const int64_t ih = ih0 + kh * s.dilation_h;
      if (ih >= 0 && ih < s.in_h)
        accumulate_row<T, 1, K, S, Part>(image + ih * row_size, grad, partial + kh * K * s.channels, s, c_first,
                                         c_last);
    }
  }
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
  switch (fast_path<T>(s)) {
    case kFast<3, 1>: return chunk_fast<T, 3, 1, false>;
    case kFast<3, 2>: return chunk_fast<T, 3, 2, false>;
    case kFast<5, 1>: return chunk_fast<T, 5, 1, false>;
    case kFast<5, 2>: return chunk_fast<T, 5, 2, false>;
    case kFast<7, 1>: return chunk_fast<T, 7, 1, false>;
    case kFast<7, 2>: return chunk_fast<T, 7, 2, false>;
    case kFast<3, 1, true>: return chunk_fast<T, 3, 1, true>;
    case kFast<3, 2, true>: return chunk_fast<T, 3, 2, true>;
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
