// Storage types of 16 bits, and the type each data type is accumulated in.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTSLIM_HOST_DEVICE __host__ __device__
#else
#define FASTSLIM_HOST_DEVICE
#endif

namespace fastslim {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T> struct AccumulateOf {
  using type = float;
};
template <> struct AccumulateOf<double> {
  using type = double;
};
template <class T> using Accumulate = typename AccumulateOf<T>::type;

// `static`: each instruction set keeps its own copy.
FASTSLIM_HOST_DEVICE static inline float to_accumulate(float v) { return v; }
FASTSLIM_HOST_DEVICE static inline double to_accumulate(double v) { return v; }
FASTSLIM_HOST_DEVICE static inline float to_accumulate(bfloat16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
FASTSLIM_HOST_DEVICE static inline float to_accumulate(float16 v) {
  float f;
#ifdef __CUDA_ARCH__
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
#else
  uint32_t bits = uint32_t(v.bits & 0x7fffu) << 13;
  std::memcpy(&f, &bits, 4);
  f *= 0x1p112f;  // the difference of the exponents' biases; right for subnormal numbers, too
  std::memcpy(&bits, &f, 4);
  if ((v.bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;  // infinity and NaN
  bits |= uint32_t(v.bits & 0x8000u) << 16;
  std::memcpy(&f, &bits, 4);
#endif
  return f;
}
FASTSLIM_HOST_DEVICE static inline void from_accumulate(float v, float* p) { *p = v; }
FASTSLIM_HOST_DEVICE static inline void from_accumulate(double v, double* p) { *p = v; }
FASTSLIM_HOST_DEVICE static inline void from_accumulate(float v, bfloat16* p) {  // round to nearest even; NaN stays NaN
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(v));
#else
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  p->bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
FASTSLIM_HOST_DEVICE static inline void from_accumulate(float v, float16* p) {  // as above
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(v));
#else
  uint32_t bits, sign;
  std::memcpy(&bits, &v, 4);
  sign = bits & 0x80000000u;
  bits ^= sign;
  uint16_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00;  // NaN
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00;                  // rounds to infinity
  } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    half = uint16_t(bits - 0x3f000000u);
  } else {
    half = uint16_t((bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13);
  }
  p->bits = uint16_t(half | (sign >> 16));
#endif
}

}  // namespace fastslim
