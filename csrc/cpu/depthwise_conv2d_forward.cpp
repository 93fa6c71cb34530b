// Depthwise convolution, forward.
#include "depthwise_conv2d_common.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

// channels_last, kernel width K, stride S, dilation 1, multiplier 1: W output pixels
// from (iw0 / S); vectors run over channels, and one loaded column serves every output it touches.
// Edge: columns may lie in the padding, outputs beyond the row.
template <class T, int K, int S, int W, bool Edge, bool Part>
FASTSLIM_ALWAYS_INLINE void forward_block(const T* image, const KernelRows<Accumulate<T>>& rows,
                                          const Accumulate<T>* bias, T* y, const Shape& s, int64_t iw0,
                                          int64_t outputs) {
  using A = Accumulate<T>;
  constexpr int kColumns = (W - 1) * S + K;
  const int64_t channels = s.channels, last_vector = channels - kLanes<A>;
  for (int64_t start = 0; start < channels; start += kLanes<A>) {
    const int64_t c = Part ? 0 : min_of(start, last_vector);  // the last vector overlaps its neighbour
    Vec<A> acc[W];
    for (int j = 0; j < W; ++j) acc[j] = bias ? load_channels<Part>(bias + c, channels) : Vec<A>{};
    for (int r = 0; r < rows.count; ++r) {
      const T* first = image + (rows.rows[r].position + iw0) * channels + c;
      Vec<A> w[K];
      for (int kw = 0; kw < K; ++kw) w[kw] = load_channels<Part>(rows.rows[r].weight + kw * channels + c, channels);
#pragma GCC unroll 32
      for (int column = 0; column < kColumns; ++column) {
        if (Edge && (iw0 + column < 0 || iw0 + column >= s.in_w)) continue;
        const Vec<A> v = load_channels<Part>(first + column * channels, channels);
#pragma GCC unroll 8
        for (int kw = 0; kw < K; ++kw)
          if (column >= kw && (column - kw) % S == 0 && (column - kw) / S < W) acc[(column - kw) / S] += v * w[kw];
      }
    }
    for (int j = 0; j < W; ++j)
      if (!Edge || j < outputs) store_channels<Part>(y + j * channels + c, acc[j], channels);
  }
}

template <class T, int K, int S, bool Part = false>
void forward_rows(const T* x, const Accumulate<T>* weight, const Accumulate<T>* bias, T* y, const Shape& s,
                  int64_t begin, int64_t end) {
  constexpr int W = 4;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t ih0 = item % s.out_h * s.stride_h - s.pad_h;
    KernelRows<Accumulate<T>> rows;
    for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
      const int64_t ih = ih0 + kh * s.dilation_h;
      if (ih >= 0 && ih < s.in_h) rows.rows[rows.count++] = {weight + kh * K * s.channels, ih * s.in_w};
    }
    const T* image = x + item / s.out_h * s.in_h * s.in_w * s.channels;
    T* out = y + item * s.out_w * s.channels;
    for (int64_t ow = 0; ow < s.out_w; ow += W) {
      const int64_t iw0 = ow * S - s.pad_w;
      T* block = out + ow * s.channels;
      if constexpr (Part)
        forward_block<T, K, S, W, true, true>(image, rows, bias, block, s, iw0, s.out_w - ow);
      else if (iw0 >= 0 && iw0 + (W - 1) * S + K <= s.in_w && ow + W <= s.out_w)
        forward_block<T, K, S, W, false, false>(image, rows, bias, block, s, iw0, W);
      else
        forward_block<T, K, S, W, true, false>(image, rows, bias, block, s, iw0, s.out_w - ow);
    }
  }
}

