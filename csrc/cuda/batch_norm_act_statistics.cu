// Statistics of the batch for batch_norm_act, in two stages. First each thread sums x - shift and its
// square over its part of a chunk, in float, about a shift of its own: exact whatever the mean is.
//   about another shift    d = old - new    sum += n d    square += d (2 sum + n d)
// Threads merge about their common mean, so that a shift which is an outlier costs no bits; then the
// chunks are merged about one shift in double (Chan, Golub, LeVeque 1983).
#include "batch_norm_act_common.cuh"
#include "batch_norm_act_statistics.cuh"

namespace fastslim {
namespace {

// a, b: shifts, sums and squares of K channels, and the number of values; a becomes that of both.
template <int K, class A> __device__ static inline void merge_moments(A (&a)[3 * K + 1], const A (&b)[3 * K + 1]) {
  const A of_a = a[3 * K], of_b = b[3 * K];
  if (of_b == A(0)) return;
  const A one_of_a = of_a == A(0) ? A(0) : A(1) / of_a, one_of_b = A(1) / of_b, share = of_b / (of_a + of_b);
  a[3 * K] = of_a + of_b;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const A mean_a = a[k] + a[K + k] * one_of_a, mean_b = b[k] + b[K + k] * one_of_b;
    const A shift = mean_a + (mean_b - mean_a) * share;
    const A d_a = a[k] - shift, d_b = b[k] - shift;
    a[2 * K + k] += d_a * (2 * a[K + k] + of_a * d_a) + b[2 * K + k] + d_b * (2 * b[K + k] + of_b * d_b);
    a[K + k] += of_a * d_a + b[K + k] + of_b * d_b;
    a[k] = shift;
  }
}

template <class T, int V, bool Planes>
__global__ void __launch_bounds__(kThreads, resident(true))
    batch_norm_act_statistics_kernel(const T* __restrict__ x,               // [outer, C, inner]
                                     Accumulate<T>* __restrict__ partials,  // [chunks][3][C]
                                     const Width width, const Tiling tiling) {
  using A = Accumulate<T>;
  constexpr int K = kChannelsOf<V, Planes>, N = V / K, U = kStatisticsUnroll;
  const int32_t channels = width.get();
  auto cursor = cursor_of<V, Planes>(tiling, channels, false);
  if (Planes && cursor.beyond) return;
  A own[3 * K + 1] = {};  // shifts, sums, squares, number of values
  bool first = true;
  own[3 * K] = A(cursor.remaining) * N;
  walk<U>(
      cursor, [&](int64_t at) { return fetch<V>(x + at); },
      [&](const Vector<T, V>& v, int64_t) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A d = to_accumulate(v.v[i]) - own[i % K];
          own[K + i % K] += d;
          own[2 * K + i % K] += d * d;
        }
      },
      [&](const Vector<T, V>(&group)[U], int32_t n) {
        if (!first) return;
        first = false;
        // The shift is the mean of the first group: an outlier in it cannot spoil all squares.
        const A share = A(1) / A(n * N);
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
          for (int i = 0; i < V; ++i)
            if (u < n) own[i % K] += to_accumulate(group[u].v[i]) * share;
      });
  merge_rows(own, cursor.row, cursor.rows, Planes ? 1 : tiling.across, merge_moments<K, A>);
  if (cursor.row != 0 || cursor.beyond) return;
  A* out = partials + int64_t(cursor.chunk) * 3 * channels + cursor.channel;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int part = 0; part < 3; ++part) out[int64_t(part) * channels + k] = own[part * K + k];
}

