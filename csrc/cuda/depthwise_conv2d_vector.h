// What the depthwise kernels share: the active channels' filters, and for those that compute a vector of
// channels a thread, how the work is cut into blocks and how operands are read.
//
// A block has `lanes` vectors of channels side by side and `slots` threads for each; it computes
// strips of a chunk of image rows. Neighbouring slots take the same strip of neighbouring
// rows, which share most of what they read.
#pragma once
#include <type_traits>

#include "fastslim/cuda_launch.h"
#include "fastslim/depthwise_conv2d_cuda.h"

namespace fastslim {

template <class T> struct DepthwiseConv2dVectorForward {
  static cudaError_t run(const T* x, const T* weight, const T* bias, T* y, const DepthwiseConv2dCuda&,
                         const DepthwiseConv2dFusion*, bool flipped, cudaStream_t);
};
template <class T> struct DepthwiseConv2dVectorBackwardInput {  // stride 2
  static cudaError_t run(const T* grad_y, const T* weight, T* grad_x, const DepthwiseConv2dCuda&, cudaStream_t);
};
template <class T> struct DepthwiseConv2dVectorBackwardWeight {
  static cudaError_t run(const T* grad_y, const T* x, float* grad_weight, float* grad_bias, float* workspace,
                         bool add_weight, bool add_bias, const DepthwiseConv2dCuda&, const DepthwiseConv2dFusion*,
                         cudaStream_t);
  static int64_t workspace(const DepthwiseConv2dCuda&);  // floats
};

namespace depthwise {

// The full layer's filter that computes active output channel o.
__device__ static inline int64_t full_row(const DepthwiseConv2dCuda& s, int o) {
  int channel = o / s.multiplier;
  for (int i = 0; i < s.num_segments; ++i) {
    if (channel < s.count[i]) return (int64_t(s.start[i]) + channel) * s.multiplier + o % s.multiplier;
    channel -= s.count[i];
  }
  return 0;  // not reached: the counts add up to the channels
}

static inline int ceil_divide(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Divides numbers below 2^31 by a multiplication.
struct Divisor {
  uint32_t divisor = 1, magic = 1, shift = 0;

  explicit Divisor(uint32_t d = 1) : divisor(d) {
    while ((uint64_t(1) << shift) < d) ++shift;
    magic = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1);
  }
  __device__ int divide(int n) const {
    return int((uint32_t((uint64_t(magic) * uint32_t(n)) >> 32) + uint32_t(n)) >> shift);
  }
};

struct Tiling {
  int lanes, slots, tiles;     // a block has lanes x slots threads; channel tiles of lanes vectors
  int total, rows, chunks;     // image rows (n, h) in all and of a chunk
  int strips;                  // of a row
  Divisor by_rows, by_height;  // rows of a chunk, rows of an image
};

// Every chunk but the last has `rows` rows, and rows = ceil(total / chunks).
static inline DepthwiseConv2dRowChunks cut_rows(int64_t total, int wanted) {
  if (total == 0) return {1, 0};
  const int chunks = ceil_divide(total, ceil_divide(total, wanted));
  const int rows = ceil_divide(total, chunks);
  return {rows, ceil_divide(total, rows)};
}

// Chunks that give every multiprocessor of an H200 several blocks, whatever the vector and the GPU are.
static inline int chunks_of(int channels) {
  const int wanted = 132 * 6 / ceil_divide(channels, 256);
  return wanted > 0 ? wanted : 1;
}

static inline Tiling make_tiling(int vectors, int threads, int max_lanes, int64_t batch, int height, int strips,
                                 DepthwiseConv2dRowChunks chunks) {
  Tiling t;
  t.tiles = ceil_divide(vectors, max_lanes);
  t.lanes = ceil_divide(vectors, t.tiles);
  t.slots = threads / t.lanes;
  t.total = int(batch * height), t.rows = chunks.rows, t.chunks = chunks.chunks, t.strips = strips;
  t.by_rows = Divisor(unsigned(t.rows)), t.by_height = Divisor(unsigned(height));
  return t;
}

// Channels of a thread are computed a few at a time, which keeps registers down.
template <int V> constexpr int kPart = V < 4 ? V : 4;

// A row of channel values in shared memory: a thread reads or writes a part of its V values at once, and
// the threads of a warp do so side by side.
template <int V, int Lanes> struct SharedRow {
  static constexpr int kSize = V * Lanes;
  using Part = Vector<float, kPart<V>>;

  __device__ static int index(int channel) {  // counted from the tile's first
    const int lane = channel / V, i = channel % V;
    return (i / kPart<V> * Lanes + lane) * kPart<V> + i % kPart<V>;
  }
  __device__ static const Part& part(const float* row, int lane, int part) {
    return *reinterpret_cast<const Part*>(row + (part * Lanes + lane) * kPart<V>);
  }
  __device__ static Part& part(float* row, int lane, int part) {
    return *reinterpret_cast<Part*>(row + (part * Lanes + lane) * kPart<V>);
  }
};

// A thread's channels as they lie in memory. Words, not a Vector<T, V>: 16-bit members would each take a register.
template <class T, int V> struct alignas(V * sizeof(T)) Packed {
  using Word = std::conditional_t<V * sizeof(T) % 4 == 0, uint32_t, uint16_t>;
  Word words[V * sizeof(T) / sizeof(Word)];

  __device__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      float value;
      std::memcpy(&value, &words[i], 4);
      return value;
    } else if constexpr (sizeof(Word) == 2) {
      return to_accumulate(T{words[i]});
    } else {
      return to_accumulate(T{uint16_t(words[i / 2] >> (i % 2 * 16))});
    }
  }
};

// Image columns of a row: the column-th is `stride` bytes times column behind `first`.
template <class T, int V> struct Columns {
  const char* first;
  int64_t stride;

  __device__ Columns(const T* p, int64_t stride) : first(reinterpret_cast<const char*>(p)), stride(stride) {
#ifdef __CUDA_ARCH__
    asm("" : "+l"(first));  // else the compiler computes every column's address from the kernel's arguments
    __builtin_assume(__isGlobal(first));
#endif
  }
  // The channels there, or zeros; nothing is read where there is none.
  __device__ Packed<T, V> load_if(bool inside, int column) const {
    Packed<T, V> values{};
    if (inside) values = *reinterpret_cast<const Packed<T, V>*>(first + column * stride);
    return values;
  }
};

// x' = clamp((x - center) * scale + shift) of a part of a thread's channels.
template <int V> struct Normal {
  Vector<float, kPart<V>> center, scale, shift;
  float low, high;

  __device__ float apply(float x, int i) const {
    const float v = (x - center.v[i]) * scale.v[i] + shift.v[i];
    return v < low ? low : v > high ? high : v;  // NaN stays NaN
  }
};

template <int N> struct Constant {
  static constexpr int value = N;
};
// Calls body(Constant<K>) for the kernel size.
template <class Body> cudaError_t for_kernel_size(int size, const Body& body) {
  return size == 3 ? body(Constant<3>()) : size == 5 ? body(Constant<5>()) : body(Constant<7>());
}
// Calls body(Constant<V>) for the widest vector of channels that width and addresses allow.
template <class T, class Body> cudaError_t for_vector(int multiple, const void* a, const void* b, const Body& body) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  if (multiple % kVector<T> == 0 && addresses % 16 == 0) return body(Constant<kVector<T>>());
  if (multiple % 2 == 0 && addresses % (2 * sizeof(T)) == 0) return body(Constant<2>());
  return body(Constant<1>());
}

}  // namespace depthwise
}  // namespace fastslim
