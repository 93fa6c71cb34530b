// Depthwise convolution, gradient of the input:
//   gx[n, c, ih, iw] = sum over j, kh, kw with ih + p - kh*d = oh*s (and likewise iw) of
//                      w[c*m+j, kh, kw] * gy[n, c*m+j, oh, ow]
// A gather: every input position is written once, so no zero fill and no order to worry about.
#include "depthwise_conv2d_stream.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

// channels_last, kernel width K, stride S > 1: the S rows of gx that the same rows of gy meet, while gy's columns
// stream by. gx: the first of those rows; rows: of gy, the last first, null where there is none.
template <class T, class Lanes, int K, int S>
FASTSLIM_ALWAYS_INLINE void scatter_rows(const T* const (&rows)[(K + S - 1) / S], const float* weight, T* gx,
                                         const bool (&wanted)[S], const Shape& s) {
  using V = typename Lanes::V;
  constexpr int J = (K + S - 1) / S;
  V acc[S][K + S] = {};  // columns t * S - pad + m; the last S stay zero
  const auto step = [&](int64_t t, auto edge) FASTSLIM_LAMBDA_INLINE {
    constexpr bool kEdge = decltype(edge)::value;
    for (int p = 0; p < S; ++p)
      for (int m = 0; m < K; ++m) acc[p][m] = acc[p][m + S];
    if (!kEdge || t < s.out_w)
#pragma GCC unroll 4
      for (int i = 0; i < J; ++i) {
        if (!rows[i]) continue;
        const V v = Lanes::load(rows[i] + t * s.channels, s.channels);
#pragma GCC unroll 2
        for (int p = 0; p < S; ++p)
#pragma GCC unroll 8
          for (int kw = 0; kw < K; ++kw)
            if (p + S * i < K)
              multiply_add(acc[p][kw], v, load_arranged<Lanes>(weight + ((p + S * i) * K + kw) * Pairs::kChannels));
      }
    for (int m = 0; m < S; ++m) {
      const int64_t iw = t * S - s.pad_w + m;
      if (kEdge && (iw < 0 || iw >= s.in_w)) continue;
      for (int p = 0; p < S; ++p)
        if (wanted[p]) Lanes::store(gx + (p * s.in_w + iw) * s.channels, acc[p][m], s.channels);
    }
  };
  const int64_t end = ceil_div(s.in_w + s.pad_w, S);
  const int64_t first = min_of(end, ceil_div(s.pad_w, S));
  const int64_t last = max_of(first, min_of(s.out_w, floor_div(s.in_w + s.pad_w, S)));
  for (int64_t t = 0; t < first; ++t) step(t, Constant<true>{});
  for (int64_t t = first; t < last; ++t) step(t, Constant<false>{});
  for (int64_t t = last; t < end; ++t) step(t, Constant<true>{});
}

template <class T, int K, int S>
void backward_input_strided(const T* gy, const float* weight, T* gx, const Shape& s, int64_t begin, int64_t end) {
  constexpr int J = (K + S - 1) / S;
  for (int64_t item = begin; item < end;) {
    const int64_t ih = item % s.in_h, oh = (ih + s.pad_h) / S, ih0 = oh * S - s.pad_h;
    const T* image = gy + item / s.in_h * s.out_h * s.out_w * s.channels;
    const T* rows[J];
    for (int i = 0; i < J; ++i)
      rows[i] = oh - i >= 0 && oh - i < s.out_h ? image + (oh - i) * s.out_w * s.channels : nullptr;
    bool wanted[S];
    int64_t next = item;
    for (int p = 0; p < S; ++p) {
      wanted[p] = ih0 + p >= ih && ih0 + p < s.in_h && item + (ih0 + p - ih) < end;
      next += wanted[p];
    }
    int64_t index = 0;
    for_each_block(0, s.channels, [&](auto lanes, int64_t c, int64_t) {
      const T* shifted[J];
      for (int i = 0; i < J; ++i) shifted[i] = rows[i] ? rows[i] + c : nullptr;
      T* first = gx + (item + (ih0 - ih)) * s.in_w * s.channels + c;
      scatter_rows<T, decltype(lanes), K, S>(shifted, weight + index++ * K * K * Pairs::kChannels, first, wanted, s);
    });
    item = next;
  }
}

