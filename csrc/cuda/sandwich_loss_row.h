// A row of logits as a group of threads (a warp or a block) sees it, and what the group sums up.
#pragma once
#include <math.h>

#include "fastslim/cuda_launch.h"

namespace fastslim {

__device__ static inline float exp_of(float x) { return expf(x); }
__device__ static inline double exp_of(double x) { return exp(x); }

// What is subtracted from logits whose maximum is `max`: all -inf stay -inf then, and their sum is 0.
template <class A> __device__ static inline A finite(A max) { return max == A(-INFINITY) ? A(0) : max; }

template <class A> __device__ static inline A warp_sum(A value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class A> __device__ static inline A weight_of(const A* weight, int64_t c) {
  return weight ? weight[c] : A(1);
}

// Up to a warp's number of parts, added in a fixed order; whole warps call it.
__device__ static inline double sum_of_parts(const double* parts, int count) {
  const int lane = int(threadIdx.x % kWarpSize);
  return warp_sum(lane < count ? parts[lane] : 0.0);
}

// Combined over a group, in a fixed order; every thread of the group gets the result. Groups larger
// than a warp are the whole block.
template <int Group, class A> __device__ static inline A group_sum(A value) {
  value = warp_sum(value);
  if constexpr (Group > kWarpSize) {
    __shared__ A of_warp[Group / kWarpSize];
    if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    value = 0;
    for (int warp = 0; warp < Group / kWarpSize; ++warp) value += of_warp[warp];
    __syncthreads();  // of_warp may be used again
  }
  return value;
}

template <int Group, class A> __device__ static inline A group_max(A value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, value, step);
    value = other > value ? other : value;
  }
  if constexpr (Group > kWarpSize) {
    __shared__ A of_warp[Group / kWarpSize];
    if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    for (int warp = 0; warp < Group / kWarpSize; ++warp) value = of_warp[warp] > value ? of_warp[warp] : value;
    __syncthreads();
  }
  return value;
}

// What a group holds of a row: 32 logits a thread (16 read one by one: each has its own address, and
// registers run out), V neighbours at a time, -inf behind the last class.
template <class T, int V, int Group> struct Tile {
  using A = Accumulate<T>;
  static constexpr int kVectors = (V > 1 ? 32 : 16) / V;
  static constexpr int kClasses = kVectors * V * Group;
  A x[kVectors][V];

  // First class of a thread's i-th vector.
  __device__ static int class_of(int first, int i, int lane) { return first + (i * Group + lane) * V; }
  // Whether all classes from the i-th vectors on lie behind the last; asked once in eight logits of a
  // thread, so that those stay one block of instructions.
  __device__ static bool ends(int first, int i, int classes) {
    return i * V % 8 == 0 && first + i * Group * V >= classes;
  }

  __device__ void load(const T* row, int first, int classes, int lane) {
    Vector<T, V> raw[kVectors] = {};  // all loads are under way before the first is used
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int c = class_of(first, i, lane);
      if (c < classes) raw[i] = *reinterpret_cast<const Vector<T, V>*>(row + c);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j)
        x[i][j] = class_of(first, i, lane) < classes ? to_accumulate(raw[i].v[j]) : A(-INFINITY);
  }

  __device__ A max() const {  // NaN is passed over here: it shows in the sum
    A top = A(-INFINITY);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) top = x[i][j] > top ? x[i][j] : top;
    return top;
  }

  __device__ A sum_of_exp(A max, A inverse_tau, int first, int classes) const {
    A sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (ends(first, i, classes)) break;
#pragma unroll
      for (int j = 0; j < V; ++j) sums[(i * V + j) % 4] += exp_of((x[i][j] - max) * inverse_tau);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

// Of a whole row: its maximum (0 if all logits are -inf), and the sums of exp((x - max) / tau) and exp(x - max).
template <class A> struct Softmax {
  A max;
  double sum, sum_at_one;
};

// Reads a row once. Streams: it does not fit into the tile; else the tile holds it afterwards.
template <bool Streams, class T, int V, int Group>
__device__ static inline Softmax<Accumulate<T>> softmax(const T* row, int classes, int lane, Accumulate<T> inverse_tau,
                                                        bool at_one, Tile<T, V, Group>& tile) {
  using A = Accumulate<T>;
  A max = A(-INFINITY);
  double sum = 0, sum_at_one = 0;
  if constexpr (Streams) {
    A top = max;  // of this thread alone, until the row is read
    for (int first = 0; first < classes; first += tile.kClasses) {
      tile.load(row, first, classes, lane);
      const A here = tile.max();
      top = here > max ? here : max;
      const A shift = finite(top);
      sum = sum * exp_of((max - shift) * inverse_tau) + tile.sum_of_exp(shift, inverse_tau, first, classes);
      if (at_one) sum_at_one = sum_at_one * exp_of(max - shift) + tile.sum_of_exp(shift, A(1), first, classes);
      max = top;
    }
    max = finite(group_max<Group>(top));
    sum *= exp_of((top - max) * inverse_tau);
    sum_at_one *= exp_of(top - max);
  } else {
    tile.load(row, 0, classes, lane);
    max = finite(group_max<Group>(tile.max()));
    sum = tile.sum_of_exp(max, inverse_tau, 0, classes);
    if (at_one) sum_at_one = tile.sum_of_exp(max, A(1), 0, classes);
  }
  sum = group_sum<Group>(sum);
  return {max, sum, at_one ? group_sum<Group>(sum_at_one) : sum};
}

}  // namespace fastslim
