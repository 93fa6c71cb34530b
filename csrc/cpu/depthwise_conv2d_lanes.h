// The channels that the channels_last kernels take at a time: two vectors, one, or a part of one.
#pragma once
#include "depthwise_conv2d_common.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

// Two vectors of channels. float32: one behind the other. bfloat16: the even and the odd channels, because a shift
// and a mask make them of one register, where lanes in order cost twice as much to widen.
struct Two {
  Vec<float> a, b;
};

FASTSLIM_ALWAYS_INLINE void multiply_add(Two& sum, const Two& v, const Two& w) {
  sum.a += v.a * w.a;
  sum.b += v.b * w.b;
}
FASTSLIM_ALWAYS_INLINE void multiply_add(Vec<float>& sum, const Vec<float>& v, const Vec<float>& w) { sum += v * w; }

FASTSLIM_ALWAYS_INLINE void add(Two& sum, const Two& v) {
  sum.a += v.a;
  sum.b += v.b;
}
FASTSLIM_ALWAYS_INLINE void add(Vec<float>& sum, const Vec<float>& v) { sum += v; }

FASTSLIM_ALWAYS_INLINE U32 rounded_to_bfloat16(Vec<float> v) {
  U32 bits;
  std::memcpy(&bits, &v, sizeof v);
  return v != v ? U32{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

struct Pairs {
  using V = Two;
  static constexpr int kChannels = 2 * kFloatLanes;

  static FASTSLIM_ALWAYS_INLINE V load(const float* p, int64_t) {
    return {fastslim::FASTSLIM_ISA::load(p), fastslim::FASTSLIM_ISA::load(p + kFloatLanes)};
  }
  static FASTSLIM_ALWAYS_INLINE V load(const bfloat16* p, int64_t) {
    U32 bits;
    std::memcpy(&bits, p, sizeof bits);
    const U32 even = bits << 16, odd = bits & 0xffff0000u;
    V v;
    std::memcpy(&v.a, &even, sizeof even);
    std::memcpy(&v.b, &odd, sizeof odd);
    return v;
  }
  static FASTSLIM_ALWAYS_INLINE void store(float* p, const V& v, int64_t) {
    fastslim::FASTSLIM_ISA::store(p, v.a);
    fastslim::FASTSLIM_ISA::store(p + kFloatLanes, v.b);
  }
  static FASTSLIM_ALWAYS_INLINE void store(bfloat16* p, const V& v, int64_t) {
#if defined(__AVX512BF16__)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
#else
    const U32 bits = (rounded_to_bfloat16(v.a) >> 16) | (rounded_to_bfloat16(v.b) & 0xffff0000u);
    std::memcpy(p, &bits, sizeof bits);
#endif
  }
  // Channel i of the pair as T's loads place it.
  template <class T> static constexpr int place(int i) { return sizeof(T) == 2 ? i / 2 + i % 2 * kFloatLanes : i; }
};

struct Single {
  using V = Vec<float>;
  static constexpr int kChannels = kFloatLanes;
  template <class T> static FASTSLIM_ALWAYS_INLINE V load(const T* p, int64_t) {
    return fastslim::FASTSLIM_ISA::load(p);
  }
  template <class T> static FASTSLIM_ALWAYS_INLINE void store(T* p, const V& v, int64_t) {
    fastslim::FASTSLIM_ISA::store(p, v);
  }
  template <class T> static constexpr int place(int i) { return i; }
};

struct Part : Single {  // fewer channels than lanes
  template <class T> static FASTSLIM_ALWAYS_INLINE V load(const T* p, int64_t n) { return load_n(p, int(n)); }
  template <class T> static FASTSLIM_ALWAYS_INLINE void store(T* p, const V& v, int64_t n) { store_n(p, v, int(n)); }
};

// Calls f(lanes, first channel, first channel not taken before) until all channels in [begin, end) are taken;
// `begin` is a multiple of a pair's channels, and vectors may reach back before it.
template <class F> FASTSLIM_ALWAYS_INLINE void for_each_block(int64_t begin, int64_t end, F f) {
  constexpr int64_t pair = Pairs::kChannels, single = Single::kChannels;
  int64_t c = begin;
  for (; c + pair <= end; c += pair) f(Pairs{}, c, c);
  if (end - c > single && end >= pair) return f(Pairs{}, end - pair, c);
  if (end - c > single) f(Single{}, c, c), c += single;
  if (c == end) return;
  if (end >= single)
    f(Single{}, end - single, c);
  else
    f(Part{}, c, c);
}

// Values of a pair in the order of their loads, kept in memory.
template <class Lanes> FASTSLIM_ALWAYS_INLINE typename Lanes::V load_arranged(const float* p) {
  if constexpr (Lanes::kChannels == Pairs::kChannels)
    return Pairs::load(p, 0);
  else
    return load(p);
}

template <class Lanes> FASTSLIM_ALWAYS_INLINE void add_arranged(float* p, const typename Lanes::V& v) {
  if constexpr (Lanes::kChannels == Pairs::kChannels) {
    store(p, load(p) + v.a);
    store(p + kFloatLanes, load(p + kFloatLanes) + v.b);
  } else {
    store(p, load(p) + v);
  }
}

// Packed weights (taps, C) as every block's (taps, 2 * lanes), `flip`ped for the input gradient.
inline int64_t arranged_elements(int64_t taps, int64_t channels) {
  return taps * Pairs::kChannels * (channels / Pairs::kChannels + 2);
}
template <class T> void arrange(const float* packed, int64_t taps, int64_t channels, bool flip, float* out) {
  for_each_block(0, channels, [&](auto lanes, int64_t c, int64_t) {
    using Lanes = decltype(lanes);
    for (int64_t tap = 0; tap < taps; ++tap, out += Pairs::kChannels) {
      const float* from = packed + (flip ? taps - 1 - tap : tap) * channels + c;
      const int n = int(min_of(Lanes::kChannels, channels));
      for (int i = 0; i < n; ++i) out[Lanes::template place<T>(i)] = from[i];
      for (int i = n; i < Lanes::kChannels; ++i) out[i] = 0;
    }
  });
}

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA
