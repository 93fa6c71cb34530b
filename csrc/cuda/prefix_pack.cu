// Moves many strided blocks of memory in one launch, converting between data types:
//   target[...] = source[...]   or   target[...] = round(float(target[...]) + float(source[...]))
// A block of threads moves one tile of 4096 elements of one entry. Where both sides' innermost
// dimension is dense and aligned a thread moves 4 elements at once, four of them in flight;
// otherwise single elements, neighbouring threads next to each other in the target.
#include "fastslim/prefix_pack_cuda.h"

#include "fastslim/cuda_launch.h"

namespace fastslim {
namespace {

constexpr int kThreads = 256;
constexpr int kDims = kTransferDims;

// An entry at its active widths.
struct Region {
  int32_t source_stride[kDims], target_stride[kDims];
  uint32_t size[kDims];
};

__device__ static inline Region region_of(const Transfer& t, const int32_t* widths) {
  Region r;
#pragma unroll
  for (int d = 0; d < kDims; ++d) {
    int32_t size = t.size[d];
    if (widths && t.channels[d] != kFixed) {
      const int64_t active = int64_t(widths[t.channels[d]]) * t.unit[d];
      size = active < 0 ? 0 : active < size ? int32_t(active) : size;  // never beyond the memory
    }
    r.size[d] = uint32_t(size);
  }
#pragma unroll
  for (int d = 0; d < kDims; ++d) {
    int32_t packed = 1;
#pragma unroll
    for (int e = 0; e < kDims; ++e) packed *= t.rank[e] < t.rank[d] ? int32_t(r.size[e]) : 1;
    r.source_stride[d] = t.dense == kDenseSource ? packed : t.source_stride[d];
    r.target_stride[d] = t.dense == kDenseTarget ? packed : t.target_stride[d];
  }
  return r;
}

__device__ static inline bool aligned(const void* data, int8_t type, const int32_t (&stride)[kDims],
                                      const uint32_t (&size)[kDims]) {
  const uintptr_t bytes = type == kFloat32 ? 16 : 8;
  bool all = type != kFloat64 && stride[0] == 1 && reinterpret_cast<uintptr_t>(data) % bytes == 0;
#pragma unroll
  for (int d = 1; d < kDims; ++d) all = all && (size[d] == 1 || stride[d] % kTransferVector == 0);
  return all;
}

// A position in a region whose innermost dimension counts vectors.
struct Position {
  uint32_t at[kDims];
};

__device__ static inline Position position(uint32_t index, const uint32_t (&size)[kDims]) {
  Position p;
#pragma unroll
  for (int d = 0; d < kDims - 1; ++d) p.at[d] = index % size[d], index /= size[d];
  p.at[kDims - 1] = index;
  return p;
}

__device__ static inline void advance(Position& p, const Position& step, const uint32_t (&size)[kDims]) {
  uint32_t carry = 0;
#pragma unroll
  for (int d = 0; d < kDims; ++d) {
    p.at[d] += step.at[d] + carry;
    carry = d < kDims - 1 && p.at[d] >= size[d];
    if (carry) p.at[d] -= size[d];
  }
}

template <int V, class T, class A> __device__ static inline void fetch(const T* p, A (&out)[V]) {
  Accumulate<T> values[V];
  load<V>(p, values);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = A(values[i]);
}

template <int V, class T, class A> __device__ static inline void put(T* p, const A (&values)[V]) {
  Accumulate<T> rounded[V];
#pragma unroll
  for (int i = 0; i < V; ++i) rounded[i] = Accumulate<T>(values[i]);
  store<V>(p, rounded);
}

// The U vectors at `offset`, `left` elements of each: all whole ones are asked for before any is used.
template <class T, int U, int V, class A>
__device__ static inline void fetch_all(const void* data, const int32_t (&offset)[U], const int (&left)[U],
                                        A (&out)[U][V]) {
  const T* p = in_global(static_cast<const T*>(data));
#pragma unroll
  for (int u = 0; u < U; ++u)
    if (left[u] == V) fetch<V>(p + offset[u], out[u]);
  if constexpr (V > 1) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (left[u] < V)
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (i < left[u]) out[u][i] = A(to_accumulate(p[offset[u] + i]));
  }
}

template <class T, int U, int V, class A>
__device__ static inline void put_all(void* data, const int32_t (&offset)[U], const int (&left)[U],
                                      const A (&values)[U][V]) {
  T* p = in_global(static_cast<T*>(data));
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (left[u] == V) {
      put<V>(p + offset[u], values[u]);
    } else if (V > 1) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (i < left[u]) from_accumulate(Accumulate<T>(values[u][i]), p + offset[u] + i);
    }
  }
}

template <int U, int V, class A>
__device__ static inline void fetch_typed(int8_t type, const void* data, const int32_t (&offset)[U],
                                          const int (&left)[U], A (&out)[U][V]) {
  if (type == kFloat32) return fetch_all<float>(data, offset, left, out);
  if (type == kBFloat16) return fetch_all<bfloat16>(data, offset, left, out);
  if (type == kFloat16) return fetch_all<float16>(data, offset, left, out);
  if constexpr (sizeof(A) == 8) fetch_all<double>(data, offset, left, out);
}

