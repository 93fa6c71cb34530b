// batch_norm_act on a GPU: launchers, torch-free. The maths stands in batch_norm_act.h.
//
//   forward    partial statistics -> finalize -> apply      evaluation: prepare -> apply
//   backward   partial sums -> finalize -> apply            no sums wanted: finalize -> apply
//
// Sums are made in two stages and in a fixed order that depends on the shape only: repeats are
// bitwise equal. Nothing waits for the device, nothing is copied from or to the host.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "fastslim/batch_norm_act.h"
#include "fastslim/width.h"

namespace fastslim {

constexpr int kBatchNormMaxSegments = 64;

enum class ElementType : int32_t { f32, bf16, f16, f64 };

// A parameter or running statistic of the full layer.
struct ChannelVector {
  void* data;      // [full channels], or null: there is none
  int64_t stride;  // in elements
  ElementType type;
};

// Channels of the full layer that are active, in order; none: the first ones.
struct ChannelSegments {
  int32_t number;
  int32_t start[kBatchNormMaxSegments], count[kBatchNormMaxSegments];
};

struct BatchNormParameters {
  ChannelVector weight, bias, running_mean, running_var;
  ChannelSegments segments;
};

// Memory of every activation tensor: [outer, channels, inner], dense, as in BatchNormShape.
struct BatchNormCuda {
  int64_t outer, inner;
  Width channels;    // active ones, C below
  int32_t multiple;  // of all values the width can have; 16-byte accesses need whole vectors
  Activation activation;
  bool training;  // statistics of the batch
  double momentum, eps;
  BatchNormParameters parameters;
  double* stats;    // [2][C]: mean, 1 / sqrt(variance + eps); forward writes it, backward reads it
  void* workspace;  // workspace_bytes(...), aligned to 16 bytes
};

// T: float, bfloat16, float16, double. Pointers to activations may have any alignment; those to 16
// bytes are faster. An empty tensor is no error: statistics and gradients of parameters are written.
template <class T> struct BatchNormActCudaLaunchers {
  using A = Accumulate<T>;
  static int64_t workspace_bytes(const BatchNormCuda&);  // enough for both directions
  static cudaError_t forward(const T* x,                 // [outer, C, inner], as all activations
                             const T* residual,          // or null
                             T* y, const BatchNormCuda&, cudaStream_t);
  static cudaError_t backward(const T* dy, const T* x,
                              const T* extra,  // with a residual: y (relu, relu6) or the residual, else null
                              T* dx,
                              T* dresidual,  // or null
                              A* dweight,    // [C]; zero unless `sums`
                              A* dbias,      // [C]; zero unless `sums`
                              bool sums,     // gradients of the parameters are wanted; always in training
                              const BatchNormCuda&, cudaStream_t);
};

// How many values of a channel each chunk of partial sums holds: the last of every `period` chunks
// holds `last`, all others `each`. Rows in equal chunks: period = chunks.
struct BatchNormChunks {
  int32_t chunks, period;
  int64_t each, last;
};

inline BatchNormChunks chunks_of_rows(int64_t rows, int64_t rows_per_chunk) {
  const int64_t chunks = rows == 0 ? 0 : (rows + rows_per_chunk - 1) / rows_per_chunk;
  return {int32_t(chunks), int32_t(chunks), rows_per_chunk, rows - (chunks - 1) * rows_per_chunk};
}

// The second stage alone, for kernels whose epilogue makes the partial statistics of their output:
//   partials[chunk][0][c]  shift: any value near the chunk's values, such as the first of them
//   partials[chunk][1][c]  sum of x - shift
//   partials[chunk][2][c]  sum of (x - shift)^2
// Merges them in double, updates the running statistics, writes `stats`, and to coefficients[3][C]
// center, scale and shift: bn(x) = (x - center) * scale + shift. A: float or double.
template <class A>
cudaError_t batch_norm_finalize(const A* partials,  // [chunks][3][C]
                                const BatchNormChunks&,
                                A* coefficients,  // [3][C]
                                const BatchNormCuda&, cudaStream_t);

}  // namespace fastslim
