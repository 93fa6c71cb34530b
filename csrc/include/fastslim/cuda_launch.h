// What kernel files need of CUDA, so that the host compiler can run them too (tests/cuda_emulation/).
// For csrc/cuda/ only: bindings are compiled without CUDA's language.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>

#include "fastslim/scalar.h"

#ifdef __CUDACC__
#define FASTSLIM_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
// Dynamic shared memory of a kernel; every use names the same array of 16-byte aligned bytes.
#define FASTSLIM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// Type of a large kernel argument that threads index and never copy.
#define FASTSLIM_GRID_CONSTANT(type) const __grid_constant__ type
#else
#define FASTSLIM_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  emulation::launch(grid, block, shared_bytes, stream, [&] { kernel(__VA_ARGS__); })
#define FASTSLIM_DYNAMIC_SHARED(name) unsigned char* const name = emulation::dynamic_shared()
#define FASTSLIM_GRID_CONSTANT(type) const type&
#endif
#define FASTSLIM_LAUNCH(kernel, grid, block, stream, ...) \
  FASTSLIM_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)

namespace fastslim {

// N values that one thread loads or stores at once; 16 bytes are the widest access.
template <class T, int N> struct alignas(sizeof(T) * N) Vector {
  T v[N];
};
template <class T> constexpr int kVector = 16 / int(sizeof(T));

// The N values at p, which is aligned to all of them, in the accumulation type.
template <int N, class T> __device__ static inline void load(const T* p, Accumulate<T> (&out)[N]) {
  const Vector<T, N> vector = *reinterpret_cast<const Vector<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_accumulate(vector.v[i]);
}

template <int N, class T> __device__ static inline void store(T* p, const Accumulate<T> (&values)[N]) {
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) from_accumulate(values[i], &vector.v[i]);
  *reinterpret_cast<Vector<T, N>*>(p) = vector;
}

// A pointer read from memory: tells the compiler that it leads to global memory, for LDG instead of LD.
template <class T> __device__ static inline T* in_global(T* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

constexpr int kWarpSize = 32;

// The block's sum of `value`, valid in thread 0, always added in the same order: a tree inside each
// warp, then one over the warps. All threads of a block of whole warps must call it.
template <int Threads, class A> __device__ static inline A block_sum(A value) {
  __shared__ A of_warp[Threads / kWarpSize];
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    value = int(threadIdx.x) < Threads / kWarpSize ? of_warp[threadIdx.x] : A(0);
    for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  }
  __syncthreads();  // of_warp may be used again
  return value;
}

}  // namespace fastslim
