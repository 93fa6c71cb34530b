// Weight gradient of a depthwise convolution, channels_last, in two stages of fixed order (no atomics):
//   partial[chunk, kh*K + kw, c] = sum over the chunk's (n, oh, ow) of grad_y[n, oh, ow, c] * x'[n, oh*s-p+kh,
//   ow*s-p+kw, c] partial[chunk, K*K, c]       = sum over the chunk of grad_y[n, oh, ow, c] grad_w[row(c), kh, kw] (+)=
//   sum over chunks, grad_b[row(c)] (+)= sum over chunks, in double
// A thread sums one row of taps, kh, of a vector of channels; its neighbours along threadIdx.y take the
// other rows of the same outputs, which they find in the L1 cache.
#include "depthwise_conv2d_vector.h"

namespace fastslim {
namespace {

using namespace depthwise;
using Shape = DepthwiseConv2dCuda;
constexpr int kThreads = 128;
constexpr int kBlocks = 132 * 3;  // as many as an H200 has resident: more would only write more partial sums
constexpr int kFinishChannels = 8, kFinishParts = kThreads / kFinishChannels;
template <int K> constexpr int kLanes = K == 3 ? 32 : 8;
template <int Stride> constexpr int kStrips = Stride == 2 ? 2 : 4;  // outputs of a step along W

// Grid: (chunks, channel tiles); block: (lanes, slots * K).
template <class T, int V, int K, int Stride, bool Normalised>
__global__ void __launch_bounds__(kThreads, K == 3                  ? 4
                                            : K == 5 || !Normalised ? 3
                                                                    : 2)
    depthwise_conv2d_vector_bwd_weight_kernel(const T* __restrict__ grad_y,  // [N, Ho, Wo, C]
                                              const T* __restrict__ x,       // [N, H, W, C]
                                              float* __restrict__ partials,  // [chunks, K * K + 1, C]
                                              const Shape s, const Tiling t, const DepthwiseConv2dFusion fusion) {
  constexpr int kStrip = kStrips<Stride>, kInputs = (kStrip - 1) * Stride + K;
  using Row = SharedRow<V, kLanes<K>>;
  using Slots = SharedRow<V, kThreads>;
  alignas(16) __shared__ float normal[Normalised ? 3 : 1][Row::kSize];
  alignas(16) __shared__ float merged[Slots::kSize];

  const int channels = s.channels.get();
  const int64_t stride = channels * int64_t(sizeof(T));
  const int begin = int(blockIdx.y) * t.lanes * V;
  if (begin >= channels) return;
  const int count = channels - begin < t.lanes * V ? channels - begin : t.lanes * V;
  const int lane = int(threadIdx.x), thread = int(threadIdx.y) * t.lanes + lane;
  const int threads = t.lanes * t.slots * K;
  const int kh = int(threadIdx.y) % K, slot = int(threadIdx.y) / K;
  if constexpr (Normalised) {
    for (int i = thread; i < count; i += threads)
      for (int k = 0; k < 3; ++k)
        normal[k][Row::index(i)] = fusion.prologue ? fusion.prologue[k * channels + begin + i] : k == 1 ? 1.f : 0.f;
    __syncthreads();
  }

  float sum[K][V] = {}, bias_sum[V] = {};
  const int c = begin + lane * V, items = t.rows * t.strips;
  for (int item = slot; c < channels && item < items; item += t.slots) {
    const int strip = t.by_rows.divide(item);
    const int row = int(blockIdx.x) * t.rows + item - strip * t.rows;
    if (row >= t.total) continue;
    const int n = t.by_height.divide(row), oh = row - n * s.out_h, ow_begin = strip * kStrip;
    const int ih = oh * Stride - s.pad_h + kh, iw_begin = ow_begin * Stride - s.pad_w;
    const T* first = grad_y + (int64_t(n) * s.out_h * s.out_w + oh * s.out_w + ow_begin) * channels + c;
    const Columns<T, V> gradients(first, stride);
    const T* image = x + int64_t(n) * s.in_h * s.in_w * channels + c;

    Packed<T, V> outputs[kStrip];
#pragma unroll
    for (int j = 0; j < kStrip; ++j) outputs[j] = gradients.load_if(ow_begin + j < s.out_w, j);
    const bool row_inside = unsigned(ih) < unsigned(s.in_h);
    const Columns<T, V> line(image + (ih * s.in_w + iw_begin) * channels, stride);
    Packed<T, V> inputs[kInputs];
#pragma unroll
    for (int j = 0; j < kInputs; ++j)
      inputs[j] = line.load_if(row_inside && unsigned(iw_begin + j) < unsigned(s.in_w), j);
#pragma unroll
    for (int part = 0; part < V / kPart<V>; ++part) {
      Normal<V> norm;
      if constexpr (Normalised)
        norm = {Row::part(normal[0], lane, part), Row::part(normal[1], lane, part), Row::part(normal[2], lane, part),
                fusion.low, fusion.high};
      float g[kStrip][kPart<V>];
#pragma unroll
      for (int j = 0; j < kStrip; ++j)
#pragma unroll
        for (int i = 0; i < kPart<V>; ++i) {
          g[j][i] = outputs[j][part * kPart<V> + i];
          bias_sum[part * kPart<V> + i] += g[j][i];
        }
#pragma unroll
      for (int j = 0; j < kInputs; ++j) {
        const bool padding = !row_inside || unsigned(iw_begin + j) >= unsigned(s.in_w);
#pragma unroll
        for (int i = 0; i < kPart<V>; ++i) {
          float v = inputs[j][part * kPart<V> + i];
          if constexpr (Normalised) v = padding ? 0.f : norm.apply(v, i);
#pragma unroll
          for (int kw = 0; kw < K; ++kw)
            if ((j - kw) % Stride == 0 && j >= kw && (j - kw) / Stride < kStrip)
              sum[kw][part * kPart<V> + i] += v * g[(j - kw) / Stride][i];
        }
      }
    }
  }

  // The slots' sums of one tap in each row of taps, then of the bias (kw = K), in the slots' order.
  float* partial = partials + int64_t(blockIdx.x) * (K * K + 1) * channels + begin;
#pragma unroll
  for (int kw = 0; kw <= K; ++kw) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < V; ++i)
      Slots::part(merged, thread, i / kPart<V>).v[i % kPart<V>] = kw < K ? sum[kw < K ? kw : 0][i] : bias_sum[i];
    __syncthreads();
    for (int i = thread; i < count * (kw < K ? K : 1); i += threads) {
      const int channel = i % count, of = i / count;
      float total = 0;
      for (int j = 0; j < t.slots; ++j) total += merged[Slots::index((j * K + of) * t.lanes * V + channel)];
      partial[(kw < K ? of * K + kw : K * K) * channels + channel] = total;
    }
  }
}

