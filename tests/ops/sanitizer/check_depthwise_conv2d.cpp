// depthwise_conv2d: batch channels multiplier in_h in_w kernel_h kernel_w stride_h stride_w pad_h pad_w
// dilation_h dilation_w channels_last gap seed. `gap` inactive channels lie between two segments.
#include <cstring>

#include "driver.h"
#include "fastslim/depthwise_conv2d.h"
#include "fastslim/isa.h"

FASTSLIM_DEFINE_DISPATCH(DepthwiseConv2dForwardTable, depthwise_conv2d_forward)
FASTSLIM_DEFINE_DISPATCH(DepthwiseConv2dBackwardInputTable, depthwise_conv2d_backward_input)
FASTSLIM_DEFINE_DISPATCH(DepthwiseConv2dBackwardWeightTable, depthwise_conv2d_backward_weight)
FASTSLIM_DEFINE_DISPATCH(DepthwiseConv2dPackingTable, depthwise_conv2d_packing)

namespace fastslim {
namespace {

template <class T>
void check(const DepthwiseConv2dShape& s, int64_t gap, Random random, const DepthwiseConv2dForward<T>& forward,
           const DepthwiseConv2dBackwardInput<T>& backward_input,
           const DepthwiseConv2dBackwardWeight<T>& backward_weight, const DepthwiseConv2dPacking<T>& packing) {
  using A = Accumulate<T>;
  const int64_t m = s.multiplier, outputs = s.channels * m, full = (s.channels + gap) * m;
  const int64_t taps = s.kernel_h * s.kernel_w, first = s.channels / 2;
  Input<T> x(s.batch * s.channels * s.in_h * s.in_w, random), gy(s.batch * outputs * s.out_h * s.out_w, random);
  Input<T> weight(full * taps, random), bias(full, random);
  Output<T> y(s.batch * outputs * s.out_h * s.out_w), gx(s.batch * s.channels * s.in_h * s.in_w);
  const int64_t segments[] = {0, first, first + gap, s.channels - first};
  const DepthwiseConv2dRows rows = {segments, 2, taps, s.kernel_w, 1}, bias_rows = {segments, 2, 1, 0, 0};
  const auto row_of = [&](int64_t co) { return co < first * m ? co : co + gap * m; };

  Output<A> w(taps * outputs), b(outputs);
  packing.pack(weight.data(), rows, s, w.data());
  DepthwiseConv2dShape scalar = s;
  scalar.kernel_h = scalar.kernel_w = 1;
  packing.pack(bias.data(), bias_rows, scalar, b.data());

  Output<A> forward_scratch(forward.scratch(s)), input_scratch(backward_input.scratch(s));
  Output<A> weight_scratch(backward_weight.scratch(s));
  in_two_pieces(depthwise_conv2d_forward_items(s), [&](int64_t begin, int64_t end) {
    forward.run(x.data(), w.data(), b.data(), y.data(), s, forward_scratch.data(), begin, end);
  });
  in_two_pieces(depthwise_conv2d_backward_input_items(s), [&](int64_t begin, int64_t end) {
    backward_input.run(gy.data(), w.data(), gx.data(), s, input_scratch.data(), begin, end);
  });
  Output<A> partial(depthwise_conv2d_chunks(s).count * (taps + 1) * outputs), gw(full * taps), gb(full);
  partial.fill(0);
  in_two_pieces(depthwise_conv2d_backward_weight_items(s), [&](int64_t begin, int64_t end) {
    backward_weight.run(gy.data(), x.data(), partial.data(), true, s, weight_scratch.data(), begin, end);
  });
  packing.merge(partial.data(), gw.data(), false, rows, gb.data(), false, 1, s);

  // Naive loops over the definition.
  const auto at = [&](int64_t n, int64_t c, int64_t h, int64_t column, int64_t channels, int64_t height,
                      int64_t width) {
    return s.channels_last ? ((n * height + h) * width + column) * channels + c
                           : ((n * channels + c) * height + h) * width + column;
  };
  Buffer<double> y_sum(y.size()), gx_sum(gx.size()), gw_sum(gw.size()), gb_sum(gb.size());
  y_sum.fill(0), gx_sum.fill(0), gw_sum.fill(0), gb_sum.fill(0);
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t co = 0; co < outputs; ++co)
      for (int64_t oh = 0; oh < s.out_h; ++oh)
        for (int64_t ow = 0; ow < s.out_w; ++ow) {
          const int64_t out = at(n, co, oh, ow, outputs, s.out_h, s.out_w);
          y_sum.set(out, bias[row_of(co)]);
          gb_sum.set(row_of(co), gb_sum[row_of(co)] + gy[out]);
          for (int64_t k = 0; k < taps; ++k) {
            const int64_t ih = oh * s.stride_h - s.pad_h + k / s.kernel_w * s.dilation_h;
            const int64_t iw = ow * s.stride_w - s.pad_w + k % s.kernel_w * s.dilation_w;
            if (ih < 0 || ih >= s.in_h || iw < 0 || iw >= s.in_w) continue;
            const int64_t in = at(n, co / m, ih, iw, s.channels, s.in_h, s.in_w), tap = row_of(co) * taps + k;
            y_sum.set(out, y_sum[out] + weight[tap] * x[in]);
            gx_sum.set(in, gx_sum[in] + weight[tap] * gy[out]);
            gw_sum.set(tap, gw_sum[tap] + gy[out] * x[in]);
          }
        }
  const double terms = double(taps * m + 1), all = double(s.batch * s.out_h * s.out_w + 1);
  for (int64_t i = 0; i < y.size(); ++i) expect_near("y", i, y[i], y_sum[i], kEpsilon<T> * terms);
  for (int64_t i = 0; i < gx.size(); ++i) expect_near("grad_x", i, gx[i], gx_sum[i], kEpsilon<T> * terms);
  for (int64_t co = 0; co < outputs; ++co) {
    const int64_t row = row_of(co);
    expect_near("grad_bias", row, gb[row], gb_sum[row], kEpsilon<A> * all);
    for (int64_t i = row * taps; i < (row + 1) * taps; ++i)
      expect_near("grad_weight", i, gw[i], gw_sum[i], kEpsilon<A> * all);
  }
  for (int64_t row = first * m; row < (first + gap) * m; ++row)
    if (!std::isnan(gb[row]) || !std::isnan(gw[row * taps])) expect_near("inactive row", row, gb[row], 0, -1);
}

}  // namespace