template <int U, int V, class A>
__device__ static inline void put_typed(int8_t type, void* data, const int32_t (&offset)[U], const int (&left)[U],
                                        const A (&values)[U][V]) {
  if (type == kFloat32) return put_all<float>(data, offset, left, values);
  if (type == kBFloat16) return put_all<bfloat16>(data, offset, left, values);
  if (type == kFloat16) return put_all<float16>(data, offset, left, values);
  if constexpr (sizeof(A) == 8) put_all<double>(data, offset, left, values);
}

// Moves one tile in vectors of V elements, U of them in flight a thread; sums are in A.
template <int V, int U, class A>
__device__ static inline void move_tile(const Transfer& t, const Region& r, uint32_t tile) {
  uint32_t size[kDims];  // in vectors
#pragma unroll
  for (int d = 0; d < kDims; ++d) size[d] = d ? r.size[d] : (r.size[0] + V - 1) / V;
  const uint32_t total = size[0] * size[1] * size[2] * size[3];  // below 2^31
  const uint64_t first = uint64_t(tile) * (kTransferTile / V);
  if (first >= total) return;
  const uint32_t begin = uint32_t(first);
  const Position step = position(kThreads, size);
  Position p = position(begin + threadIdx.x, size);
#pragma unroll 1
  for (uint32_t batch = 0; batch < kTransferTile / V; batch += U * kThreads) {
    int32_t from[U], to[U];
    int left[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool live = begin + batch + u * kThreads + threadIdx.x < total;
      const int in_row = int(r.size[0] - p.at[0] * V);
      left[u] = live ? (in_row < V ? in_row : V) : 0;
      from[u] = p.at[0] * V * r.source_stride[0], to[u] = p.at[0] * V * r.target_stride[0];
#pragma unroll
      for (int d = 1; d < kDims; ++d) from[u] += p.at[d] * r.source_stride[d], to[u] += p.at[d] * r.target_stride[d];
      advance(p, step, size);
    }
    // The sums first: mostly float32, they need no conversion, so the source is asked for without waiting.
    A before[U][V], values[U][V];
    if (t.add) fetch_typed(t.target_type, t.target, to, left, before);
    fetch_typed(t.source_type, t.source, from, left, values);
    if (t.add) {
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int i = 0; i < V; ++i) values[u][i] += before[u][i];
    }
    put_typed(t.target_type, t.target, to, left, values);
  }
}

// The last entry that starts at or before the tile; empty ones, which start with the next, are passed over.
template <class Entries>
__device__ static inline int32_t entry_of(const Entries& entries, int32_t count, int32_t tile) {
  int32_t low = 0, high = count - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (entries[middle].first_tile <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ static inline void move(const Transfer& t, int32_t tile, const int32_t* widths) {
  const Region r = region_of(t, widths);
  const uint32_t own = uint32_t(tile - t.first_tile);
  if (t.source_type == kFloat64 || t.target_type == kFloat64)
    move_tile<1, 4, double>(t, r, own);
  else if (r.size[0] >= kTransferVector && aligned(t.source, t.source_type, r.source_stride, r.size) &&
           aligned(t.target, t.target_type, r.target_stride, r.size))
    move_tile<kTransferVector, 4, float>(t, r, own);
  else
    move_tile<1, 8, float>(t, r, own);
}

__global__ void __launch_bounds__(kThreads, 3) prefix_pack_kernel(FASTSLIM_GRID_CONSTANT(TransferBatch) batch) {
  const int32_t tile = int32_t(blockIdx.x);
  const Transfer t = batch.transfers[entry_of(batch.transfers, batch.count, tile)];
  move(t, tile, nullptr);
}

__global__ void __launch_bounds__(kThreads, 3)
    prefix_pack_table_kernel(const Transfer* __restrict__ table, int32_t count, const int32_t* __restrict__ widths) {
  const int32_t tile = int32_t(blockIdx.x), i = entry_of(table, count, tile);
  const Transfer t = table[i];
  move(t, tile, widths ? widths + 2 * int64_t(i) : nullptr);
}

}  // namespace

cudaError_t launch_prefix_pack(Transfer* transfers, int64_t count, cudaStream_t stream) {
  TransferBatch batch;
  for (int64_t next = 0; next < count;) {
    int64_t tiles = 0;
    batch.count = 0;
    while (next < count && batch.count < kTransfersPerLaunch) {
      transfers[next].first_tile = int32_t(tiles);
      if (tiles + tiles_of(transfers[next]) > INT32_MAX) break;
      tiles += tiles_of(transfers[next]);
      batch.transfers[batch.count++] = transfers[next++];
    }
    if (tiles == 0) continue;
    FASTSLIM_LAUNCH(prefix_pack_kernel, dim3(unsigned(tiles)), dim3(kThreads), stream, batch);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t launch_prefix_pack_table(const Transfer* table, int32_t count, int32_t tiles, const int32_t* widths,
                                     cudaStream_t stream) {
  if (tiles == 0) return cudaSuccess;
  FASTSLIM_LAUNCH(prefix_pack_table_kernel, dim3(unsigned(tiles)), dim3(kThreads), stream, table, count, widths);
  return cudaGetLastError();
}

}  // namespace fastslim
