// Depthwise convolution, forward.
#include "depthwise_conv2d_stream.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

// channels_last, kernel width K, stride S.
template <class T, int K, int S>
void forward_rows(const T* x, const float* weight, const float* bias, T* y, const Shape& s, float* scratch,
                  int64_t begin, int64_t end) {
  arrange<T>(weight, K * K, s.channels, false, scratch);
  float* arranged_bias = bias ? scratch + arranged_elements(K * K, s.channels) : nullptr;
  if (bias) arrange<T>(bias, 1, s.channels, false, arranged_bias);
  stream<T, K, S>(x, scratch, arranged_bias, y, {s.in_h, s.in_w, s.out_h, s.out_w, s.pad_h, s.pad_w}, s.channels, begin,
                  end);
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
  if (s.channels_last) return fast_path(s) ? arranged_elements(s.kernel_h * s.kernel_w + 1, s.channels) : 0;
  return UnfoldedBand(s, kLanes<Accumulate<T>>).elements(s);
}

template <class T>
void forward(const T* x, const Accumulate<T>* weight, const Accumulate<T>* bias, T* y, const Shape& s,
             Accumulate<T>* scratch, int64_t begin, int64_t end) {
  if (!s.channels_last) return forward_planes(x, weight, bias, y, s, scratch, begin, end);
  if constexpr (sizeof(T) < sizeof(double))  // float64 is for checking gradients, not for speed
    switch (fast_path(s)) {
      case kFast<3, 1>: return forward_rows<T, 3, 1>(x, weight, bias, y, s, scratch, begin, end);
      case kFast<3, 2>: return forward_rows<T, 3, 2>(x, weight, bias, y, s, scratch, begin, end);
      case kFast<5, 1>: return forward_rows<T, 5, 1>(x, weight, bias, y, s, scratch, begin, end);
      case kFast<5, 2>: return forward_rows<T, 5, 2>(x, weight, bias, y, s, scratch, begin, end);
      case kFast<7, 1>: return forward_rows<T, 7, 1>(x, weight, bias, y, s, scratch, begin, end);
      case kFast<7, 2>: return forward_rows<T, 7, 2>(x, weight, bias, y, s, scratch, begin, end);
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
