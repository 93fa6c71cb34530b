// Forward of batch_norm_act: y = act((x - center) * scale + shift (+ residual)), and its launcher.
#include "batch_norm_act_common.cuh"
#include "batch_norm_act_statistics.cuh"

namespace fastslim {
namespace {

template <class T, int V, bool Planes, Family F, Choice Residual>
__global__ void __launch_bounds__(kThreads, resident(F == Family::clamp || Residual == Choice::no))
    batch_norm_act_fwd_kernel(const T* __restrict__ x,                         // [outer, C, inner]
                              const T* __restrict__ residual,                  // [outer, C, inner]
                              T* __restrict__ y,                               // [outer, C, inner]
                              const Accumulate<T>* __restrict__ coefficients,  // [3][C]
                              const Width width, const Tiling tiling, const ActivationArgs<Accumulate<T>> activation) {
  using A = Accumulate<T>;
  constexpr int K = kChannelsOf<V, Planes>;
  const bool add = chosen<Residual>(residual != nullptr);
  const int32_t channels = width.get();
  auto cursor = cursor_of<V, Planes>(tiling, channels, true);
  if (cursor.remaining <= 0) return;
  A center[K], scale[K], shift[K];
  load_channels(coefficients + cursor.channel, center);
  load_channels(coefficients + channels + cursor.channel, scale);
  load_channels(coefficients + 2 * int64_t(channels) + cursor.channel, shift);
  struct Loaded {
    Vector<T, V> x, residual;
  };
  walk<kApplyUnroll>(
      cursor,
      [&](int64_t at) {
        Loaded v;
        v.x = fetch<V>(x + at);
        if (add) v.residual = fetch<V>(residual + at);
        return v;
      },
      [&](const Loaded& v, int64_t at) {
        A z[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
          z[i] = (to_accumulate(v.x.v[i]) - center[i % K]) * scale[i % K] + shift[i % K];
          if (add) z[i] += to_accumulate(v.residual.v[i]);
        }
        activate<T, F>(z, activation);
        store<V>(y + at, z);
      });
}

template <class T>
cudaError_t apply(const T* x, const T* residual, T* y, const Accumulate<T>* coefficients, const BatchNormCuda& s,
                  cudaStream_t stream) {
  const int elements = vector_of<T>(s, {x, residual, y});
  const Tiling t = apply_tiling(s, elements);
  const auto args = activation_args<Accumulate<T>>(s.activation);
  with_variant<T>(s, elements, args.family, residual != nullptr, [&](auto vector, auto planes, auto family, auto add) {
    FASTSLIM_LAUNCH((batch_norm_act_fwd_kernel<T, decltype(vector)::value, decltype(planes)::value,
                                               decltype(family)::value, decltype(add)::value>),
                    blocks_of(t), dim3(kThreads), stream, x, residual, y, coefficients, s.channels, t, args);
  });
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t BatchNormActCudaLaunchers<T>::forward(const T* x, const T* residual, T* y, const BatchNormCuda& s,
                                                  cudaStream_t stream) {
  A* const coefficients = static_cast<A*>(s.workspace);
  cudaError_t error = cudaSuccess;
  if (s.training && !empty(s)) {
    A* const partials = coefficients + 3 * padded(s.channels.value);
    error = batch_norm_act_statistics(x, partials, s, stream);
    if (error != cudaSuccess) return error;
    error = batch_norm_finalize(partials, chunks_of(statistics_tiling(s, vector_of<T>(s, {x})), s.inner), coefficients,
                                s, stream);
  } else {
    error = batch_norm_act_prepare(coefficients, s, stream);
  }
  if (error != cudaSuccess || empty(s)) return error;
  return apply(x, residual, y, coefficients, s, stream);
}

template <class T> int64_t BatchNormActCudaLaunchers<T>::workspace_bytes(const BatchNormCuda& s) {
  int64_t most_values = 5 * padded(s.channels.value);
  if (empty(s)) return most_values * int64_t(sizeof(A));
  for (const int elements : {1, vector_of<T>(s, {})}) {
    const int64_t channels = s.channels.value;
    const int64_t forward = 3 * padded(channels) + 3 * channels * statistics_tiling(s, elements).chunks;
    const int64_t backward = 5 * padded(channels) + 2 * channels * gradient_tiling(s, elements).chunks;
    most_values = most(most_values, most(forward, backward));
  }
  return most_values * int64_t(sizeof(A));
}

#define FASTSLIM_INSTANTIATE(T)                                                                            \
  template int64_t BatchNormActCudaLaunchers<T>::workspace_bytes(const BatchNormCuda&);                    \
  template cudaError_t BatchNormActCudaLaunchers<T>::forward(const T*, const T*, T*, const BatchNormCuda&, \
                                                             cudaStream_t);
FASTSLIM_INSTANTIATE(float)
FASTSLIM_INSTANTIATE(bfloat16)
FASTSLIM_INSTANTIATE(float16)
FASTSLIM_INSTANTIATE(double)
#undef FASTSLIM_INSTANTIATE

}  // namespace fastslim