template <class T, int K, int S>
void backward_input_fast(const T* gy, const float* weight, T* gx, const Shape& s, float* scratch, int64_t begin,
                         int64_t end) {
  arrange<T>(weight, K * K, s.channels, S == 1, scratch);
  if constexpr (S == 1)  // a forward convolution with the kernel turned round
    stream<T, K, 1>(gy, scratch, nullptr, gx, {s.out_h, s.out_w, s.in_h, s.in_w, K - 1 - s.pad_h, K - 1 - s.pad_w},
                    s.channels, begin, end);
  else
    backward_input_strided<T, K, S>(gy, scratch, gx, s, begin, end);
}

// channels_last, everything else: one input pixel and one vector of input channels at a time.
template <class T>
void backward_input_rows_general(const T* gy, const Accumulate<T>* weight, T* gx, const Shape& s, int64_t begin,
                                 int64_t end) {
  using A = Accumulate<T>;
  const int64_t m = s.multiplier, out_channels = s.channels * m;
  for (int64_t item = begin; item < end; ++item) {
    const T* image = gy + item / s.in_h * s.out_h * s.out_w * out_channels;
    for (int64_t iw = 0; iw < s.in_w; ++iw)
      for (int64_t c = 0; c < s.channels; c += kLanes<A>) {
        const int64_t n = s.channels - c;
        Vec<A> acc{};
        for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
          const int64_t th = item % s.in_h + s.pad_h - kh * s.dilation_h;
          if (th < 0 || th % s.stride_h != 0 || th / s.stride_h >= s.out_h) continue;
          for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
            const int64_t tw = iw + s.pad_w - kw * s.dilation_w;
            if (tw < 0 || tw % s.stride_w != 0 || tw / s.stride_w >= s.out_w) continue;
            const T* g = image + (th / s.stride_h * s.out_w + tw / s.stride_w) * out_channels;
            const A* w = weight + (kh * s.kernel_w + kw) * out_channels;
            if (m == 1) {
              acc += load_up_to(g + c, n) * load_up_to(w + c, n);
              continue;
            }
            for (int64_t j = 0; j < m; ++j) {
              const auto channel = [&](int i) { return (c + i) * m + j; };
              acc += gather(g, n, channel) * gather(w, n, channel);
            }
          }
        }
        store_up_to(gx + (item * s.in_w + iw) * s.channels + c, acc, n);
      }
  }
}

// NCHW: a band of rows of one plane. `grad` holds the band's output rows between zero margins, `sum` the
// input rows split by column phase; both are read and written along the row.
struct FoldedBand {
  int64_t margin, grad_columns, sum_columns, in_rows, grad_rows;
  explicit FoldedBand(const Shape& s, int64_t lanes) {
    margin = (s.kernel_w - 1) * s.dilation_w / s.stride_w;
    sum_columns = round_up((max_of(s.in_w, 1) - 1 + s.pad_w) / s.stride_w + 1, lanes);
    grad_columns = margin + sum_columns;
    const int64_t halo = (s.kernel_h - 1) * s.dilation_h / s.stride_h + 2;
    const int64_t affordable = kBandElements - halo * grad_columns;
    in_rows =
        min_of(max_of(1, affordable / (grad_columns / s.stride_h + 1 + s.stride_w * sum_columns)), max_of(1, s.in_h));
    grad_rows = in_rows / s.stride_h + halo;
  }
  int64_t elements(const Shape& s) const { return grad_rows * grad_columns + in_rows * s.stride_w * sum_columns; }
};

