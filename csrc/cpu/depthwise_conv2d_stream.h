// channels_last, a square kernel of width K and stride S, dilation 1, one filter a channel: rows of outputs are made
// while the input's columns stream by. A loaded vector of channels serves every output it touches, in two rows.
#pragma once
#include "depthwise_conv2d_lanes.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

struct Extent {
  int64_t in_h, in_w, out_h, out_w, pad_h, pad_w;
};

// R rows of outputs, y and the next, of the channels from c. rows: those of the input, null where they lie in the
// padding. Sums run over columns, then rows, whatever R.
template <class T, class Lanes, int K, int S, int R>
FASTSLIM_ALWAYS_INLINE void stream_rows(const T* const (&rows)[K + (R - 1) * S], const float* weight, const float* bias,
                                        T* y, const Extent& e, int64_t channels) {
  using V = typename Lanes::V;
  constexpr int J = (K + S - 1) / S;  // outputs of a row that are being summed
  constexpr int kRows = K + (R - 1) * S;
  V acc[R][J] = {};
  const auto step = [&](int64_t t, auto edge) FASTSLIM_LAMBDA_INLINE {
    constexpr bool kEdge = decltype(edge)::value;
    for (int r = 0; r < R; ++r) {
      for (int j = J - 1; j > 0; --j) acc[r][j] = acc[r][j - 1];
      acc[r][0] = V{};
    }
#pragma GCC unroll 2
    for (int q = 0; q < S; ++q) {
      const int64_t iw = t * S - e.pad_w + q;
      if (kEdge && (iw < 0 || iw >= e.in_w)) continue;
#pragma GCC unroll 16
      for (int u = 0; u < kRows; ++u) {
        if (!rows[u]) continue;
        const V v = Lanes::load(rows[u] + iw * channels, channels);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
          for (int j = 0; j < J; ++j)
            if (u >= r * S && u - r * S < K && q + S * j < K)
              multiply_add(acc[r][j], v,
                           load_arranged<Lanes>(weight + ((u - r * S) * K + q + S * j) * Pairs::kChannels));
      }
    }
    const int64_t ow = t - (J - 1);
    if (!kEdge || ow >= 0)
      for (int r = 0; r < R; ++r) {
        if (bias) add(acc[r][J - 1], load_arranged<Lanes>(bias));
        Lanes::store(y + (r * e.out_w + ow) * channels, acc[r][J - 1], channels);
      }
  };
  const int64_t end = e.out_w + J - 1;
  const int64_t first = min_of(end, max_of(J - 1, ceil_div(e.pad_w, S)));
  const int64_t last = max_of(first, min_of(end, floor_div(e.in_w + e.pad_w, S)));
  for (int64_t t = 0; t < first; ++t) step(t, Constant<true>{});
  for (int64_t t = first; t < last; ++t) step(t, Constant<false>{});
  for (int64_t t = last; t < end; ++t) step(t, Constant<true>{});
}

template <class T, int K, int S, int R>
void stream_blocks(const T* image, const float* weight, const float* bias, T* y, const Extent& e, int64_t channels,
                   int64_t oh) {
  const T* rows[K + (R - 1) * S];
  for (int u = 0; u < K + (R - 1) * S; ++u) {
    const int64_t ih = oh * S - e.pad_h + u;
    rows[u] = ih >= 0 && ih < e.in_h ? image + ih * e.in_w * channels : nullptr;
  }
  int64_t index = 0;
  for_each_block(0, channels, [&](auto lanes, int64_t c, int64_t) {
    using Lanes = decltype(lanes);
    const T* shifted[K + (R - 1) * S];
    for (int u = 0; u < K + (R - 1) * S; ++u) shifted[u] = rows[u] ? rows[u] + c : nullptr;
    stream_rows<T, Lanes, K, S, R>(shifted, weight + index * K * K * Pairs::kChannels,
                                   bias ? bias + index * Pairs::kChannels : nullptr, y + c, e, channels);
    ++index;
  });
}

// The rows of outputs [begin, end) of all images. weight, bias: arranged.
template <class T, int K, int S>
void stream(const T* x, const float* weight, const float* bias, T* y, const Extent& e, int64_t channels, int64_t begin,
            int64_t end) {
  constexpr int kSums = 2 * ((K + S - 1) / S), kRegisters = FASTSLIM_VECTOR_BYTES == 64 ? 32 : 16;
  constexpr int R = K < 7 && 2 * kSums + 4 <= kRegisters ? 2 : 1;  // sums of two rows, if the registers hold them
  for (int64_t item = begin; item < end;) {
    const int64_t oh = item % e.out_h;
    const T* image = x + item / e.out_h * e.in_h * e.in_w * channels;
    T* out = y + item * e.out_w * channels;
    if (R == 2 && oh + 2 <= e.out_h && item + 2 <= end) {
      stream_blocks<T, K, S, R>(image, weight, bias, out, e, channels, oh);
      item += R;
    } else {
      stream_blocks<T, K, S, 1>(image, weight, bias, out, e, channels, oh);
      ++item;
    }
  }
}

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA
