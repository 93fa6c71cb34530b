// Runs CUDA kernels on the CPU, in place of CUDA's own header: just enough of it for csrc/cuda/.
// Blocks run one after the other; the threads of a block are fibres that switch at __syncthreads and
// warp shuffles, so a barrier that not all threads reach is found ("deadlock"), as is a shuffle.
// Between two barriers a warp runs alone, and so does a lane between two shuffles; blocks and
// launches differ in who comes first, so that a missing barrier gives wrong results in some of them.
#pragma once
#include <link.h>
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
#define __shared__ static thread_local  // no other variables are: poison() fills them all
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
  int line;  // of the barrier or shuffle
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

[[gnu::noinline]] inline void wait(Waits where, int line) {
  fibres[current].waits = where, fibres[current].line = line;
  const dim3 index = threadIdx;
  if (!_setjmp(fibres[current].jump)) _longjmp(scheduler, 1);
  threadIdx = index;
}

inline void thread_main() {
  kernel();
  fibres[current].waits = Waits::done;
  _longjmp(scheduler, 1);
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

// Frees the threads [begin, end) if all that are not done wait at `where`.
inline bool release(unsigned begin, unsigned end, Waits where) {
  const Fibre* first = nullptr;
  bool any_done = false;
  for (unsigned i = begin; i < end; ++i) {
    const Fibre& fibre = fibres[i];
    any_done |= fibre.waits == Waits::done;
    if (fibre.waits == Waits::done) continue;
    if (fibre.waits != where) return false;
    if (!first) first = &fibre;
    if (fibre.line != first->line) fail("threads wait at different barriers, or at different shuffles");
  }
  if (!first) return false;
  if (any_done)
    fail(where == Waits::at_warp ? "a shuffle names lanes that have returned"
                                 : "a barrier waits for threads that have returned");
  for (unsigned i = begin; i < end; ++i)
    if (fibres[i].waits == where) fibres[i].waits = Waits::nowhere;
  return true;
}

// Runs the threads [begin, end), of one warp, until each is done or waits for other warps.
inline void run_warp(unsigned begin, unsigned end, bool backwards) {
  do {
    for (unsigned i = begin; i < end; ++i) {
      current = backwards ? begin + end - 1 - i : i;
      if (fibres[current].waits != Waits::nowhere) continue;
      threadIdx = {current % blockDim.x, current / blockDim.x % blockDim.y, current / blockDim.x / blockDim.y};
      resume(fibres[current]);
    }
  } while (release(begin, end, Waits::at_warp));
}

inline void run_block(bool backwards) {
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
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  do {
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned begin = (backwards ? warps - 1 - i : i) * kWarp;
      run_warp(begin, begin + kWarp < threads ? begin + kWarp : threads, backwards);
    }
  } while (release(0, threads, Waits::at_block));
  for (unsigned i = 0; i < threads; ++i)
    if (fibres[i].waits != Waits::done) fail("deadlock: some threads wait at a barrier that others never reach");
}

// What a kernel launched with dynamic shared memory sees: NaN in every type, until it writes.
inline std::vector<uint4> shared;
inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(shared.data()); }

// Fills the static shared memory of this library: NaN in every type, until a block writes.
static thread_local char of_this_library;
static void poison() {
  const auto fill = [](dl_phdr_info* info, size_t, void* here) {
    char* const begin = static_cast<char*>(info->dlpi_tls_data);
    for (int i = 0; begin && i < info->dlpi_phnum; ++i) {
      const size_t bytes = info->dlpi_phdr[i].p_memsz;
      if (info->dlpi_phdr[i].p_type != PT_TLS || here < begin || here >= begin + bytes) continue;
      std::memset(begin, 0xff, bytes);
      return 1;
    }
    return 0;
  };
  of_this_library = 0;  // now this thread has the library's thread-local variables
  if (!dl_iterate_phdr(fill, &of_this_library)) fail("static shared memory is not found");
}

inline unsigned launches;

template <class Body> void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const Body& body) {
  kernel = body;
  gridDim = grid, blockDim = block;
  const unsigned turn = launches++;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t at = turn & 2 ? blocks - 1 - i : i;
    shared.assign((shared_bytes + sizeof(uint4) - 1) / sizeof(uint4), {~0u, ~0u, ~0u, ~0u});
    poison();
    blockIdx = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
    run_block((turn + i) & 1);
  }
}

// Gives each thread's value to the lane that asks for it; every thread of the warp must take part.
template <class T> T exchange(T value, unsigned lane, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move 4 or 8 bytes");
  const unsigned self = current, warp = self / kWarp * kWarp;
  std::memcpy(&fibres[self].shuffled, &value, sizeof(T));
  wait(Waits::at_warp, line);
  if (lane < kWarp && warp + lane < fibres.size()) std::memcpy(&value, &fibres[warp + lane].shuffled, sizeof(T));
  wait(Waits::at_warp, line);  // nobody may write its next value before all have read this one
  return value;
}

}  // namespace emulation

static inline void __syncthreads(int line = __builtin_LINE()) { emulation::wait(emulation::Waits::at_block, line); }
template <class T> static inline T __shfl_down_sync(unsigned, T value, unsigned delta, int line = __builtin_LINE()) {
  return emulation::exchange(value, emulation::current % emulation::kWarp + delta, line);
}
template <class T> static inline T __shfl_xor_sync(unsigned, T value, unsigned mask, int line = __builtin_LINE()) {
  return emulation::exchange(value, (emulation::current % emulation::kWarp) ^ mask, line);
}
template <class T> static inline T __shfl_sync(unsigned, T value, unsigned lane, int line = __builtin_LINE()) {
  return emulation::exchange(value, lane % emulation::kWarp, line);
}
static inline void __syncwarp(unsigned = ~0u, int line = __builtin_LINE()) {
  emulation::wait(emulation::Waits::at_warp, line);
}
