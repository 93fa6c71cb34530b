// Direct depthwise convolution, one thread an output element; the weight gradient is one block a
// filter tap, summed in a fixed order, so repeats are bitwise equal:
//   y[n, o, oh, ow]        = b[o] + sum_{kh,kw} w[o, kh, kw] * x[n, o/m, oh*s - p + kh*d, ow*s - p + kw*d]
//   grad_x[n, c, ih, iw]   = sum_{o/m = c} sum_{kh,kw: oh*s - p + kh*d = ih, ...} w[o, kh, kw] * grad_y[n, o, oh, ow]
//   grad_w[o, kh, kw]      = sum_{n,oh,ow} grad_y[n, o, oh, ow] * x[n, o/m, oh*s - p + kh*d, ow*s - p + kw*d]
//   grad_b[o]              = sum_{n,oh,ow} grad_y[n, o, oh, ow]
#include "fastslim/cuda_launch.h"
#include "fastslim/depthwise_conv2d_cuda.h"

namespace fastslim {
namespace {

using Shape = DepthwiseConv2dCuda;
constexpr int kThreads = 256;

struct Position {
  int64_t n, c, h, w;
};

// The index-th element of an image, in the order in which it lies in memory.
__device__ static inline Position position(int64_t index, int64_t channels, int64_t height, int64_t width,
                                           bool channels_last) {
  Position at;
  if (channels_last) {
    at.c = index % channels, index /= channels;
    at.w = index % width, index /= width;
    at.h = index % height, at.n = index / height;
  } else {
    at.w = index % width, index /= width;
    at.h = index % height, index /= height;
    at.c = index % channels, at.n = index / channels;
  }
  return at;
}

__device__ static inline int64_t offset(const ImageStrides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * s.n + c * s.c + h * s.h + w * s.w;
}

// The full layer's filter that computes active output channel o.
__device__ static inline int64_t full_row(const Shape& s, int64_t o) {
  int64_t channel = o / s.multiplier;
  for (int i = 0; i < s.num_segments; ++i) {
    if (channel < s.count[i]) return (s.start[i] + channel) * s.multiplier + o % s.multiplier;
    channel -= s.count[i];
  }
  return 0;  // not reached: the counts add up to the channels
}

template <class T>
__global__ void depthwise_conv2d_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                                            const T* __restrict__ bias, T* __restrict__ y, const Shape s,
                                            int64_t total) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= total) return;
  const Position at = position(index, s.channels * s.multiplier, s.out_h, s.out_w, s.channels_last);
  const int64_t row = full_row(s, at.c);
  Accumulate<T> sum = bias ? to_accumulate(bias[row * s.bias]) : Accumulate<T>(0);
  for (int kh = 0; kh < s.kernel_h; ++kh) {
    const int64_t ih = at.h * s.stride_h - s.pad_h + kh * s.dilation_h;
    if (ih < 0 || ih >= s.in_h) continue;
    for (int kw = 0; kw < s.kernel_w; ++kw) {
      const int64_t iw = at.w * s.stride_w - s.pad_w + kw * s.dilation_w;
      if (iw < 0 || iw >= s.in_w) continue;
      sum += to_accumulate(weight[row * s.row + kh * s.tap_h + kw * s.tap_w]) *
             to_accumulate(x[offset(s.x, at.n, at.c / s.multiplier, ih, iw)]);
    }
  }
  from_accumulate(sum, &y[offset(s.y, at.n, at.c, at.h, at.w)]);
}

template <class T>
__global__ void depthwise_conv2d_bwd_input_kernel(const T* __restrict__ grad_y, const T* __restrict__ weight,
                                                  T* __restrict__ grad_x, const Shape s, int64_t total) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= total) return;
  const Position at = position(index, s.channels, s.in_h, s.in_w, s.channels_last);
  Accumulate<T> sum = 0;
  for (int64_t o = at.c * s.multiplier; o < (at.c + 1) * s.multiplier; ++o) {
    const int64_t row = full_row(s, o);
    for (int kh = 0; kh < s.kernel_h; ++kh) {
      const int64_t h = at.h + s.pad_h - kh * s.dilation_h, oh = h / s.stride_h;
      if (h < 0 || h % s.stride_h || oh >= s.out_h) continue;
      for (int kw = 0; kw < s.kernel_w; ++kw) {
        const int64_t w = at.w + s.pad_w - kw * s.dilation_w, ow = w / s.stride_w;
        if (w < 0 || w % s.stride_w || ow >= s.out_w) continue;
        sum += to_accumulate(weight[row * s.row + kh * s.tap_h + kw * s.tap_w]) *
               to_accumulate(grad_y[offset(s.y, at.n, o, oh, ow)]);
      }
    }
  }
  from_accumulate(sum, &grad_x[offset(s.x, at.n, at.c, at.h, at.w)]);
}

