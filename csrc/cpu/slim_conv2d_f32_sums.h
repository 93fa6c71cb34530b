// Register tiles of sums over positions: P channels of one side by V vectors of the other.
#pragma once
#include "slim_conv2d_f32.h"

namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32 {
namespace {

struct Tile {
  const float *broadcast, *vectors;
  const int64_t *broadcast_at, *vectors_at;  // offsets of the positions
  int64_t positions;
  float* sums;  // (P, V * kL)
  bool add;
  int tail;  // lanes of the last vector; fewer than all with Part
};

// Sums P channels of one side by V vectors of the other.
template <int P, int V, bool Part> void compute_tile(const Tile& t) {
  Vec<float> sum[P][V];
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = t.add ? load(t.sums + (i * V + v) * kL) : Vec<float>{};
  for (int64_t p = 0; p < t.positions; ++p) {
    const float *a = t.broadcast + t.broadcast_at[p], *b = t.vectors + t.vectors_at[p];
    Vec<float> x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = Part && v == V - 1 ? load_n(b + v * kL, t.tail) : load(b + v * kL);
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i) {
      const Vec<float> g = splat(a[i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += g * x[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(t.sums + (i * V + v) * kL, sum[i][v]);
}

using ComputeTile = void (*)(const Tile&);
struct Kernel {
  int rows;
  ComputeTile whole, part;
};
template <int P, int V> constexpr Kernel kKernel = {P, compute_tile<P, V, false>, compute_tile<P, V, true>};

// Kernels of V vectors whose sums fit the registers.
struct Kernels {
  const Kernel* kernels;
  int count;
};
Kernels kernels_of(int vectors) {
#if FASTSLIM_VECTOR_BYTES == 64
  static const Kernel one[] = {kKernel<1, 1>, kKernel<4, 1>, kKernel<8, 1>, kKernel<12, 1>};
  static const Kernel two[] = {kKernel<1, 2>, kKernel<4, 2>, kKernel<6, 2>, kKernel<8, 2>, kKernel<12, 2>};
  static const Kernel three[] = {kKernel<1, 3>, kKernel<4, 3>, kKernel<6, 3>, kKernel<8, 3>};
  static const Kernel four[] = {kKernel<1, 4>, kKernel<4, 4>, kKernel<6, 4>};
  if (vectors == 4) return {four, 3};
  if (vectors == 3) return {three, 4};
  return vectors == 2 ? Kernels{two, 5} : Kernels{one, 4};
#else
  static const Kernel one[] = {kKernel<1, 1>, kKernel<4, 1>, kKernel<8, 1>, kKernel<12, 1>};
  static const Kernel two[] = {kKernel<1, 2>, kKernel<4, 2>, kKernel<6, 2>};
  return vectors == 2 ? Kernels{two, 3} : Kernels{one, 4};
#endif
}

// The kernels that sum `rows` rows: the tallest, then the lowest that has the rest, over rows of its neighbour's, too.
struct Choice {
  Kernel most, rest;
  int64_t whole;  // rows of the former
  int64_t cost;   // half cycles a position: two multiply-adds and two loads a cycle, sums 4 cycles late
};
int64_t cost_of(const Kernel& kernel, int vectors) {
  return max_of(8, max_of(kernel.rows * vectors, kernel.rows + vectors + 2));
}
Choice choose(int64_t rows, int vectors) {
  const Kernels all = kernels_of(vectors);
  Choice best{};
  for (int i = 0; i < all.count && all.kernels[i].rows <= rows; ++i) {
    Choice choice = {all.kernels[i], all.kernels[i], rows - rows % all.kernels[i].rows, 0};
    for (int k = i; k >= 0 && all.kernels[k].rows >= rows % all.kernels[i].rows; --k) choice.rest = all.kernels[k];
    choice.cost = choice.whole / choice.most.rows * cost_of(choice.most, vectors) +
                  (choice.whole < rows ? cost_of(choice.rest, vectors) : 0);
    if (i == 0 || choice.cost <= best.cost) best = choice;
  }
  return best;
}

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32
