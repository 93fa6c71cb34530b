// Portable vectors (GCC and clang vector extensions): `Vec<float>` fills one register of the
// instruction set this file is compiled for. bf16 is computed in float.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "fastslim/scalar.h"

#ifndef FASTSLIM_ISA
#define FASTSLIM_ISA baseline
#endif
#ifndef FASTSLIM_VECTOR_BYTES
#define FASTSLIM_VECTOR_BYTES 16
#endif

namespace fastslim::FASTSLIM_ISA {
namespace {  // internal linkage: the linker must never merge code of two instruction sets

template <class T> struct VecTraits;
template <> struct VecTraits<float> {
  typedef float vec __attribute__((vector_size(FASTSLIM_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(FASTSLIM_VECTOR_BYTES)));
};
template <> struct VecTraits<double> {
  typedef double vec __attribute__((vector_size(FASTSLIM_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(FASTSLIM_VECTOR_BYTES)));
};
template <class A> using Vec = typename VecTraits<A>::vec;
template <class A> using Mask = typename VecTraits<A>::mask;
template <class A> constexpr int kLanes = FASTSLIM_VECTOR_BYTES / sizeof(A);

constexpr int kFloatLanes = kLanes<float>;
typedef uint32_t U32 __attribute__((vector_size(FASTSLIM_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(FASTSLIM_VECTOR_BYTES / 2)));

// Less zero, which is nothing to compute; plus zero is, as it makes 0 of -0.
template <class A> inline Vec<A> splat(A value) { return value - Vec<A>{}; }

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// 16-bit lanes to and from 32-bit ones: compilers make several shuffles of __builtin_convertvector.
#if defined(__AVX512BW__)
inline U32 widen(U16 v) { return (U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
inline U16 narrow(U32 v) { return (U16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v); }
#elif defined(__AVX2__)
inline U32 widen(U16 v) { return (U32)_mm256_cvtepu16_epi32((__m128i)v); }
inline U16 narrow(U32 v) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (U16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
inline U32 widen(U16 v) { return __builtin_convertvector(v, U32); }
inline U16 narrow(U32 v) { return __builtin_convertvector(v, U16); }
#endif

inline Vec<float> from_bfloat16(U16 half) {
  const U32 wide = widen(half) << 16;
  Vec<float> v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}
inline Vec<float> load(const bfloat16* p) {
  U16 half;
  std::memcpy(&half, p, sizeof half);
  return from_bfloat16(half);
}

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
// Round to nearest even; NaN stays NaN.
#if defined(__AVX512BF16__)
// The instruction takes numbers below the smallest normal one for zero.
inline U16 to_bfloat16(Vec<float> v) { return (U16)_mm512_cvtneps_pbh((__m512)v); }
#else
inline U16 to_bfloat16(Vec<float> v) {
  U32 bits;
  std::memcpy(&bits, &v, sizeof v);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow(v != v ? U32{} + 0x7fc0u : rounded);
}
#endif
inline void store(bfloat16* p, Vec<float> v) {
  U16 half = to_bfloat16(v);
  std::memcpy(p, &half, sizeof half);
}

// The first n lanes; lanes beyond are zero on load and untouched in memory on store.
template <class T> inline Vec<Accumulate<T>> load_n(const T* p, int n) {
  T buffer[kLanes<Accumulate<T>>] = {};
  std::memcpy(buffer, p, sizeof(T) * n);
  return load(buffer);
}
template <class T> inline void store_n(T* p, Vec<Accumulate<T>> v, int n) {
  T buffer[kLanes<Accumulate<T>>];
  store(buffer, v);
  std::memcpy(p, buffer, sizeof(T) * n);
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)  // masked: as fast as whole vectors
inline uint32_t lane_mask(int n) { return (1u << n) - 1; }
inline Vec<float> load_n(const float* p, int n) { return (Vec<float>)_mm512_maskz_loadu_ps(lane_mask(n), p); }
inline Vec<double> load_n(const double* p, int n) { return (Vec<double>)_mm512_maskz_loadu_pd(lane_mask(n), p); }
inline Vec<float> load_n(const bfloat16* p, int n) {
  return from_bfloat16((U16)_mm256_maskz_loadu_epi16(lane_mask(n), p));
}
inline void store_n(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, lane_mask(n), (__m512)v); }
inline void store_n(double* p, Vec<double> v, int n) { _mm512_mask_storeu_pd(p, lane_mask(n), (__m512d)v); }
inline void store_n(bfloat16* p, Vec<float> v, int n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), (__m256i)to_bfloat16(v));
}
#endif

// mask ? a : b, lane by lane (a mask is what comparing two vectors gives).
template <class V, class M> inline V select(M mask, V a, V b) { return mask ? a : b; }

// Halves are added, so that sums stay short: exact and quick.
template <class A> inline A sum_lanes(Vec<A> v) {
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int half = kLanes<A> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA
