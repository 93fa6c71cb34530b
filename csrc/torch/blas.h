// The BLAS that torch brings along, called directly: a matrix product through the dispatcher costs several
// microseconds more, as much as a small product itself.
#pragma once
#include <cstdint>

// Weak: a torch whose BLAS is hidden, or another one, leaves it null.
extern "C" __attribute__((weak)) void sgemm_(const char* transa, const char* transb, const int* m, const int* n,
                                             const int* k, const float* alpha, const float* a, const int* lda,
                                             const float* b, const int* ldb, const float* beta, float* c,
                                             const int* ldc);

namespace fastslim {

inline bool has_sgemm() { return sgemm_ != nullptr; }

// A matrix in memory: rows of `columns` floats, `stride` apart.
struct Matrix {
  const float* data;
  int64_t stride;
  bool transposed;  // op(A) = A^T
};

// c (rows, columns; rows `stride` apart) = op(a) op(b) + beta c, all row-major; `inner` is the length of the sums.
inline void sgemm(int64_t rows, int64_t columns, int64_t inner, Matrix a, Matrix b, float beta, float* c,
                  int64_t stride) {
  // Column-major BLAS computes the transposed product: c^T = op(b)^T op(a)^T.
  const int m = int(columns), n = int(rows), k = int(inner), lda = int(b.stride), ldb = int(a.stride),
            ldc = int(stride);
  const float one = 1;
  sgemm_(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &m, &n, &k, &one, b.data, &lda, a.data, &ldb, &beta, c,
         &ldc);
}

}  // namespace fastslim