void check_depthwise_conv2d(const char* dtype, std::istream& line) {
  DepthwiseConv2dShape s{};
  int64_t gap = 0;
  Random random{};
  line >> s.batch >> s.channels >> s.multiplier >> s.in_h >> s.in_w >> s.kernel_h >> s.kernel_w >> s.stride_h >>
      s.stride_w >> s.pad_h >> s.pad_w >> s.dilation_h >> s.dilation_w >> s.channels_last >> gap >> random.state;
  s.out_h = (s.in_h + 2 * s.pad_h - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  s.out_w = (s.in_w + 2 * s.pad_w - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  const auto& forward = depthwise_conv2d_forward();
  const auto& input = depthwise_conv2d_backward_input();
  const auto& weight = depthwise_conv2d_backward_weight();
  const auto& packing = depthwise_conv2d_packing();
  if (!std::strcmp(dtype, "bf16"))
    check<bfloat16>(s, gap, random, forward.bf16, input.bf16, weight.bf16, packing.bf16);
  else if (!std::strcmp(dtype, "f64"))
    check<double>(s, gap, random, forward.float64, input.float64, weight.float64, packing.float64);
  else
    check<float>(s, gap, random, forward.float32, input.float32, weight.float32, packing.float32);
}

}  // namespace fastslim
