// Depthwise convolution of channels_last images, a vector of channels and a strip of outputs a thread:
//   y[n, oh, ow, c] = b[c] + sum_{kh,kw} w[c, kh, kw] * x'[n, oh*s - p + kh, ow*s - p + kw, c]
// x' = clamp((x - center) * scale + shift) where there is a prologue, else x; 0 outside the image.
// The input gradient at stride 1 is the same with the filter flipped, x = grad_y and p = K - 1 - p.
// Filters stand in shared memory as fp32; an input vector is converted once and used for all its taps of a row.
#include "depthwise_conv2d_vector.h"

namespace fastslim {
namespace {

using namespace depthwise;
using Shape = DepthwiseConv2dCuda;
constexpr int kThreads = 128;
template <int K> constexpr int kLanes = K == 7 ? 16 : 32;
template <int Stride> constexpr int kStrips = Stride == 2 ? 2 : 4;  // outputs of a thread along W

// Grid: (chunks, channel tiles). Fused: with prologue (identity if null) and statistics (none if null).
template <class T, int V, int K, int Stride, bool Fused>
__global__ void __launch_bounds__(kThreads, K == 7 && Fused    ? 2
                                            : K == 3 && !Fused ? 4
                                                               : 3)
    depthwise_conv2d_vector_fwd_kernel(const T* __restrict__ x,       // [N, H, W, C]
                                       const T* __restrict__ weight,  // [C_full, 1, K, K], strided
                                       const T* __restrict__ bias,    // [C_full] or null
                                       T* __restrict__ y,             // [N, Ho, Wo, C]
                                       const Shape s, const Tiling t, const DepthwiseConv2dFusion fusion,
                                       const bool flipped) {
  constexpr int kStrip = kStrips<Stride>, kInputs = (kStrip - 1) * Stride + K;
  using Row = SharedRow<V, kLanes<K>>;
  alignas(16) __shared__ float filter[K * K][Row::kSize];
  alignas(16) __shared__ float offset[Row::kSize];
  alignas(16) __shared__ float normal[Fused ? 3 : 1][Row::kSize];
  alignas(16) __shared__ float first[Fused ? Row::kSize : 1];
  alignas(16) __shared__ float sums[Fused ? 2 : 1][Fused ? kThreads * V : 1];
  using Slots = SharedRow<V, kThreads>;
  constexpr int kParts = V / kPart<V>;

  const int channels = s.channels.get();
  const int64_t stride = channels * int64_t(sizeof(T));
  const int begin = int(blockIdx.y) * t.lanes * V;
  if (begin >= channels) return;
  const int count = channels - begin < t.lanes * V ? channels - begin : t.lanes * V;
  const int thread = int(threadIdx.y) * t.lanes + int(threadIdx.x), threads = t.lanes * t.slots;

  for (int i = thread; i < count * K * K; i += threads) {
    const int channel = i / (K * K), tap = i % (K * K), kh = tap / K, kw = tap % K;
    const T w = weight[full_row(s, begin + channel) * s.row + kh * s.tap_h + kw * s.tap_w];
    filter[flipped ? K * K - 1 - tap : tap][Row::index(channel)] = to_accumulate(w);
  }
  for (int i = thread; i < count; i += threads) {
    offset[Row::index(i)] = bias ? to_accumulate(bias[full_row(s, begin + i) * s.bias]) : 0.f;
    if constexpr (Fused)
      for (int k = 0; k < 3; ++k)
        normal[k][Row::index(i)] = fusion.prologue ? fusion.prologue[k * channels + begin + i] : k == 1 ? 1.f : 0.f;
  }
  if constexpr (Fused)
    for (int k = 0; k < 2; ++k)
      for (int part = 0; part < kParts; ++part) Slots::part(sums[k], thread, part) = {};
  __syncthreads();

  const int lane = int(threadIdx.x), c = begin + lane * V;
  const int row_begin = int(blockIdx.x) * t.rows;
  const int items = t.rows * t.strips;
  for (int base = 0; base < items; base += t.slots) {  // uniform: there is a barrier inside
    const int item = base + int(threadIdx.y), strip = t.by_rows.divide(item);
    const int row = row_begin + item - strip * t.rows;
    const bool inside = c < channels && item < items && row < t.total;
    const int n = inside ? t.by_height.divide(row) : 0, oh = inside ? row - n * s.out_h : 0;
    const int ih_begin = oh * Stride - s.pad_h, iw_begin = strip * kStrip * Stride - s.pad_w;
    const T* image = x + int64_t(n) * s.in_h * s.in_w * channels + c;

    float sum[kStrip][V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float value = Row::part(offset, lane, i / kPart<V>).v[i % kPart<V>];
#pragma unroll
      for (int j = 0; j < kStrip; ++j) sum[j][i] = value;
    }
#pragma unroll 1  // unrolled, all rows would be in registers at once
    for (int kh = 0; kh < K; ++kh) {
      const int ih = ih_begin + kh;
      const bool row_inside = inside && unsigned(ih) < unsigned(s.in_h);
      const Columns<T, V> line(image + (ih * s.in_w + iw_begin) * channels, stride);
      Packed<T, V> inputs[kInputs];
#pragma unroll
      for (int j = 0; j < kInputs; ++j)
        inputs[j] = line.load_if(row_inside && unsigned(iw_begin + j) < unsigned(s.in_w), j);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Vector<float, kPart<V>> w[K];
#pragma unroll
        for (int kw = 0; kw < K; ++kw) w[kw] = Row::part(filter[kh * K + kw], lane, part);
        Normal<V> norm;
        if constexpr (Fused)
          norm = {Row::part(normal[0], lane, part), Row::part(normal[1], lane, part), Row::part(normal[2], lane, part),
                  fusion.low, fusion.high};
#pragma unroll
        for (int j = 0; j < kInputs; ++j) {
          const bool padding = !row_inside || unsigned(iw_begin + j) >= unsigned(s.in_w);
#pragma unroll
          for (int i = 0; i < kPart<V>; ++i) {
            float v = inputs[j][part * kPart<V> + i];
            if constexpr (Fused) v = padding ? 0.f : norm.apply(v, i);
#pragma unroll
            for (int kw = 0; kw < K; ++kw)
              if ((j - kw) % Stride == 0 && j >= kw && (j - kw) / Stride < kStrip)
                sum[(j - kw) / Stride][part * kPart<V> + i] += v * w[kw].v[i];
          }
        }
      }
    }

    T* out = y + (int64_t(n) * s.out_h * s.out_w + oh * s.out_w + strip * kStrip) * channels + c;
#pragma unroll
    for (int j = 0; j < kStrip; ++j)
      if (inside && strip * kStrip + j < s.out_w) store(out + j * channels, sum[j]);

    if constexpr (Fused) {
      if (!fusion.partials) continue;
#pragma unroll
      for (int j = 0; j < kStrip; ++j)
#pragma unroll
        for (int i = 0; i < V; ++i) {
          T rounded;
          from_accumulate(sum[j][i], &rounded);
          sum[j][i] = to_accumulate(rounded);
        }
      if (base == 0) {
        if (inside && threadIdx.y == 0)
#pragma unroll
          for (int i = 0; i < V; ++i) first[Row::index(lane * V + i)] = sum[0][i];
        __syncthreads();
      }
      if (!inside) continue;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        auto &total = Slots::part(sums[0], thread, part), &squares = Slots::part(sums[1], thread, part);
        Vector<float, kPart<V>> shift = Row::part(first, lane, part), a = total, b = squares;
#pragma unroll
        for (int j = 0; j < kStrip; ++j)
          if (strip * kStrip + j < s.out_w)
#pragma unroll
            for (int i = 0; i < kPart<V>; ++i) {
              const float difference = sum[j][part * kPart<V> + i] - shift.v[i];
              a.v[i] += difference, b.v[i] += difference * difference;
            }
        total = a, squares = b;
      }
    }
  }

