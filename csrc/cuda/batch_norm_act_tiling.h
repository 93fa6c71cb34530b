// How batch_norm_act's passes are cut into blocks: by the shape only, so that results do not depend
// on the GPU.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "fastslim/batch_norm_act_cuda.h"
#include "fastslim/cuda_launch.h"

namespace fastslim {
namespace {

constexpr int kThreads = 256;

// Blocks that are at once on a multiprocessor, at least: 80 registers a thread, or 128 for kernels
// that would have to spill.
constexpr int resident(bool few_registers) { return few_registers ? 3 : 2; }

// Rows (inner == 1): blocks are `across` vectors wide and take `rows_per_chunk` rows of the matrix.
// Planes: blocks take one channel of `rows_per_chunk` images or, where images are few and large, a
// piece of one.
struct Tiling {
  int32_t across, down;    // threads of a block: next to each other, below each other
  int32_t groups, chunks;  // blocks: over channels, over rows
  int32_t columns;         // vectors of a row, or of a plane
  int32_t pieces, piece;   // planes: parts of an image, and their vectors
  int64_t rows, rows_per_chunk;
  int64_t blocks() const { return int64_t(groups) * chunks; }
};

inline int64_t ceil_div(int64_t value, int64_t step) { return (value + step - 1) / step; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// `blocks`: about how many are wanted; `unroll`: vectors that a thread should have at least.
inline Tiling tiling(const BatchNormCuda& s, int vector, int64_t blocks, int unroll) {
  Tiling t{};
  t.rows = s.outer, t.pieces = 1;
  const int64_t channels = s.channels.value;
  if (s.inner == 1) {
    t.columns = int32_t(ceil_div(channels, vector));
    t.groups = int32_t(ceil_div(t.columns, vector == 1 ? 64 : 32));  // 128 bytes of a row and more
    t.across = int32_t(ceil_div(t.columns, t.groups));
    t.down = kThreads / t.across;
    const int64_t wanted = most(1, blocks / t.groups);
    t.rows_per_chunk = most(ceil_div(ceil_div(t.rows, wanted), t.down), unroll) * t.down;
  } else {
    t.columns = int32_t(s.inner / vector);
    t.groups = int32_t(channels);
    const int64_t passes = ceil_div(t.columns, kThreads);
    t.across = int32_t(ceil_div(t.columns, passes));
    t.down = kThreads / t.across;
    const int64_t wanted = most(1, blocks / t.groups);
    t.rows_per_chunk = most(ceil_div(ceil_div(t.rows, wanted), t.down), most(1, unroll / passes)) * t.down;
    if (wanted > t.rows && passes > unroll) t.pieces = int32_t(least(wanted / t.rows, ceil_div(passes, unroll)));
  }
  t.piece = t.columns;
  if (t.pieces > 1) {
    t.across = kThreads, t.rows_per_chunk = 1;
    t.piece = int32_t(ceil_div(ceil_div(t.columns, t.pieces), kThreads)) * kThreads;
    t.pieces = int32_t(ceil_div(t.columns, t.piece));
  }
  t.chunks = int32_t(ceil_div(t.rows, t.rows_per_chunk) * t.pieces);
  return t;
}

inline BatchNormChunks chunks_of(const Tiling& t, int64_t inner) {
  if (t.pieces == 1) {
    BatchNormChunks c = chunks_of_rows(t.rows, t.rows_per_chunk);
    c.each *= inner, c.last *= inner;
    return c;
  }
  const int64_t each = t.piece * (inner / t.columns);
  return {t.chunks, t.pieces, each, inner - (t.pieces - 1) * each};
}

// Partial sums: one wave of blocks on an H200's 132 multiprocessors, more where accesses are single
// elements. Nothing depends on the number of the others, so they get more, smaller blocks.
inline int64_t sum_blocks(int vector, bool few_registers) { return vector == 1 ? 1024 : 128 * resident(few_registers); }
constexpr int64_t kApplyBlocks = 2048;
constexpr int kStatisticsUnroll = 4, kGradientUnroll = 2, kApplyUnroll = 4;

// Elements of an access: as many as 16 bytes hold, if all can be whole and aligned, else one.
template <class T> int vector_of(const BatchNormCuda& s, std::initializer_list<const void*> pointers) {
  bool whole = sizeof(T) < 8 && (s.inner == 1 ? s.multiple : s.inner) % kVector<T> == 0;
  for (const void* p : pointers) whole &= reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return whole ? kVector<T> : 1;
}

inline Tiling statistics_tiling(const BatchNormCuda& s, int vector) {
  return tiling(s, vector, sum_blocks(vector, true), kStatisticsUnroll);
}
inline Tiling gradient_tiling(const BatchNormCuda& s, int vector) {
  return tiling(s, vector, sum_blocks(vector, s.activation <= Activation::relu6), kGradientUnroll);
}
inline Tiling apply_tiling(const BatchNormCuda& s, int vector) { return tiling(s, vector, kApplyBlocks, kApplyUnroll); }

// The workspace: coefficients of the channels, then partial sums.
inline int64_t padded(int64_t channels) { return ceil_div(channels, 64) * 64; }

inline dim3 blocks_of(const Tiling& t) { return dim3(unsigned(t.blocks())); }

// Calls f(elements of an access, whether channels are planes), both as constants.
template <class T, class F> void with_layout(const BatchNormCuda& s, int vector, const F& f) {
  constexpr int V = sizeof(T) == 8 ? 1 : kVector<T>;
  using Whole = std::integral_constant<int, V>;
  using Single = std::integral_constant<int, 1>;
  if (s.inner == 1)
    vector > 1 ? f(Whole(), std::false_type()) : f(Single(), std::false_type());
  else
    vector > 1 ? f(Whole(), std::true_type()) : f(Single(), std::true_type());
}

inline bool empty(const BatchNormCuda& s) { return s.outer == 0 || s.inner == 0 || s.channels.value == 0; }

}  // namespace
}  // namespace fastslim