// What a channel's mean and variance are for: statistics, running statistics, coefficients [3][C].
template <class A>
__device__ static inline void finish_channel(const BatchNormParameters& p, int32_t c, int32_t channels, double mean,
                                             double variance, double eps, double* stats, A* coefficients) {
  const double invstd = 1 / sqrt(variance + eps);
  stats[c] = mean;
  stats[channels + c] = invstd;
  const Coefficients k = coefficients_of<A>(p, full_channel(p.segments, c), mean, invstd);
  coefficients[c] = A(k.center);
  coefficients[channels + c] = A(k.scale);
  coefficients[2 * channels + c] = A(k.shift);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_finalize_kernel(const A* __restrict__ partials,  // [chunks][3][C]
                                   const BatchNormChunks chunks, double values, double momentum, double eps,
                                   const Width width, double* __restrict__ stats,  // [2][C]
                                   A* __restrict__ coefficients,                   // [3][C]
                                   const BatchNormParameters p) {
  const int32_t channels = width.get(), c = int32_t(blockIdx.x) * kMergedChannels + threadIdx.x % kMergedChannels;
  double sum = 0, square = 0, center = 0;
  if (c < channels) {
    center = partials[c];  // all chunks about one shift
#pragma unroll 4
    for (int32_t chunk = threadIdx.x / kMergedChannels; chunk < chunks.chunks; chunk += kMergers) {
      const A* of_chunk = partials + int64_t(chunk) * 3 * channels + c;
      const double n = double((chunk + 1) % chunks.period == 0 ? chunks.last : chunks.each);
      const double d = double(of_chunk[0]) - center, s = of_chunk[channels], q = of_chunk[2 * int64_t(channels)];
      sum += s + n * d;
      square += q + d * (2 * s + n * d);
    }
  }
  merge_chunks(sum, square);
  if (threadIdx.x >= kMergedChannels || c >= channels) return;
  const double about = sum / values, mean = center + about;
  double variance = square / values - about * about;
  variance = variance < 0 ? 0 : variance;  // keeps NaN
  const int64_t full = full_channel(p.segments, c);
  update_running(p.running_mean, full, momentum, mean);
  update_running(p.running_var, full, momentum, variance * (values / (values - 1)));
  finish_channel(p, c, channels, mean, variance, eps, stats, coefficients);
}

// Evaluation: the running statistics take the place of the batch's.
template <class A>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_prepare_kernel(double eps, const Width width, double* __restrict__ stats,  // [2][C]
                                  A* __restrict__ coefficients,                               // [3][C]
                                  const BatchNormParameters p) {
  const int32_t channels = width.get(), c = int32_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  const int64_t full = full_channel(p.segments, c);
  finish_channel(p, c, channels, read(p.running_mean, full, 0), read(p.running_var, full, 1), eps, stats, coefficients);
}

template <class T>
cudaError_t sum_chunks(const T* x, Accumulate<T>* partials, const BatchNormCuda& s, cudaStream_t stream) {
  const int elements = vector_of<T>(s, {x});
  const Tiling t = statistics_tiling(s, elements);
  with_layout<T>(s, elements, [&](auto vector, auto planes) {
    FASTSLIM_LAUNCH((batch_norm_act_statistics_kernel<T, decltype(vector)::value, decltype(planes)::value>),
                    blocks_of(t), dim3(kThreads), stream, x, partials, s.channels, t);
  });
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t batch_norm_act_statistics(const T* x, Accumulate<T>* partials, const BatchNormCuda& s,
                                      cudaStream_t stream) {
  return sum_chunks(x, partials, s, stream);
}

template <class A>
cudaError_t batch_norm_finalize(const A* partials, const BatchNormChunks& chunks, A* coefficients,
                                const BatchNormCuda& s, cudaStream_t stream) {
  if (s.channels.value == 0) return cudaSuccess;
  FASTSLIM_LAUNCH(batch_norm_act_finalize_kernel<A>, merging_blocks(s.channels.value), dim3(kThreads), stream, partials,
                  chunks, double(s.outer) * double(s.inner), s.momentum, s.eps, s.channels, s.stats, coefficients,
                  s.parameters);
  return cudaGetLastError();
}

template <class A> cudaError_t batch_norm_act_prepare(A* coefficients, const BatchNormCuda& s, cudaStream_t stream) {
  if (s.channels.value == 0) return cudaSuccess;
  FASTSLIM_LAUNCH(batch_norm_act_prepare_kernel<A>, dim3(unsigned(ceil_div(s.channels.value, kThreads))),
                  dim3(kThreads), stream, s.eps, s.channels, s.stats, coefficients, s.parameters);
  return cudaGetLastError();
}

template cudaError_t batch_norm_act_statistics(const float*, float*, const BatchNormCuda&, cudaStream_t);
template cudaError_t batch_norm_act_statistics(const bfloat16*, float*, const BatchNormCuda&, cudaStream_t);
template cudaError_t batch_norm_act_statistics(const float16*, float*, const BatchNormCuda&, cudaStream_t);
template cudaError_t batch_norm_act_statistics(const double*, double*, const BatchNormCuda&, cudaStream_t);
template cudaError_t batch_norm_finalize(const float*, const BatchNormChunks&, float*, const BatchNormCuda&,
                                         cudaStream_t);
template cudaError_t batch_norm_finalize(const double*, const BatchNormChunks&, double*, const BatchNormCuda&,
                                         cudaStream_t);
template cudaError_t batch_norm_act_prepare(float*, const BatchNormCuda&, cudaStream_t);
template cudaError_t batch_norm_act_prepare(double*, const BatchNormCuda&, cudaStream_t);

}  // namespace fastslim