// channels_last, everything else: one output pixel and one vector of output channels at a time.
template <class T>
void forward_rows_general(const T* x, const Accumulate<T>* weight, const Accumulate<T>* bias, T* y, const Shape& s,
                          int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t out_channels = s.channels * s.multiplier, m = s.multiplier;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t ih0 = item % s.out_h * s.stride_h - s.pad_h;
    const T* image = x + item / s.out_h * s.in_h * s.in_w * s.channels;
    for (int64_t ow = 0; ow < s.out_w; ++ow) {
      const int64_t iw0 = ow * s.stride_w - s.pad_w;
      for (int64_t c = 0; c < out_channels; c += kLanes<A>) {
        const int64_t n = out_channels - c;
        Vec<A> acc = bias ? load_up_to(bias + c, n) : Vec<A>{};
        for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
          const int64_t ih = ih0 + kh * s.dilation_h;
          if (ih < 0 || ih >= s.in_h) continue;
          for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
            const int64_t iw = iw0 + kw * s.dilation_w;
            if (iw < 0 || iw >= s.in_w) continue;
            const T* pixel = image + (ih * s.in_w + iw) * s.channels;
            const Vec<A> v = m == 1 ? load_up_to(pixel + c, n) : gather(pixel, n, [&](int i) { return (c + i) / m; });
            acc += v * load_up_to(weight + (kh * s.kernel_w + kw) * out_channels + c, n);
          }
        }
        store_up_to(y + (item * s.out_w + ow) * out_channels + c, acc, n);
      }
    }
  }
}

// NCHW: one plane at a time, vectors run along the row.
template <class T>
void forward_planes(const T* x, const Accumulate<T>* weight, const Accumulate<T>* bias, T* y, const Shape& s,
                    Accumulate<T>* scratch, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const UnfoldedBand band(s, kLanes<A>);
  const int64_t out_channels = s.channels * s.multiplier;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / out_channels, co = item % out_channels;
    const T* plane = x + (n * s.channels + co / s.multiplier) * s.in_h * s.in_w;
    T* out = y + item * s.out_h * s.out_w;
    for (int64_t oh0 = 0; oh0 < s.out_h; oh0 += band.out_rows) {
      band.fill(plane, scratch, oh0, s);
      for (int64_t oh = oh0; oh < min_of(oh0 + band.out_rows, s.out_h); ++oh)
        for (int64_t ow = 0; ow < s.out_w; ow += kLanes<A>) {
          Vec<A> acc = splat(bias ? bias[co] : A(0));
          for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
            const A* row = scratch + ((oh - oh0) * s.stride_h + kh * s.dilation_h) * s.stride_w * band.columns + ow;
            for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
              const Tap tap = tap_of(kw, s.dilation_w, s.stride_w);
              acc += splat(weight[(kh * s.kernel_w + kw) * out_channels + co]) *
                     load(row + tap.phase * band.columns + tap.quotient);
            }
          }
          store_up_to(out + oh * s.out_w + ow, acc, s.out_w - ow);
        }
    }
  }
}

template <class T> int64_t forward_scratch(const Shape& s) {
  return s.channels_last ? 0 : UnfoldedBand(s, kLanes<Accumulate<T>>).elements(s);
}

template <class T>
void forward(const T* x, const Accumulate<T>* weight, const Accumulate<T>* bias, T* y, const Shape& s,
             Accumulate<T>* scratch, int64_t begin, int64_t end) {
  if (!s.channels_last) return forward_planes(x, weight, bias, y, s, scratch, begin, end);
  if constexpr (sizeof(T) < sizeof(double))  // float64 is for checking gradients, not for speed
    switch (fast_path<T>(s)) {
      case kFast<3, 1>: return forward_rows<T, 3, 1>(x, weight, bias, y, s, begin, end);
      case kFast<3, 2>: return forward_rows<T, 3, 2>(x, weight, bias, y, s, begin, end);
      case kFast<5, 1>: return forward_rows<T, 5, 1>(x, weight, bias, y, s, begin, end);
      case kFast<5, 2>: return forward_rows<T, 5, 2>(x, weight, bias, y, s, begin, end);
      case kFast<7, 1>: return forward_rows<T, 7, 1>(x, weight, bias, y, s, begin, end);
      case kFast<7, 2>: return forward_rows<T, 7, 2>(x, weight, bias, y, s, begin, end);
      case kFast<3, 1, true>: return forward_rows<T, 3, 1, true>(x, weight, bias, y, s, begin, end);
      case kFast<3, 2, true>: return forward_rows<T, 3, 2, true>(x, weight, bias, y, s, begin, end);
      default: break;
    }
  forward_rows_general(x, weight, bias, y, s, begin, end);
}

}  // namespace

extern const DepthwiseConv2dForwardTable depthwise_conv2d_forward_table;
const DepthwiseConv2dForwardTable depthwise_conv2d_forward_table = {{forward_scratch<float>, forward<float>},
                                                                    {forward_scratch<bfloat16>, forward<bfloat16>},
                                                                    {forward_scratch<double>, forward<double>}};

}  // namespace fastslim::FASTSLIM_ISA
