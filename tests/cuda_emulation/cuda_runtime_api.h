// Runs CUDA kernels on the CPU, in place of CUDA's own header: just enough of it for csrc/cuda/.
// Blocks run one after the other; the threads of a block are fibres that switch at __syncthreads and
// warp shuffles, so a barrier that not all threads reach is found ("deadlock"), as is a shuffle.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __device__ [[maybe_unused]]
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel> static inline cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

enum class Waits { nowhere, at_warp, at_block, done };

struct Fibre {
  ucontext_t context;  // enters the thread; later switches are jumps, which cost no system call
  jmp_buf jump;
  bool started;
  std::unique_ptr<char[]> stack;
  Waits waits;
  uint64_t shuffled;
};

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;
inline std::vector<Fibre> fibres;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline unsigned current;

[[gnu::noinline]] inline void resume(Fibre& fibre) {
  if (_setjmp(scheduler)) return;
  if (fibre.started) _longjmp(fibre.jump, 1);
  fibre.started = true;
  setcontext(&fibre.context);
}

[[gnu::noinline]] inline void wait(Waits where) {
  fibres[current].waits = where;
  if (!_setjmp(fibres[current].jump)) _longjmp(scheduler, 1);
}

inline void thread_main() {
  kernel();
  fibres[current].waits = Waits::done;
  _longjmp(scheduler, 1);
}

// Frees the threads [begin, end) if all that are not done wait at `where`.
inline bool release(unsigned begin, unsigned end, Waits where) {
  bool any = false;
  for (unsigned i = begin; i < end; ++i) {
    if (fibres[i].waits == Waits::done) continue;
    if (fibres[i].waits != where) return false;
    any = true;
  }
  for (unsigned i = begin; any && i < end; ++i)
    if (fibres[i].waits == where) fibres[i].waits = Waits::nowhere;
  return any;
}

inline void run_block() {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  while (fibres.size() < threads) fibres.emplace_back(), fibres.back().stack.reset(new char[kStack]);
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    fibre.waits = Waits::nowhere, fibre.started = false;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    makecontext(&fibre.context, thread_main, 0);
  }
  for (unsigned done = 0; done < threads;) {
    done = 0;
    for (current = 0; current < threads; ++current) {
      if (fibres[current].waits == Waits::nowhere) {
        threadIdx = {current % blockDim.x, current / blockDim.x % blockDim.y, current / blockDim.x / blockDim.y};
        resume(fibres[current]);
      }
      done += fibres[current].waits == Waits::done;
    }
    bool moved = done == threads;
    for (unsigned warp = 0; warp < threads; warp += kWarp)
      moved |= release(warp, warp + kWarp < threads ? warp + kWarp : threads, Waits::at_warp);
    if (!moved && !release(0, threads, Waits::at_block)) {
      std::fprintf(stderr, "emulation: deadlock: some threads wait at a barrier that others never reach\n");
      std::abort();
    }
  }
}

// What a kernel launched with dynamic shared memory sees: NaN in every type, until it writes.
inline std::vector<uint4> shared;
inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(shared.data()); }

template <class Body> void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const Body& body) {
  kernel = body;
  gridDim = grid, blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        shared.assign((shared_bytes + sizeof(uint4) - 1) / sizeof(uint4), {~0u, ~0u, ~0u, ~0u});
        blockIdx = {x, y, z}, run_block();
      }
}

// Gives each thread's value to the lane that asks for it; every thread of the warp must take part.
template <class T> T exchange(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move 4 or 8 bytes");
  const unsigned self = current, warp = self / kWarp * kWarp;
  const dim3 index = threadIdx;
  std::memcpy(&fibres[self].shuffled, &value, sizeof(T));
  wait(Waits::at_warp);
  if (lane < kWarp && warp + lane < fibres.size()) std::memcpy(&value, &fibres[warp + lane].shuffled, sizeof(T));
  wait(Waits::at_warp);  // nobody may write its next value before all have read this one
  threadIdx = index;
  return value;
}

}  // namespace emulation

static inline void __syncthreads() {
  const dim3 index = threadIdx;
  emulation::wait(emulation::Waits::at_block);
  threadIdx = index;
}
template <class T> static inline T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return emulation::exchange(value, emulation::current % emulation::kWarp + delta);
}
template <class T> static inline T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return emulation::exchange(value, (emulation::current % emulation::kWarp) ^ mask);
}
template <class T> static inline T __shfl_sync(unsigned, T value, unsigned lane) {
  return emulation::exchange(value, lane % emulation::kWarp);
}
static inline void __syncwarp(unsigned = ~0u) { emulation::exchange(0, emulation::current % emulation::kWarp); }
