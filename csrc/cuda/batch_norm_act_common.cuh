// What the passes of batch_norm_act share: which elements a thread takes, the parameters of its
// channels, and how threads and chunks merge what they have summed.
#pragma once
#include "batch_norm_act_activation.cuh"
#include "batch_norm_act_tiling.h"

namespace fastslim {
namespace {

// Rows: a thread's vectors hold V channels; Planes: they hold V values of one channel.
template <int V, bool Planes> constexpr int kChannelsOf = Planes ? 1 : V;

// The vectors of one thread, one after the other.
template <int V, bool Planes> struct Cursor {
  int64_t offset, step, jump;  // of elements; jump: to the next image
  int32_t remaining, column, columns;
  int32_t channel;    // the first of this thread
  int32_t row, rows;  // the threads that share its channels: which it is, and how many they are
  int32_t chunk;      // of the partial sums
  bool beyond;        // no channels are left for this block (planes) or thread (rows)
  __device__ void next() {
    offset += step, --remaining;
    if (Planes && ++column == columns) column = 0, offset += jump;
  }
};

__device__ static inline int32_t steps(int32_t from, int32_t end, int32_t step) {
  return from < end ? (end - from - 1) / step + 1 : 0;
}

// `backwards`: the last chunks first, for passes that read again what an earlier one read last.
template <int V, bool Planes>
__device__ static inline Cursor<V, Planes> cursor_of(const Tiling& t, int32_t channels, bool backwards) {
  Cursor<V, Planes> c{};
  const int32_t thread = threadIdx.x, across = thread % t.across, down = thread / t.across;
  const int32_t group = blockIdx.x / t.chunks, chunk = blockIdx.x % t.chunks;
  c.chunk = backwards ? t.chunks - 1 - chunk : chunk;
  const int32_t image = c.chunk / t.pieces;  // or chunk of rows
  const int64_t first = image * t.rows_per_chunk, left = t.rows - first;
  const int32_t rows = int32_t(left < t.rows_per_chunk ? left : t.rows_per_chunk);
  const int32_t mine = down < t.down ? steps(down, rows, t.down) : 0;
  if constexpr (Planes) {
    const int32_t begin = c.chunk % t.pieces * t.piece;
    const int32_t end = begin + t.piece < t.columns ? begin + t.piece : t.columns;
    const int64_t inner = int64_t(t.columns) * V;
    c.channel = group, c.row = thread, c.rows = kThreads;
    c.beyond = group >= channels;
    c.columns = steps(begin + across, end, t.across);
    c.remaining = c.beyond ? 0 : mine * c.columns;
    c.offset = ((first + down) * channels + group) * inner + int64_t(begin + across) * V;
    c.step = t.across * V;
    c.jump = t.down * inner * channels - c.columns * c.step;
  } else {
    c.channel = (group * t.across + across) * V, c.row = down, c.rows = t.down;
    c.beyond = c.channel >= channels;
    c.remaining = c.beyond ? 0 : mine;
    c.offset = (first + down) * channels + c.channel;
    c.step = int64_t(t.down) * channels;
  }
  return c;
}

// Calls use(load(offset), offset) for each vector; U loads are on their way at a time. `ahead` sees
// each group of loaded vectors, and how many they are, before they are used.
template <int U, class C, class Load, class Use, class Ahead>
__device__ static inline void walk(C& cursor, const Load& load, const Use& use, const Ahead& ahead) {
  using Loaded = decltype(load(int64_t()));
  while (cursor.remaining > 0) {
    Loaded loaded[U];
    int64_t at[U];
    const int32_t n = cursor.remaining;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      at[u] = cursor.offset;
      if (u < n) loaded[u] = load(at[u]), cursor.next();
    }
    ahead(loaded, n < U ? n : U);
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (u < n) use(loaded[u], at[u]);
  }
}
template <int U, class C, class Load, class Use>
__device__ static inline void walk(C& cursor, const Load& load, const Use& use) {
  walk<U>(cursor, load, use, [](const auto&, int32_t) {});
}

template <int N, class T> __device__ static inline Vector<T, N> fetch(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}

// K values of a vector over channels.
template <int K, class A> __device__ static inline void load_channels(const A* p, A (&out)[K]) {
  constexpr int N = K * sizeof(A) >= 16 ? 16 / sizeof(A) : 1;
#pragma unroll
  for (int i = 0; i < K; i += N) {
    const Vector<A, N> v = fetch<N>(p + i);
#pragma unroll
    for (int j = 0; j < N; ++j) out[i + j] = v.v[j];
  }
}

// Adds up, over the threads that share channels, what `merge(own, other)` merges; the first of them
// holds the result. A tree, so always in the same order. All threads of the block must call it.
// `stride`: how far apart in the block they are.
template <int K, class A, class Merge>
__device__ static inline void merge_rows(A (&own)[K], int32_t row, int32_t rows, int32_t stride, const Merge& merge) {
  __shared__ A of_row[K][kThreads / 2];
  int32_t half = 1;
  while (2 * half < rows) half *= 2;
  for (; rows > 1; rows = half, half /= 2) {
    const int32_t thread = threadIdx.x;
    if (row >= half && row < rows) {
#pragma unroll
      for (int k = 0; k < K; ++k) of_row[k][thread - half * stride] = own[k];
    }
    __syncthreads();
    if (row < half && row + half < rows) {
      A other[K];
#pragma unroll
      for (int k = 0; k < K; ++k) other[k] = of_row[k][thread];
      merge(own, other);
    }
    __syncthreads();
  }
}

// Whether there is a residual; `told`: at run time.
enum class Choice : int { no, yes, told };
template <Choice C> __device__ static inline bool chosen(bool told) {
  return C == Choice::told ? told : C == Choice::yes;
}

// Calls f(elements of an access, planes?, family, residual?), all as constants. Whole vectors over
// channels, what training runs on, get a kernel for each case; all else is told at run time.
template <class T, class F>
void with_variant(const BatchNormCuda& s, int elements, Family family, bool residual, const F& f) {
  using Told = std::integral_constant<Choice, Choice::told>;
  using Any = std::integral_constant<Family, Family::any>;
  const auto with_residual = [&](auto vector, auto planes, auto known) {
    if constexpr (decltype(known)::value == Family::any)
      f(vector, planes, known, Told());
    else
      residual ? f(vector, planes, known, std::integral_constant<Choice, Choice::yes>())
               : f(vector, planes, known, std::integral_constant<Choice, Choice::no>());
  };
  with_layout<T>(s, elements, [&](auto vector, auto planes) {
    if constexpr (decltype(vector)::value == 1 || decltype(planes)::value)
      return with_residual(vector, planes, Any());
    else if (family == Family::clamp)
      with_residual(vector, planes, std::integral_constant<Family, Family::clamp>());
    else
      with_residual(vector, planes, std::integral_constant<Family, Family::smooth>());
  });
}

// The full layer's channel that is active channel c.
__device__ static inline int64_t full_channel(const ChannelSegments& segments, int32_t c) {
  for (int i = 0; i < segments.number; ++i) {
    if (c < segments.count[i]) return segments.start[i] + c;
    c -= segments.count[i];
  }
  return c;
}

__device__ static inline double read(const ChannelVector& v, int64_t channel, double missing) {
  if (!v.data) return missing;
  const int64_t i = channel * v.stride;
  switch (v.type) {
    case ElementType::f32: return static_cast<const float*>(v.data)[i];
    case ElementType::bf16: return to_accumulate(static_cast<const bfloat16*>(v.data)[i]);
    case ElementType::f16: return to_accumulate(static_cast<const float16*>(v.data)[i]);
    default: return static_cast<const double*>(v.data)[i];
  }
}

// running <- (1 - momentum) * running + momentum * batch
__device__ static inline void update_running(const ChannelVector& v, int64_t channel, double momentum, double batch) {
  if (!v.data) return;
  const int64_t i = channel * v.stride;
  const double value = (1 - momentum) * read(v, channel, 0) + momentum * batch;
  switch (v.type) {
    case ElementType::f32: return from_accumulate(float(value), static_cast<float*>(v.data) + i);
    case ElementType::bf16: return from_accumulate(float(value), static_cast<bfloat16*>(v.data) + i);
    case ElementType::f16: return from_accumulate(float(value), static_cast<float16*>(v.data) + i);
    default: return from_accumulate(value, static_cast<double*>(v.data) + i);
  }
}

// z = (x - center) * scale + shift. The center is the mean, rounded; the shift holds what was lost.
struct Coefficients {
  double center, scale, shift;
};

template <class A>
__device__ static inline Coefficients coefficients_of(const BatchNormParameters& p, int64_t channel, double mean,
                                                      double invstd) {
  Coefficients k;
  k.center = A(mean);
  k.scale = read(p.weight, channel, 1) * invstd;
  k.shift = read(p.bias, channel, 0) + (k.center - mean) * k.scale;
  return k;
}

// The second stage: a block takes kMergedChannels channels, all its threads share their chunks.
constexpr int kMergedChannels = 4;
constexpr int kMergers = kThreads / kMergedChannels;

// The sums of `a` and of `b` over a channel's threads; valid in the first kMergedChannels threads.
__device__ static inline void merge_chunks(double& a, double& b) {
  __shared__ double of_warp[2][kThreads / kWarpSize][kMergedChannels];
  for (int step = kWarpSize / 2; step >= kMergedChannels; step /= 2) {
    a += __shfl_down_sync(0xffffffffu, a, step);
    b += __shfl_down_sync(0xffffffffu, b, step);
  }
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (lane < kMergedChannels) of_warp[0][warp][lane] = a, of_warp[1][warp][lane] = b;
  __syncthreads();
  if (threadIdx.x >= kMergedChannels) return;
  a = b = 0;
  for (int w = 0; w < kThreads / kWarpSize; ++w) a += of_warp[0][w][lane], b += of_warp[1][w][lane];
}

inline dim3 merging_blocks(int32_t channels) {
  return dim3(unsigned((channels + kMergedChannels - 1) / kMergedChannels));
}

}  // namespace
}  // namespace fastslim
