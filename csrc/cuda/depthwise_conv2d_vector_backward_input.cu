// Input gradient of a depthwise convolution with stride 2, channels_last, a vector of channels and a strip a thread:
//   grad_x[n, ih, iw, c] = sum over kh = ih + p - 2 oh, kw = iw + p - 2 ow of w[c, kh, kw] * grad_y[n, oh, ow, c]
// Of the taps, an even ih + p takes the even kh and an odd one the odd kh; so along W. With u = iw + p =
// 2 (q + j) + e and kw = 2 k + e, ow = q + j - k: a strip is two j with both parities e, and all its
// outputs share the same few columns of grad_y.
#include "depthwise_conv2d_vector.h"

namespace fastslim {
namespace {

using namespace depthwise;
using Shape = DepthwiseConv2dCuda;
constexpr int kThreads = 128;
template <int K> constexpr int kLanes = K == 7 ? 16 : 32;
constexpr int kPairs = 2, kStrip = 2 * kPairs;  // outputs of a thread along W

// Grid: (chunks, channel tiles).
template <class T, int V, int K>
__global__ void __launch_bounds__(kThreads, K == 7 ? 4 : 5)
    depthwise_conv2d_vector_bwd_input_kernel(const T* __restrict__ grad_y,  // [N, Ho, Wo, C]
                                             const T* __restrict__ weight,  // [C_full, 1, K, K], strided
                                             T* __restrict__ grad_x,        // [N, H, W, C]
                                             const Shape s, const Tiling t) {
  constexpr int kBefore = (K - 1) / 2, kInputs = kPairs + kBefore;
  using Row = SharedRow<V, kLanes<K>>;
  alignas(16) __shared__ float filter[K * K][Row::kSize];

  const int channels = s.channels.get();
  const int64_t stride = channels * int64_t(sizeof(T));
  const int begin = int(blockIdx.y) * t.lanes * V;
  if (begin >= channels) return;
  const int count = channels - begin < t.lanes * V ? channels - begin : t.lanes * V;
  const int thread = int(threadIdx.y) * t.lanes + int(threadIdx.x), threads = t.lanes * t.slots;
  for (int i = thread; i < count * K * K; i += threads) {
    const int channel = i / (K * K), tap = i % (K * K), kh = tap / K, kw = tap % K;
    const T w = weight[full_row(s, begin + channel) * s.row + kh * s.tap_h + kw * s.tap_w];
    filter[tap][Row::index(channel)] = to_accumulate(w);
  }
  __syncthreads();

  const int lane = int(threadIdx.x), c = begin + lane * V;
  if (c >= channels) return;
  const int items = t.rows * t.strips;
  for (int item = int(threadIdx.y); item < items; item += t.slots) {
    const int strip = t.by_rows.divide(item);
    const int row = int(blockIdx.x) * t.rows + item - strip * t.rows;
    if (row >= t.total) continue;
    const int n = t.by_height.divide(row), ih = row - n * s.in_h;
    const int q = s.pad_w / 2 + strip * kPairs, iw_begin = 2 * q - s.pad_w, ow_begin = q - kBefore;
    const int parity = (ih + s.pad_h) % 2, qh = (ih + s.pad_h) / 2;
    const T* image = grad_y + int64_t(n) * s.out_h * s.out_w * channels + c;

    float sum[kStrip][V] = {};
#pragma unroll(K == 3 ? 2 : 1)
    for (int k = 0; k <= kBefore; ++k) {
      const int oh = qh - k, kh = 2 * k + parity;
      const bool row_inside = kh < K && unsigned(oh) < unsigned(s.out_h);
      const Columns<T, V> line(image + (oh * s.out_w + ow_begin) * channels, stride);
      Packed<T, V> inputs[kInputs];
#pragma unroll
      for (int j = 0; j < kInputs; ++j)
        inputs[j] = line.load_if(row_inside && unsigned(ow_begin + j) < unsigned(s.out_w), j);
      if (!row_inside) continue;
#pragma unroll
      for (int part = 0; part < V / kPart<V>; ++part) {
        Vector<float, kPart<V>> w[K];
#pragma unroll
        for (int kw = 0; kw < K; ++kw) w[kw] = Row::part(filter[kh * K + kw], lane, part);
#pragma unroll
        for (int j = 0; j < kInputs; ++j)
#pragma unroll
          for (int i = 0; i < kPart<V>; ++i) {
            const float v = inputs[j][part * kPart<V> + i];
#pragma unroll
            for (int kw = 0; kw < K; ++kw) {
              const int pair = j - kBefore + kw / 2;
              if (pair >= 0 && pair < kPairs) sum[2 * pair + kw % 2][part * kPart<V> + i] += v * w[kw].v[i];
            }
          }
      }
    }

    T* out = grad_x + (int64_t(n) * s.in_h * s.in_w + ih * s.in_w + iw_begin) * channels + c;
#pragma unroll
    for (int j = 0; j < kStrip; ++j)
      if (unsigned(iw_begin + j) < unsigned(s.in_w)) store(out + j * channels, sum[j]);
  }
}

template <class T, int V, int K>
cudaError_t launch(const T* grad_y, const T* weight, T* grad_x, const Shape& s, cudaStream_t stream) {
  const int vectors = ceil_divide(s.channels.value, V);
  const Tiling t = make_tiling(vectors, kThreads, kLanes<K>, s.batch, s.in_h, ceil_divide(s.in_w + s.pad_w % 2, kStrip),
                               cut_rows(s.batch * s.in_h, chunks_of(s.channels.value)));
  const auto kernel = depthwise_conv2d_vector_bwd_input_kernel<T, V, K>;
  FASTSLIM_LAUNCH(kernel, dim3(unsigned(t.chunks), unsigned(t.tiles)), dim3(unsigned(t.lanes), unsigned(t.slots)),
                  stream, grad_y, weight, grad_x, s, t);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t DepthwiseConv2dVectorBackwardInput<T>::run(const T* grad_y, const T* weight, T* grad_x, const Shape& s,
                                                       cudaStream_t stream) {
  return for_vector<T>(s.multiple, grad_y, grad_x, [&](auto vector) {
    return for_kernel_size(s.kernel_h, [&](auto size) {
      return launch<T, decltype(vector)::value, decltype(size)::value>(grad_y, weight, grad_x, s, stream);
    });
  });
}

template struct DepthwiseConv2dVectorBackwardInput<float>;
template struct DepthwiseConv2dVectorBackwardInput<bfloat16>;
template struct DepthwiseConv2dVectorBackwardInput<float16>;

}  // namespace fastslim
