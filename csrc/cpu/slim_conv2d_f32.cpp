// The float32 convolutions.
#include "fastslim/slim_conv2d.h"
#include "vec.h"

namespace fastslim::FASTSLIM_ISA {
namespace {
using Shape = SlimConv2dShape;

template <class Body> void naive(const Shape& s, const int64_t* segments, int64_t num, Body body) {
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t oh = 0; oh < s.out_h; ++oh)
      for (int64_t ow = 0; ow < s.out_w; ++ow)
        for (int64_t kh = 0; kh < s.kernel_h; ++kh)
          for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
            const int64_t ih = oh * s.stride_h - s.pad_h + kh * s.dilation_h;
            const int64_t iw = ow * s.stride_w - s.pad_w + kw * s.dilation_w;
            if (ih < 0 || ih >= s.in_h || iw < 0 || iw >= s.in_w) continue;
            const int64_t in = (n * s.in_h + ih) * s.in_w + iw, out = (n * s.out_h + oh) * s.out_w + ow;
            int64_t i = 0;
            for (int64_t k = 0; k < num; ++k)
              for (int64_t j = 0; j < segments[2 * k + 1]; ++j, ++i)
                for (int64_t o = 0; o < s.c_out; ++o) body(in, out, i, segments[2 * k] + j, o, kh, kw);
          }
}
int64_t none(const Shape&) { return 0; }
void forward(const float* x, const SlimConv2dWeight<const float>& w, const float* bias, float* y, const Shape& s, void*,
             const SlimConv2dParallel&) {
  for (int64_t p = 0; p < s.batch * s.out_h * s.out_w; ++p)
    for (int64_t o = 0; o < s.c_out; ++o) y[p * s.c_out + o] = bias ? bias[o] : 0;
  naive(s, w.segments, w.num_segments,
        [&](int64_t in, int64_t out, int64_t i, int64_t c, int64_t o, int64_t kh, int64_t kw) {
          y[out * s.c_out + o] +=
              x[in * s.x_pixel + i] * w.data[o * w.stride_out + c * w.stride_in + kh * w.stride_h + kw * w.stride_w];
        });
}
void backward_input(const float* gy, const SlimConv2dWeight<const float>& w, float* gx, const Shape& s, void*,
                    const SlimConv2dParallel&) {
  for (int64_t p = 0; p < s.batch * s.in_h * s.in_w * s.c_in; ++p) gx[p] = 0;
  naive(s, w.segments, w.num_segments,
        [&](int64_t in, int64_t out, int64_t i, int64_t c, int64_t o, int64_t kh, int64_t kw) {
          gx[in * s.c_in + i] +=
              gy[out * s.c_out + o] * w.data[o * w.stride_out + c * w.stride_in + kh * w.stride_h + kw * w.stride_w];
        });
}
void backward_weight(const float* gy, const float* x, const SlimConv2dWeight<float>& w, bool add, const Shape& s, void*,
                     const SlimConv2dParallel&) {
  for (int64_t k = 0; k < w.num_segments && !add; ++k)
    for (int64_t j = 0; j < w.segments[2 * k + 1]; ++j)
      for (int64_t o = 0; o < s.c_out; ++o)
        for (int64_t kh = 0; kh < s.kernel_h; ++kh)
          for (int64_t kw = 0; kw < s.kernel_w; ++kw)
            w.data[o * w.stride_out + (w.segments[2 * k] + j) * w.stride_in + kh * w.stride_h + kw * w.stride_w] = 0;
  naive(s, w.segments, w.num_segments,
        [&](int64_t in, int64_t out, int64_t i, int64_t c, int64_t o, int64_t kh, int64_t kw) {
          w.data[o * w.stride_out + c * w.stride_in + kh * w.stride_h + kw * w.stride_w] +=
              gy[out * s.c_out + o] * x[in * s.x_pixel + i];
        });
}
}  // namespace

extern const SlimConv2dFloatTable slim_conv2d_float_table;
const SlimConv2dFloatTable slim_conv2d_float_table = {
    {{none, forward}, {none, backward_input}, {none, backward_weight}}};

}  // namespace fastslim::FASTSLIM_ISA
