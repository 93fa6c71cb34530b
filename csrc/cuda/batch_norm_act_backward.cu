// Backward of batch_norm_act: sums of dz and of dz * (x - center) over chunks, then gradients of the
// parameters, then dx = dz * scale + (x - center) * slope + offset and dresidual = dz.
#include "batch_norm_act_common.cuh"

namespace fastslim {
namespace {

template <class T, int V> struct Operands {
  Vector<T, V> dy, x, extra;
};

// dz of one vector, and x - center.
template <class T, int V, int K, Family F>
__device__ static inline void differentiate(const Operands<T, V>& v, bool add, const Accumulate<T> (&center)[K],
                                            const Accumulate<T> (&scale)[K], const Accumulate<T> (&shift)[K],
                                            const ActivationArgs<Accumulate<T>>& activation, Accumulate<T> (&dz)[V],
                                            Accumulate<T> (&centered)[V]) {
  Accumulate<T> z[V];
  // With a residual the bounds are told from y, which holds what x alone does not.
  const bool from_output = add && (F == Family::any ? activation.family == Family::clamp : F == Family::clamp);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    dz[i] = to_accumulate(v.dy.v[i]);
    centered[i] = to_accumulate(v.x.v[i]) - center[i % K];
    z[i] = centered[i] * scale[i % K] + shift[i % K];
    if (add) z[i] = to_accumulate(v.extra.v[i]) + (from_output ? 0 : z[i]);
  }
  activate_backward<T, F>(dz, z, activation);
}

// Sums need no coefficients from an earlier kernel: a block makes those of its own channels.
template <class T, int V, bool Planes, Family F, Choice Extra>
__global__ void __launch_bounds__(kThreads, resident(F == Family::clamp))
    batch_norm_act_bwd_sums_kernel(const T* __restrict__ dy,              // [outer, C, inner]
                                   const T* __restrict__ x,               // [outer, C, inner]
                                   const T* __restrict__ extra,           // [outer, C, inner]
                                   const double* __restrict__ stats,      // [2][C]
                                   Accumulate<T>* __restrict__ partials,  // [chunks][2][C]
                                   const Width width, const Tiling tiling,
                                   const ActivationArgs<Accumulate<T>> activation, const BatchNormParameters p) {
  using A = Accumulate<T>;
  constexpr int K = kChannelsOf<V, Planes>;
  __align__(16) __shared__ A of_channel[3][kThreads];
  const bool add = chosen<Extra>(extra != nullptr);
  const int32_t channels = width.get();
  auto cursor = cursor_of<V, Planes>(tiling, channels, false);
  if (Planes && cursor.beyond) return;
  const int32_t first = Planes ? cursor.channel : int32_t(blockIdx.x) / tiling.chunks * tiling.across * V;
  const int32_t mine = first + threadIdx.x, end = first + (Planes ? 1 : tiling.across * V);
  if (mine < end && mine < channels) {
    const Coefficients k = coefficients_of<A>(p, full_channel(p.segments, mine), stats[mine], stats[channels + mine]);
    of_channel[0][threadIdx.x] = A(k.center);
    of_channel[1][threadIdx.x] = A(k.scale);
    of_channel[2][threadIdx.x] = A(k.shift);
  }
  __syncthreads();
  A center[K] = {}, scale[K] = {}, shift[K] = {}, sums[2 * K] = {};
  if (!cursor.beyond) {
    load_channels(of_channel[0] + (cursor.channel - first), center);
    load_channels(of_channel[1] + (cursor.channel - first), scale);
    load_channels(of_channel[2] + (cursor.channel - first), shift);
  }
  walk<kGradientUnroll>(
      cursor,
      [&](int64_t at) {
        Operands<T, V> v;
        v.dy = fetch<V>(dy + at), v.x = fetch<V>(x + at);
        if (add) v.extra = fetch<V>(extra + at);
        return v;
      },
      [&](const Operands<T, V>& v, int64_t) {
        A dz[V], centered[V];
        differentiate<T, V, K, F>(v, add, center, scale, shift, activation, dz, centered);
#pragma unroll
        for (int i = 0; i < V; ++i) sums[i % K] += dz[i], sums[K + i % K] += dz[i] * centered[i];
      });
  merge_rows(sums, cursor.row, cursor.rows, Planes ? 1 : tiling.across, [](A(&a)[2 * K], const A(&b)[2 * K]) {
#pragma unroll
    for (int k = 0; k < 2 * K; ++k) a[k] += b[k];
  });
  if (cursor.row != 0 || cursor.beyond) return;
  A* out = partials + int64_t(cursor.chunk) * 2 * channels + cursor.channel;
#pragma unroll
  for (int k = 0; k < K; ++k) out[k] = sums[k], out[channels + k] = sums[K + k];
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_bwd_finalize_kernel(const A* __restrict__ partials,    // [chunks][2][C]
                                       const double* __restrict__ stats,  // [2][C]
                                       A* __restrict__ coefficients,      // [5][C]: center, scale, shift, slope, offset
                                       A* __restrict__ dweight,           // [C]
                                       A* __restrict__ dbias,             // [C]
                                       int32_t chunks, double values, bool training, const Width width,
                                       const BatchNormParameters p) {
  const int32_t channels = width.get(), c = int32_t(blockIdx.x) * kMergedChannels + threadIdx.x % kMergedChannels;
  double dz = 0, dz_x = 0;
  if (c < channels) {
#pragma unroll 4
    for (int32_t chunk = threadIdx.x / kMergedChannels; chunk < chunks; chunk += kMergers) {
      const A* of_chunk = partials + int64_t(chunk) * 2 * channels + c;
      dz += of_chunk[0], dz_x += of_chunk[channels];
    }
  }
  merge_chunks(dz, dz_x);
  if (threadIdx.x >= kMergedChannels || c >= channels) return;
  const double mean = stats[c], invstd = stats[channels + c];
  const Coefficients k = coefficients_of<A>(p, full_channel(p.segments, c), mean, invstd);
  const double gradient = (dz_x + (k.center - mean) * dz) * invstd;
  const double slope = training ? -k.scale * invstd * gradient / values : 0;
  const double offset = training ? -k.scale * dz / values + (k.center - mean) * slope : 0;
  dweight[c] = A(gradient);
  dbias[c] = A(dz);
  A* out = coefficients + c;
  const double all[5] = {k.center, k.scale, k.shift, slope, offset};
#pragma unroll
  for (int i = 0; i < 5; ++i) out[int64_t(i) * channels] = A(all[i]);
}

template <class T, int V, bool Planes, Family F, Choice Extra>
__global__ void __launch_bounds__(kThreads, resident(F == Family::clamp && Extra == Choice::no))
    batch_norm_act_bwd_kernel(const T* __restrict__ dy,                        // [outer, C, inner]
                              const T* __restrict__ x,                         // [outer, C, inner]
                              const T* __restrict__ extra,                     // [outer, C, inner]
                              T* __restrict__ dx,                              // [outer, C, inner]
                              T* __restrict__ dresidual,                       // [outer, C, inner] or null
                              const Accumulate<T>* __restrict__ coefficients,  // [5][C]
                              const Width width, const Tiling tiling, const ActivationArgs<Accumulate<T>> activation) {
  using A = Accumulate<T>;
  constexpr int K = kChannelsOf<V, Planes>;
  const bool add = chosen<Extra>(extra != nullptr);
  const int32_t channels = width.get();
  auto cursor = cursor_of<V, Planes>(tiling, channels, true);
  if (cursor.remaining <= 0) return;
  A center[K], scale[K], shift[K], slope[K], offset[K];
  const A* mine = coefficients + cursor.channel;
  load_channels(mine, center), mine += channels;
  load_channels(mine, scale), mine += channels;
  load_channels(mine, shift), mine += channels;
  load_channels(mine, slope), mine += channels;
  load_channels(mine, offset);
  walk<kGradientUnroll>(
      cursor,
      [&](int64_t at) {
        Operands<T, V> v;
        v.dy = fetch<V>(dy + at), v.x = fetch<V>(x + at);
        if (add) v.extra = fetch<V>(extra + at);
        return v;
      },
      [&](const Operands<T, V>& v, int64_t at) {
        A dz[V], centered[V];
        differentiate<T, V, K, F>(v, add, center, scale, shift, activation, dz, centered);
        if (add && dresidual) store<V>(dresidual + at, dz);
#pragma unroll
        for (int i = 0; i < V; ++i) dz[i] = dz[i] * scale[i % K] + (centered[i] * slope[i % K] + offset[i % K]);
        store<V>(dx + at, dz);
      });
}

// Partial sums [chunks][2][C]; returns how many chunks in `chunks`.
template <class T>
cudaError_t sum_chunks(const T* dy, const T* x, const T* extra, Accumulate<T>* partials, int32_t& chunks,
                       const BatchNormCuda& s, cudaStream_t stream) {
  const int elements = vector_of<T>(s, {dy, x, extra});
  const Tiling t = gradient_tiling(s, elements);
  const auto args = activation_args<Accumulate<T>>(s.activation);
  chunks = t.chunks;
  with_variant<T>(s, elements, args.family, extra, [&](auto vector, auto planes, auto family, auto add) {
    FASTSLIM_LAUNCH((batch_norm_act_bwd_sums_kernel<T, decltype(vector)::value, decltype(planes)::value,
                                                    decltype(family)::value, decltype(add)::value>),
                    blocks_of(t), dim3(kThreads), stream, dy, x, extra, s.stats, partials, s.channels, t, args,
                    s.parameters);
  });
  return cudaGetLastError();
}

template <class T>
cudaError_t apply(const T* dy, const T* x, const T* extra, T* dx, T* dresidual, const Accumulate<T>* coefficients,
                  const BatchNormCuda& s, cudaStream_t stream) {
  const int elements = vector_of<T>(s, {dy, x, extra, dx, dresidual});
  const Tiling t = apply_tiling(s, elements);
  const auto args = activation_args<Accumulate<T>>(s.activation);
  with_variant<T>(s, elements, args.family, extra, [&](auto vector, auto planes, auto family, auto add) {
    FASTSLIM_LAUNCH((batch_norm_act_bwd_kernel<T, decltype(vector)::value, decltype(planes)::value,
                                               decltype(family)::value, decltype(add)::value>),
                    blocks_of(t), dim3(kThreads), stream, dy, x, extra, dx, dresidual, coefficients, s.channels, t,
                    args);
  });
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t BatchNormActCudaLaunchers<T>::backward(const T* dy, const T* x, const T* extra, T* dx, T* dresidual,
                                                   A* dweight, A* dbias, bool sums, const BatchNormCuda& s,
                                                   cudaStream_t stream) {
  if (s.channels.value == 0) return cudaSuccess;
  A* const coefficients = static_cast<A*>(s.workspace);
  A* const partials = coefficients + 5 * padded(s.channels.value);
  int32_t chunks = 0;
  if (sums && !empty(s)) {
    const cudaError_t error = sum_chunks(dy, x, extra, partials, chunks, s, stream);
    if (error != cudaSuccess) return error;
  }
  FASTSLIM_LAUNCH(batch_norm_act_bwd_finalize_kernel<A>, merging_blocks(s.channels.value), dim3(kThreads), stream,
                  partials, s.stats, coefficients, dweight, dbias, chunks, double(s.outer) * double(s.inner),
                  s.training && chunks > 0, s.channels, s.parameters);
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess || empty(s) ? error : apply(dy, x, extra, dx, dresidual, coefficients, s, stream);
}

#define FASTSLIM_INSTANTIATE(T)                                \
  template cudaError_t BatchNormActCudaLaunchers<T>::backward( \
      const T*, const T*, const T*, T*, T*, Accumulate<T>*, Accumulate<T>*, bool, const BatchNormCuda&, cudaStream_t);
FASTSLIM_INSTANTIATE(float)
FASTSLIM_INSTANTIATE(bfloat16)
FASTSLIM_INSTANTIATE(float16)
FASTSLIM_INSTANTIATE(double)
#undef FASTSLIM_INSTANTIATE

}  // namespace fastslim