template <class T>
void backward_input_planes(const T* gy, const Accumulate<T>* weight, T* gx, const Shape& s, Accumulate<T>* scratch,
                           int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const FoldedBand band(s, kLanes<A>);
  const int64_t out_channels = s.channels * s.multiplier, sum_size = band.in_rows * s.stride_w * band.sum_columns;
  A *sum = scratch, *grad = scratch + sum_size;
  for (int64_t item = begin; item < end; ++item)
    for (int64_t ih0 = 0; ih0 < s.in_h; ih0 += band.in_rows) {
      const int64_t rows = min_of(band.in_rows, s.in_h - ih0);
      const int64_t oh0 = max_of(0, ceil_div(ih0 + s.pad_h - (s.kernel_h - 1) * s.dilation_h, s.stride_h));
      const int64_t oh_end = min_of(s.out_h, (ih0 + rows - 1 + s.pad_h) / s.stride_h + 1);
      for (int64_t i = 0; i < sum_size; ++i) sum[i] = 0;
      for (int64_t j = 0; j < s.multiplier; ++j) {
        const int64_t co = item % s.channels * s.multiplier + j;
        const T* plane = gy + (item / s.channels * out_channels + co) * s.out_h * s.out_w;
        const int64_t columns = min_of(s.out_w, band.sum_columns);  // beyond: only padding is reached
        for (int64_t oh = oh0; oh < oh_end; ++oh) {
          A* row = grad + (oh - oh0) * band.grad_columns;
          for (int64_t i = 0; i < band.margin; ++i) row[i] = 0;
          for (int64_t i = 0; i < columns; ++i) row[band.margin + i] = to_accumulate(plane[oh * s.out_w + i]);
          for (int64_t i = band.margin + columns; i < band.grad_columns; ++i) row[i] = 0;
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
            const int64_t t = ih0 + r + s.pad_h - kh * s.dilation_h;
            if (t < 0 || t % s.stride_h != 0 || t / s.stride_h >= s.out_h) continue;
            const A* row = grad + (t / s.stride_h - oh0) * band.grad_columns + band.margin;
            for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
              const Tap tap = tap_of(kw, s.dilation_w, s.stride_w);
              const Vec<A> w = splat(weight[(kh * s.kernel_w + kw) * out_channels + co]);
              A* out = sum + (r * s.stride_w + tap.phase) * band.sum_columns;
              for (int64_t i = 0; i < band.sum_columns; i += kLanes<A>)
                store(out + i, load(out + i) + w * load(row + i - tap.quotient));
            }
          }
      }
      for (int64_t r = 0; r < rows; ++r) {
        T* out = gx + (item * s.in_h + ih0 + r) * s.in_w;
        const A* row = sum + r * s.stride_w * band.sum_columns;
        for (int64_t iw = 0; iw < s.in_w; ++iw) {
          const int64_t t = iw + s.pad_w;
          from_accumulate(row[t % s.stride_w * band.sum_columns + t / s.stride_w], out + iw);
        }
      }
    }
}

template <class T> int64_t backward_input_scratch(const Shape& s) {
  if (s.channels_last) return fast_path(s) ? arranged_elements(s.kernel_h * s.kernel_w, s.channels) : 0;
  return FoldedBand(s, kLanes<Accumulate<T>>).elements(s);
}

template <class T>
void backward_input(const T* gy, const Accumulate<T>* weight, T* gx, const Shape& s, Accumulate<T>* scratch,
                    int64_t begin, int64_t end) {
  if (!s.channels_last) return backward_input_planes(gy, weight, gx, s, scratch, begin, end);
  if constexpr (sizeof(T) < sizeof(double))  // float64 is for checking gradients, not for speed
    switch (fast_path(s)) {
      case kFast<3, 1>: return backward_input_fast<T, 3, 1>(gy, weight, gx, s, scratch, begin, end);
      case kFast<3, 2>: return backward_input_fast<T, 3, 2>(gy, weight, gx, s, scratch, begin, end);
      case kFast<5, 1>: return backward_input_fast<T, 5, 1>(gy, weight, gx, s, scratch, begin, end);
      case kFast<5, 2>: return backward_input_fast<T, 5, 2>(gy, weight, gx, s, scratch, begin, end);
      case kFast<7, 1>: return backward_input_fast<T, 7, 1>(gy, weight, gx, s, scratch, begin, end);
      case kFast<7, 2>: return backward_input_fast<T, 7, 2>(gy, weight, gx, s, scratch, begin, end);
      default: break;
    }
  backward_input_rows_general(gy, weight, gx, s, begin, end);
}

}  // namespace

extern const DepthwiseConv2dBackwardInputTable depthwise_conv2d_backward_input_table;
const DepthwiseConv2dBackwardInputTable depthwise_conv2d_backward_input_table = {
    {backward_input_scratch<float>, backward_input<float>},
    {backward_input_scratch<bfloat16>, backward_input<bfloat16>},
    {backward_input_scratch<double>, backward_input<double>}};

}  // namespace fastslim::FASTSLIM_ISA