  if constexpr (Fused) {
    if (!fusion.partials) return;
    __syncthreads();
    float* partial = fusion.partials + int64_t(blockIdx.x) * 3 * channels + begin;
    for (int channel = thread; channel < count; channel += threads) {
      partial[channel] = first[Row::index(channel)];
      for (int k = 0; k < 2; ++k) {
        float sum = 0;
        for (int slot = 0; slot < t.slots; ++slot) sum += sums[k][Slots::index(slot * t.lanes * V + channel)];
        partial[(k + 1) * channels + channel] = sum;
      }
    }
  }
}

template <class T, int V, int K, int Stride, bool Fused>
cudaError_t launch(const T* x, const T* weight, const T* bias, T* y, const Shape& s,
                   const DepthwiseConv2dFusion& fusion, bool flipped, cudaStream_t stream) {
  const Tiling t = make_tiling(ceil_divide(s.channels.value, V), kThreads, kLanes<K>, s.batch, s.out_h,
                               ceil_divide(s.out_w, kStrips<Stride>), depthwise_conv2d_statistics_chunks(s));
  const auto kernel = depthwise_conv2d_vector_fwd_kernel<T, V, K, Stride, Fused>;
  FASTSLIM_LAUNCH(kernel, dim3(unsigned(t.chunks), unsigned(t.tiles)), dim3(unsigned(t.lanes), unsigned(t.slots)),
                  stream, x, weight, bias, y, s, t, fusion, flipped);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t DepthwiseConv2dVectorForward<T>::run(const T* x, const T* weight, const T* bias, T* y, const Shape& s,
                                                 const DepthwiseConv2dFusion* fusion, bool flipped,
                                                 cudaStream_t stream) {
  if (s.batch == 0 || s.channels.value == 0) return cudaSuccess;
  const DepthwiseConv2dFusion none{};
  return for_vector<T>(s.multiple, x, y, [&](auto vector) {
    return for_kernel_size(s.kernel_h, [&](auto size) {
      constexpr int V = decltype(vector)::value, K = decltype(size)::value;
      constexpr bool kAlways = V < kVector<T>;  // narrow vectors have one kernel for both, to save compile time
      if (s.stride_h == 1)
        return fusion ? launch<T, V, K, 1, true>(x, weight, bias, y, s, *fusion, flipped, stream)
                      : launch<T, V, K, 1, kAlways>(x, weight, bias, y, s, none, flipped, stream);
      return fusion ? launch<T, V, K, 2, true>(x, weight, bias, y, s, *fusion, flipped, stream)
                    : launch<T, V, K, 2, kAlways>(x, weight, bias, y, s, none, flipped, stream);
    });
  });
}

template struct DepthwiseConv2dVectorForward<float>;
template struct DepthwiseConv2dVectorForward<bfloat16>;
template struct DepthwiseConv2dVectorForward<float16>;

}  // namespace fastslim