// Grid: (channels / kFinishChannels, K * K + 1).
__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_vector_bwd_weight_finish_kernel(const float* __restrict__ partials,  // [chunks, K * K + 1, C]
                                                     float* __restrict__ grad_weight,     // [C_full, 1, K, K], strided
                                                     float* __restrict__ grad_bias,       // [C_full] or null
                                                     bool add_weight, bool add_bias, int chunks, const Shape s) {
  __shared__ double of_part[kFinishParts][kFinishChannels];
  const int channels = s.channels.get(), taps = s.kernel_h * s.kernel_w, tap = int(blockIdx.y);
  const int lane = int(threadIdx.x) % kFinishChannels, part = int(threadIdx.x) / kFinishChannels;
  const int c = int(blockIdx.x) * kFinishChannels + lane;
  double sum = 0;
  if (c < channels)
    for (int chunk = part; chunk < chunks; chunk += kFinishParts)
      sum += double(partials[(int64_t(chunk) * (taps + 1) + tap) * channels + c]);
  of_part[part][lane] = sum;
  __syncthreads();
  if (part != 0 || c >= channels) return;
  for (int i = 1; i < kFinishParts; ++i) sum += of_part[i][lane];
  const bool is_bias = tap == taps, add = is_bias ? add_bias : add_weight;
  const int64_t row = full_row(s, c);
  float* target = is_bias ? grad_bias + row * s.bias
                          : grad_weight + row * s.row + tap / s.kernel_w * s.tap_h + tap % s.kernel_w * s.tap_w;
  *target = float(add ? double(*target) + sum : sum);
}

