// Direct depthwise convolution of any layout, kernel, stride, dilation and multiplier, one thread an output
// element; the weight gradient is one block a filter tap, summed in a fixed order, so repeats are bitwise equal:
//   y[n, o, oh, ow]        = b[o] + sum_{kh,kw} w[o, kh, kw] * x[n, o/m, oh*s - p + kh*d, ow*s - p + kw*d]
//   grad_x[n, c, ih, iw]   = sum_{o/m = c} sum_{kh,kw: oh*s - p + kh*d = ih, ...} w[o, kh, kw] * grad_y[n, o, oh, ow]
//   grad_w[o, kh, kw]      = sum_{n,oh,ow} grad_y[n, o, oh, ow] * x[n, o/m, oh*s - p + kh*d, ow*s - p + kw*d]
//   grad_b[o]              = sum_{n,oh,ow} grad_y[n, o, oh, ow]
// The launchers hand what the vector kernels can compute to those.
#include "depthwise_conv2d_vector.h"
#include "fastslim/depthwise_conv2d_cuda.h"

namespace fastslim {
namespace {

using namespace depthwise;
using Shape = DepthwiseConv2dCuda;
constexpr int kThreads = 256;
constexpr int kMaxGridY = 65535;

struct Position {
  int c, h, w;
};

// The index-th element of a sample's image, in the order in which it lies in memory.
__device__ static inline Position position(int index, int channels, int height, int width, bool channels_last) {
  Position at;
  if (channels_last) {
    at.c = index % channels, index /= channels;
    at.w = index % width, at.h = index / width;
  } else {
    at.w = index % width, index /= width;
    at.h = index % height, at.c = index / height;
  }
  return at;
}

// The strides the host gave, or those of a dense image whose width it did not know.
__device__ static inline ImageStrides strides(const Shape& s, const ImageStrides& given, int64_t channels,
                                              int64_t height, int64_t width) {
  if (!s.channels.from) return given;
  if (s.channels_last) return {height * width * channels, 1, width * channels, channels};
  return {height * width * channels, height * width, width, 1};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                                T* __restrict__ y, const Shape s) {
  const int channels = s.channels.get(), outputs = channels * s.multiplier;
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= unsigned(outputs) * s.out_h * s.out_w) return;
  const Position at = position(int(index), outputs, s.out_h, s.out_w, s.channels_last);
  const ImageStrides in = strides(s, s.x, channels, s.in_h, s.in_w), out = strides(s, s.y, outputs, s.out_h, s.out_w);
  const int64_t row = full_row(s, at.c);
  const int ih_begin = at.h * s.stride_h - s.pad_h, iw_begin = at.w * s.stride_w - s.pad_w;
  for (int64_t n = blockIdx.y; n < s.batch; n += gridDim.y) {
    Accumulate<T> sum = bias ? to_accumulate(bias[row * s.bias]) : Accumulate<T>(0);
    const T* image = x + n * in.n + at.c / s.multiplier * in.c;
    for (int kh = 0; kh < s.kernel_h; ++kh) {
      const int ih = ih_begin + kh * s.dilation_h;
      if (ih < 0 || ih >= s.in_h) continue;
      for (int kw = 0; kw < s.kernel_w; ++kw) {
        const int iw = iw_begin + kw * s.dilation_w;
        if (iw < 0 || iw >= s.in_w) continue;
        sum += to_accumulate(weight[row * s.row + kh * s.tap_h + kw * s.tap_w]) *
               to_accumulate(image[ih * in.h + iw * in.w]);
      }
    }
    from_accumulate(sum, &y[n * out.n + at.c * out.c + at.h * out.h + at.w * out.w]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_bwd_input_kernel(const T* __restrict__ grad_y, const T* __restrict__ weight,
                                      T* __restrict__ grad_x, const Shape s) {
  const int channels = s.channels.get(), outputs = channels * s.multiplier;
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= unsigned(channels) * s.in_h * s.in_w) return;
  const Position at = position(int(index), channels, s.in_h, s.in_w, s.channels_last);
  const ImageStrides in = strides(s, s.x, channels, s.in_h, s.in_w), out = strides(s, s.y, outputs, s.out_h, s.out_w);
  for (int64_t n = blockIdx.y; n < s.batch; n += gridDim.y) {
    Accumulate<T> sum = 0;
    for (int o = at.c * s.multiplier; o < (at.c + 1) * s.multiplier; ++o) {
      const int64_t row = full_row(s, o);
      const T* image = grad_y + n * out.n + o * out.c;
      for (int kh = 0; kh < s.kernel_h; ++kh) {
        const int h = at.h + s.pad_h - kh * s.dilation_h, oh = h / s.stride_h;
        if (h < 0 || h % s.stride_h || oh >= s.out_h) continue;
#pragma unroll 1
        for (int kw = 0; kw < s.kernel_w; ++kw) {
          const int w = at.w + s.pad_w - kw * s.dilation_w, ow = w / s.stride_w;
          if (w < 0 || w % s.stride_w || ow >= s.out_w) continue;
          sum += to_accumulate(weight[row * s.row + kh * s.tap_h + kw * s.tap_w]) *
                 to_accumulate(image[oh * out.h + ow * out.w]);
        }
      }
    }
    from_accumulate(sum, &grad_x[n * in.n + at.c * in.c + at.h * in.h + at.w * in.w]);
  }
}

// blockIdx.x: active output channel; blockIdx.y: filter tap, and one more for the bias.
template <class T>
__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_bwd_weight_kernel(const T* __restrict__ grad_y, const T* __restrict__ x,
                                       Accumulate<T>* __restrict__ grad_weight, Accumulate<T>* __restrict__ grad_bias,
                                       bool add_weight, bool add_bias, const Shape s) {
  const int channels = s.channels.get(), outputs = channels * s.multiplier;
  const int o = int(blockIdx.x), pixels = s.out_h * s.out_w;
  if (o >= outputs) return;
  const ImageStrides in = strides(s, s.x, channels, s.in_h, s.in_w), out = strides(s, s.y, outputs, s.out_h, s.out_w);
  const int kh = int(blockIdx.y) / s.kernel_w, kw = int(blockIdx.y) % s.kernel_w;
  const bool is_bias = kh == s.kernel_h;
  const int64_t total = s.batch * pixels;
  Accumulate<T> sum = 0;
  for (int64_t i = threadIdx.x; i < total; i += kThreads) {
    const int64_t n = i / pixels;
    const int pixel = int(i - n * pixels), oh = pixel / s.out_w, ow = pixel % s.out_w;
    const Accumulate<T> g = to_accumulate(grad_y[n * out.n + o * out.c + oh * out.h + ow * out.w]);
    if (is_bias) {
      sum += g;
      continue;
    }
    const int ih = oh * s.stride_h - s.pad_h + kh * s.dilation_h, iw = ow * s.stride_w - s.pad_w + kw * s.dilation_w;
    if (ih >= 0 && ih < s.in_h && iw >= 0 && iw < s.in_w)
      sum += g * to_accumulate(x[n * in.n + o / s.multiplier * in.c + ih * in.h + iw * in.w]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x != 0) return;
  const int64_t row = full_row(s, o);
  Accumulate<T>* target = is_bias ? &grad_bias[row * s.bias] : &grad_weight[row * s.row + kh * s.tap_h + kw * s.tap_w];
  *target = (is_bias ? add_bias : add_weight) ? *target + sum : sum;
}

dim3 grid_for(int64_t elements, int64_t batch) {
  return dim3(unsigned((elements + kThreads - 1) / kThreads), unsigned(batch < kMaxGridY ? batch : kMaxGridY));
}

bool dense(const ImageStrides& s, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return s.c == 1 && (width == 1 || s.w == channels) && (height == 1 || s.h == width * channels) &&
         (batch == 1 || s.n == height * width * channels);
}

// The input gradient at stride 1 as a forward call.
Shape transposed(const Shape& s) {
  Shape t = s;
  t.in_h = s.out_h, t.in_w = s.out_w, t.out_h = s.in_h, t.out_w = s.in_w;
  t.pad_h = s.kernel_h - 1 - s.pad_h, t.pad_w = s.kernel_w - 1 - s.pad_w;
  return t;
}

}  // namespace

bool depthwise_conv2d_has_vectors(const Shape& s) {
  const bool square = s.kernel_h == s.kernel_w && s.stride_h == s.stride_w;
  const bool sizes = s.kernel_h == 3 || s.kernel_h == 5 || s.kernel_h == 7;
  const bool plain = s.multiplier == 1 && s.dilation_h == 1 && s.dilation_w == 1 && s.stride_h <= 2;
  const int64_t height = s.in_h > s.out_h ? s.in_h : s.out_h, width = s.in_w > s.out_w ? s.in_w : s.out_w;
  const bool small = s.batch * height * width <= INT32_MAX && s.pad_h < 1024 && s.pad_w < 1024;
  return s.channels_last && square && sizes && plain && small &&
         (s.channels.from || (dense(s.x, s.batch, s.channels.value, s.in_h, s.in_w) &&
                              dense(s.y, s.batch, s.channels.value, s.out_h, s.out_w)));
}

DepthwiseConv2dRowChunks depthwise_conv2d_statistics_chunks(const Shape& s) {
  return cut_rows(s.batch * s.out_h, chunks_of(s.channels.value));
}

template <class T>
cudaError_t DepthwiseConv2dCudaLaunchers<T>::forward(const T* x, const T* weight, const T* bias, T* y, const Shape& s,
                                                     const DepthwiseConv2dFusion* fusion, cudaStream_t stream) {
  if (s.batch == 0 || s.channels.value == 0) return cudaSuccess;
  if constexpr (sizeof(T) <= 4)
    if (depthwise_conv2d_has_vectors(s))
      return DepthwiseConv2dVectorForward<T>::run(x, weight, bias, y, s, fusion, false, stream);
  if (fusion) return cudaErrorInvalidValue;
  const dim3 grid = grid_for(int64_t(s.channels.value) * s.multiplier * s.out_h * s.out_w, s.batch);
  FASTSLIM_LAUNCH(depthwise_conv2d_fwd_kernel<T>, grid, dim3(kThreads), stream, x, weight, bias, y, s);
  return cudaGetLastError();
}

template <class T>
cudaError_t DepthwiseConv2dCudaLaunchers<T>::backward_input(const T* grad_y, const T* weight, T* grad_x, const Shape& s,
                                                            cudaStream_t stream) {
  if (s.batch == 0 || s.channels.value == 0) return cudaSuccess;
  if constexpr (sizeof(T) <= 4)
    if (depthwise_conv2d_has_vectors(s))
      return s.stride_h == 2 ? DepthwiseConv2dVectorBackwardInput<T>::run(grad_y, weight, grad_x, s, stream)
                             : DepthwiseConv2dVectorForward<T>::run(grad_y, weight, nullptr, grad_x, transposed(s),
                                                                    nullptr, true, stream);
  const dim3 grid = grid_for(int64_t(s.channels.value) * s.in_h * s.in_w, s.batch);
  FASTSLIM_LAUNCH(depthwise_conv2d_bwd_input_kernel<T>, grid, dim3(kThreads), stream, grad_y, weight, grad_x, s);
  return cudaGetLastError();
}

template <class T>
cudaError_t DepthwiseConv2dCudaLaunchers<T>::backward_weight(const T* grad_y, const T* x, A* grad_weight, A* grad_bias,
                                                             float* workspace, bool add_weight, bool add_bias,
                                                             const Shape& s, const DepthwiseConv2dFusion* fusion,
                                                             cudaStream_t stream) {
  if (s.channels.value == 0) return cudaSuccess;
  if constexpr (sizeof(T) <= 4)
    if (depthwise_conv2d_has_vectors(s))
      return DepthwiseConv2dVectorBackwardWeight<T>::run(grad_y, x, grad_weight, grad_bias, workspace, add_weight,
                                                         add_bias, s, fusion, stream);
  if (fusion) return cudaErrorInvalidValue;
  const dim3 grid(unsigned(s.channels.value * s.multiplier), unsigned(s.kernel_h * s.kernel_w + (grad_bias ? 1 : 0)));
  FASTSLIM_LAUNCH(depthwise_conv2d_bwd_weight_kernel<T>, grid, dim3(kThreads), stream, grad_y, x, grad_weight,
                  grad_bias, add_weight, add_bias, s);
  return cudaGetLastError();
}

template <class T> int64_t DepthwiseConv2dCudaLaunchers<T>::backward_weight_workspace(const Shape& s) {
  if constexpr (sizeof(T) <= 4)
    if (depthwise_conv2d_has_vectors(s)) return DepthwiseConv2dVectorBackwardWeight<T>::workspace(s);
  return 0;
}

template struct DepthwiseConv2dCudaLaunchers<float>;
template struct DepthwiseConv2dCudaLaunchers<bfloat16>;
template struct DepthwiseConv2dCudaLaunchers<float16>;
template struct DepthwiseConv2dCudaLaunchers<double>;

}  // namespace fastslim
