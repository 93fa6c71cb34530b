// Stages of batch_norm_act's forward that other files of this folder start.
#pragma once
#include "fastslim/batch_norm_act_cuda.h"

namespace fastslim {

// partials: [chunks][3][C], see batch_norm_finalize; the chunks are those of statistics_tiling.
template <class T>
cudaError_t batch_norm_act_statistics(const T* x, Accumulate<T>* partials, const BatchNormCuda&, cudaStream_t);

// Evaluation: statistics and coefficients [3][C] of the running statistics.
template <class A> cudaError_t batch_norm_act_prepare(A* coefficients, const BatchNormCuda&, cudaStream_t);

}  // namespace fastslim
