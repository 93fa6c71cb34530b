// bf16 storage and the type each data type is accumulated in.
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
FASTSLIM_HOST_DEVICE static inline void from_accumulate(float v, float* p) { *p = v; }
FASTSLIM_HOST_DEVICE static inline void from_accumulate(double v, double* p) { *p = v; }
FASTSLIM_HOST_DEVICE static inline void from_accumulate(float v, bfloat16* p) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  p->bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace fastslim
