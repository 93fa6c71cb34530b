// slim_conv2d: batch c_in c_out in_h in_w kernel_h kernel_w stride_h stride_w pad_h pad_w dilation_h dilation_w
// gap wide channels_last seed. `gap` inactive channels lie between two segments, `wide` after those of x.
#include <cstring>

#include "driver.h"
#include "fastslim/isa.h"
#include "fastslim/slim_conv2d.h"

FASTSLIM_DEFINE_DISPATCH(SlimConv2dFloatTable, slim_conv2d_float)
FASTSLIM_DEFINE_DISPATCH(SlimConv2dBfloat16Table, slim_conv2d_bfloat16)

namespace fastslim {
namespace {

void in_pieces(int64_t items, void* context, void (*body)(void*, int64_t, int64_t)) {
  in_two_pieces(items, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// A 64-byte aligned block of exactly the bytes that were asked for, of any content.
struct Scratch {
  void* data;
  explicit Scratch(int64_t bytes) : data(nullptr) {
    if (bytes > 0 && posix_memalign(&data, 64, size_t(bytes)) == 0) std::memset(data, 0xff, size_t(bytes));
  }
  ~Scratch() { std::free(data); }
};

template <class T>
void check(const SlimConv2dShape& s, int64_t gap, bool channels_last, Random random, const SlimConv2dTable<T>& table) {
  const int64_t taps = s.kernel_h * s.kernel_w, full_in = s.c_in + gap, full_out = s.c_out + 1, first = s.c_in / 2;
  const int64_t in_pixels = s.batch * s.in_h * s.in_w, out_pixels = s.batch * s.out_h * s.out_w;
  // The last pixel of a prefix of wider pixels ends with its active channels.
  Input<T> x((in_pixels - 1) * s.x_pixel + s.c_in, random), gy(out_pixels * s.c_out, random);
  Input<float> weight(full_out * full_in * taps, random), bias(s.c_out, random);
  Output<T> y(out_pixels * s.c_out), gx(in_pixels * s.c_in), added_x(in_pixels * s.c_in);
  Output<float> gw(full_out * full_in * taps), added(full_out * full_in * taps);
  added.fill(2), added_x.fill(2);
  const int64_t segments[] = {0, first, first + gap, s.c_in - first};
  const int64_t stride_in = channels_last ? 1 : taps, stride_tap = channels_last ? full_in : 1;
  const auto view = [&](auto* data) {
    return SlimConv2dWeight<std::remove_pointer_t<decltype(data)>>{
        data, full_in * taps, stride_in, stride_tap * s.kernel_w, stride_tap, segments, 2};
  };
  const auto tap_of = [&](int64_t o, int64_t i, int64_t k) {
    return o * full_in * taps + (i < first ? i : i + gap) * stride_in + k * stride_tap;
  };
  for (int64_t p = 0; p + 1 < in_pixels; ++p)  // inactive channels and weights must never be multiplied
    for (int64_t i = s.c_in; i < s.x_pixel; ++i) x.set(p * s.x_pixel + i, std::nan(""));
  for (int64_t o = 0; o < full_out; ++o)
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t i = 0; i < full_in; ++i)
        if (o == s.c_out || (i >= first && i < first + gap))
          weight.set(o * full_in * taps + i * stride_in + k * stride_tap, std::nan(""));

  const SlimConv2dParallel parallel = {in_pieces};
  const float* const w = weight.data();
  table.forward.run(x.data(), view(w), bias.data(), y.data(), s, Scratch(table.forward.scratch_bytes(s)).data,
                    parallel);
  table.backward_input.run(gy.data(), view(w), gx.data(), false, s, Scratch(table.backward_input.scratch_bytes(s)).data,
                           parallel);
  table.backward_input.run(gy.data(), view(w), added_x.data(), true, s,
                           Scratch(table.backward_input.scratch_bytes(s)).data, parallel);
  table.backward_weight.run(gy.data(), x.data(), view(gw.data()), false, s,
                            Scratch(table.backward_weight.scratch_bytes(s)).data, parallel);
  table.backward_weight.run(gy.data(), x.data(), view(added.data()), true, s,
                            Scratch(table.backward_weight.scratch_bytes(s)).data, parallel);

  // Naive loops over the definition, with the weight as the kernels round it.
  Buffer<T> rounded(weight.size());
  for (int64_t i = 0; i < weight.size(); ++i) rounded.set(i, weight[i]);
  Buffer<double> y_sum(y.size()), gx_sum(gx.size()), gw_sum(gw.size());
  y_sum.fill(0), gx_sum.fill(0), gw_sum.fill(0);
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t oh = 0; oh < s.out_h; ++oh)
      for (int64_t ow = 0; ow < s.out_w; ++ow)
        for (int64_t k = 0; k < taps; ++k) {
          const int64_t ih = oh * s.stride_h - s.pad_h + k / s.kernel_w * s.dilation_h;
          const int64_t iw = ow * s.stride_w - s.pad_w + k % s.kernel_w * s.dilation_w;
          if (ih < 0 || ih >= s.in_h || iw < 0 || iw >= s.in_w) continue;
          const int64_t in = (n * s.in_h + ih) * s.in_w + iw, out = (n * s.out_h + oh) * s.out_w + ow;
          for (int64_t o = 0; o < s.c_out; ++o)
            for (int64_t i = 0; i < s.c_in; ++i) {
              const int64_t tap = tap_of(o, i, k), a = out * s.c_out + o, b = in * s.c_in + i;
              y_sum.set(a, y_sum[a] + rounded[tap] * x[in * s.x_pixel + i]);
              gx_sum.set(b, gx_sum[b] + rounded[tap] * gy[a]);
              gw_sum.set(tap, gw_sum[tap] + gy[a] * x[in * s.x_pixel + i]);
            }
        }
  const double of_y = double(taps * s.c_in + 1), of_x = double(taps * s.c_out), of_w = double(out_pixels + 2);
  for (int64_t i = 0; i < y.size(); ++i) expect_near("y", i, y[i], y_sum[i] + bias[i % s.c_out], kEpsilon<T> * of_y);
  for (int64_t i = 0; i < gx.size(); ++i) expect_near("grad_x", i, gx[i], gx_sum[i], kEpsilon<T> * of_x);
  for (int64_t i = 0; i < gx.size(); ++i)
    expect_near("added grad_x", i, added_x[i], gx_sum[i] + 2, kEpsilon<T> * (of_x + 1));
  for (int64_t o = 0; o < full_out; ++o)
    for (int64_t i = 0; i < full_in; ++i)
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t tap = o * full_in * taps + i * stride_in + k * stride_tap;
        if (o == s.c_out || (i >= first && i < first + gap)) {
          if (!std::isnan(gw[tap]) || added[tap] != 2) expect_near("inactive weight", tap, gw[tap], 0, -1);
          continue;
        }
        expect_near("grad_weight", tap, gw[tap], gw_sum[tap], 2 * kEpsilon<float> * of_w);
        expect_near("added grad_weight", tap, added[tap], gw_sum[tap] + 2, 2 * kEpsilon<float> * of_w);
      }
}

}  // namespace

void check_slim_conv2d(const char* dtype, std::istream& line) {
  SlimConv2dShape s{};
  int64_t gap = 0, wide = 0;
  bool channels_last = false;
  Random random{};
  line >> s.batch >> s.c_in >> s.c_out >> s.in_h >> s.in_w >> s.kernel_h >> s.kernel_w >> s.stride_h >> s.stride_w >>
      s.pad_h >> s.pad_w >> s.dilation_h >> s.dilation_w >> gap >> wide >> channels_last >> random.state;
  s.out_h = (s.in_h + 2 * s.pad_h - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  s.out_w = (s.in_w + 2 * s.pad_w - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  s.x_pixel = s.c_in + wide;
  if (std::strcmp(dtype, "bf16"))
    check<float>(s, gap, channels_last, random, slim_conv2d_float().f);
  else if (slim_conv2d_bfloat16().usable())
    check<bfloat16>(s, gap, channels_last, random, slim_conv2d_bfloat16().b);
}

}  // namespace fastslim