DepthwiseConv2dRowChunks cut(const Shape& s) {
  const int tiles = ceil_divide(s.channels.value, 256);
  return cut_rows(s.batch * s.out_h, kBlocks / (tiles < kBlocks ? tiles : kBlocks));
}

template <class T, int V, int K, int Stride, bool Normalised>
cudaError_t launch(const T* grad_y, const T* x, float* workspace, const Shape& s, const DepthwiseConv2dFusion& fusion,
                   cudaStream_t stream) {
  const Tiling t = make_tiling(ceil_divide(s.channels.value, V), kThreads / K, kLanes<K>, s.batch, s.out_h,
                               ceil_divide(s.out_w, (kStrips<Stride>)), cut(s));
  if (t.chunks == 0) return cudaSuccess;
  const auto kernel = depthwise_conv2d_vector_bwd_weight_kernel<T, V, K, Stride, Normalised>;
  FASTSLIM_LAUNCH(kernel, dim3(unsigned(t.chunks), unsigned(t.tiles)), dim3(unsigned(t.lanes), unsigned(t.slots * K)),
                  stream, grad_y, x, workspace, s, t, fusion);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t DepthwiseConv2dVectorBackwardWeight<T>::run(const T* grad_y, const T* x, float* grad_weight,
                                                        float* grad_bias, float* workspace, bool add_weight,
                                                        bool add_bias, const Shape& s,
                                                        const DepthwiseConv2dFusion* fusion, cudaStream_t stream) {
  if (s.channels.value == 0) return cudaSuccess;
  const DepthwiseConv2dFusion none{};
  const bool normalised = fusion && fusion->prologue;
  const cudaError_t error = for_vector<T>(s.multiple, grad_y, x, [&](auto vector) {
    return for_kernel_size(s.kernel_h, [&](auto size) {
      constexpr int V = decltype(vector)::value, K = decltype(size)::value;
      constexpr bool kAlways = V < kVector<T>;  // narrow vectors have one kernel for both, to save compile time
      if (s.stride_h == 1)
        return normalised ? launch<T, V, K, 1, true>(grad_y, x, workspace, s, *fusion, stream)
                          : launch<T, V, K, 1, kAlways>(grad_y, x, workspace, s, none, stream);
      return normalised ? launch<T, V, K, 2, true>(grad_y, x, workspace, s, *fusion, stream)
                        : launch<T, V, K, 2, kAlways>(grad_y, x, workspace, s, none, stream);
    });
  });
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned(ceil_divide(s.channels.value, kFinishChannels)),
                  unsigned(s.kernel_h * s.kernel_w + (grad_bias ? 1 : 0)));
  FASTSLIM_LAUNCH(depthwise_conv2d_vector_bwd_weight_finish_kernel, grid, dim3(kThreads), stream, workspace,
                  grad_weight, grad_bias, add_weight, add_bias, cut(s).chunks, s);
  return cudaGetLastError();
}

template <class T> int64_t DepthwiseConv2dVectorBackwardWeight<T>::workspace(const Shape& s) {
  return int64_t(cut(s).chunks) * (s.kernel_h * s.kernel_w + 1) * s.channels.value;
}

template struct DepthwiseConv2dVectorBackwardWeight<float>;
template struct DepthwiseConv2dVectorBackwardWeight<bfloat16>;
template struct DepthwiseConv2dVectorBackwardWeight<float16>;

}  // namespace fastslim