// blockIdx.x: active output channel; blockIdx.y: filter tap, and one more for the bias.
template <class T>
__global__ void depthwise_conv2d_bwd_weight_kernel(const T* __restrict__ grad_y, const T* __restrict__ x,
                                                   Accumulate<T>* __restrict__ grad_weight,
                                                   Accumulate<T>* __restrict__ grad_bias, bool add_weight,
                                                   bool add_bias, const Shape s) {
  const int64_t o = blockIdx.x, pixels = s.out_h * s.out_w;
  const int kh = blockIdx.y / s.kernel_w, kw = blockIdx.y % s.kernel_w;
  const bool is_bias = kh == s.kernel_h;
  Accumulate<T> sum = 0;
  for (int64_t i = threadIdx.x; i < s.batch * pixels; i += kThreads) {
    const int64_t n = i / pixels, oh = i % pixels / s.out_w, ow = i % s.out_w;
    const Accumulate<T> g = to_accumulate(grad_y[offset(s.y, n, o, oh, ow)]);
    if (is_bias) {
      sum += g;
      continue;
    }
    const int64_t ih = oh * s.stride_h - s.pad_h + kh * s.dilation_h;
    const int64_t iw = ow * s.stride_w - s.pad_w + kw * s.dilation_w;
    if (ih >= 0 && ih < s.in_h && iw >= 0 && iw < s.in_w)
      sum += g * to_accumulate(x[offset(s.x, n, o / s.multiplier, ih, iw)]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x != 0) return;
  const int64_t row = full_row(s, o);
  Accumulate<T>* target = is_bias ? &grad_bias[row * s.bias] : &grad_weight[row * s.row + kh * s.tap_h + kw * s.tap_w];
  *target = (is_bias ? add_bias : add_weight) ? *target + sum : sum;
}

dim3 blocks_for(int64_t total) { return dim3(unsigned((total + kThreads - 1) / kThreads)); }

}  // namespace

template <class T>
cudaError_t DepthwiseConv2dCudaLaunchers<T>::forward(const T* x, const T* weight, const T* bias, T* y, const Shape& s,
                                                     cudaStream_t stream) {
  const int64_t total = s.batch * s.channels * s.multiplier * s.out_h * s.out_w;
  if (total == 0) return cudaSuccess;
  FASTSLIM_LAUNCH(depthwise_conv2d_fwd_kernel<T>, blocks_for(total), dim3(kThreads), stream, x, weight, bias, y, s,
                  total);
  return cudaGetLastError();
}

template <class T>
cudaError_t DepthwiseConv2dCudaLaunchers<T>::backward_input(const T* grad_y, const T* weight, T* grad_x, const Shape& s,
                                                            cudaStream_t stream) {
  const int64_t total = s.batch * s.channels * s.in_h * s.in_w;
  if (total == 0) return cudaSuccess;
  FASTSLIM_LAUNCH(depthwise_conv2d_bwd_input_kernel<T>, blocks_for(total), dim3(kThreads), stream, grad_y, weight,
                  grad_x, s, total);
  return cudaGetLastError();
}

template <class T>
cudaError_t DepthwiseConv2dCudaLaunchers<T>::backward_weight(const T* grad_y, const T* x, A* grad_weight, A* grad_bias,
                                                             bool add_weight, bool add_bias, const Shape& s,
                                                             cudaStream_t stream) {
  if (s.channels == 0) return cudaSuccess;
  const dim3 grid(unsigned(s.channels * s.multiplier), unsigned(s.kernel_h * s.kernel_w + (grad_bias ? 1 : 0)));
  FASTSLIM_LAUNCH(depthwise_conv2d_bwd_weight_kernel<T>, grid, dim3(kThreads), stream, grad_y, x, grad_weight,
                  grad_bias, add_weight, add_bias, s);
  return cudaGetLastError();
}

template struct DepthwiseConv2dCudaLaunchers<float>;
template struct DepthwiseConv2dCudaLaunchers<bfloat16>;
template struct DepthwiseConv2dCudaLaunchers<float16>;
template struct DepthwiseConv2dCudaLaunchers<double>;

}  // namespace fastslim
