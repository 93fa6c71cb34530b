// Binds depthwise_conv2d's CUDA kernels: checks, allocates, launches on torch's current stream.
#include "fastslim/depthwise_conv2d_cuda.h"

#include <algorithm>
#include <tuple>

#include "cuda_common.h"
#include "fastslim/batch_norm_act.h"

namespace fastslim {
namespace {

using Ints = std::vector<int64_t>;
using Shape = DepthwiseConv2dCuda;

constexpr int64_t kMaxSize = 1 << 24;  // of a stride, padding or dilation: products stay in 32 bits

ImageStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

int64_t out_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
  STD_TORCH_CHECK(room >= 0, "depthwise_conv2d: the kernel is larger than the padded input");
  return room / stride + 1;
}

// `input` is the size of x; `weight` the full-size weight or its gradient: (C_full * m, 1, kh, kw).
Shape make_shape(const Ints& input, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation,
                 const Ints& segments, int64_t multiplier) {
  STD_TORCH_CHECK(input.size() == 4, "depthwise_conv2d: an image has 4 dimensions");
  STD_TORCH_CHECK(weight.is_cuda() && weight.dim() == 4 && weight.size(1) == 1,
                  "depthwise_conv2d: weight must be (C, 1, kh, kw) on the GPU");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "depthwise_conv2d: stride, padding and dilation are two numbers each");
  for (int i = 0; i < 2; ++i)
    STD_TORCH_CHECK(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0 && stride[i] <= kMaxSize &&
                        padding[i] <= kMaxSize && dilation[i] <= kMaxSize,
                    "depthwise_conv2d: bad stride, padding or dilation");
  const int64_t kh = weight.size(2), kw = weight.size(3);
  STD_TORCH_CHECK(kh > 0 && kw > 0 && kh * kw < 65535 && input[2] > 0 && input[3] > 0,
                  "depthwise_conv2d: empty image or kernel, or a kernel of more than 65534 taps");
  STD_TORCH_CHECK(multiplier > 0 && weight.size(0) % multiplier == 0,
                  "depthwise_conv2d: weight rows are no multiple of the channel multiplier");
  const int64_t out_h = out_size(input[2], kh, stride[0], padding[0], dilation[0]);
  const int64_t out_w = out_size(input[3], kw, stride[1], padding[1], dilation[1]);
  const int64_t channels = input[1], pixels = std::max(input[2] * input[3], out_h * out_w);
  STD_TORCH_CHECK(input[2] <= INT32_MAX / input[3] && out_h <= INT32_MAX / out_w &&
                      (channels == 0 || pixels <= INT32_MAX / multiplier / channels),
                  "depthwise_conv2d: a sample has more than 2^31 elements");
  Shape s{};
  s.batch = input[0], s.channels = int32_t(channels), s.multiple = int32_t(channels);
  s.multiplier = int32_t(multiplier), s.in_h = int32_t(input[2]), s.in_w = int32_t(input[3]);
  s.out_h = int32_t(out_h), s.out_w = int32_t(out_w);
  s.kernel_h = int(kh), s.kernel_w = int(kw), s.stride_h = int(stride[0]), s.stride_w = int(stride[1]);
  s.pad_h = int(padding[0]), s.pad_w = int(padding[1]), s.dilation_h = int(dilation[0]);
  s.dilation_w = int(dilation[1]);
  s.row = weight.stride(0), s.tap_h = weight.stride(2), s.tap_w = weight.stride(3);

  const Ints ranges = segments.empty() ? Ints{0, channels} : segments;
  STD_TORCH_CHECK(ranges.size() % 2 == 0, "depthwise_conv2d: segments are pairs of start and count");
  STD_TORCH_CHECK(ranges.size() <= 2 * kDepthwiseMaxSegments, "depthwise_conv2d: at most ", kDepthwiseMaxSegments,
                  " segments on a GPU");
  int64_t total = 0;
  for (size_t i = 0; i < ranges.size(); i += 2) {
    const int64_t start = ranges[i], count = ranges[i + 1];
    STD_TORCH_CHECK(start >= 0 && count >= 0 && start <= weight.size(0) / multiplier - count,
                    "depthwise_conv2d: active channels beyond the weight");
    s.start[i / 2] = int32_t(start), s.count[i / 2] = int32_t(count);
    total += count;
  }
  s.num_segments = int(ranges.size() / 2);
  STD_TORCH_CHECK(total == channels, "depthwise_conv2d: segments do not add up to the input's channels");
  return s;
}

void check_image(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.dim() == 4 && t.get_device_index() == like.get_device_index(),
                  "depthwise_conv2d: ", name, " must have 4 dimensions and be on the other operands' GPU");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "depthwise_conv2d: ", name, " must have the other's dtype");
}

void check_row_vector(const Tensor& t, const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == weight.get_device_index() && t.dim() == 1 &&
                      t.size(0) == weight.size(0) && t.scalar_type() == weight.scalar_type(),
                  "depthwise_conv2d: ", name, " must have the weight's rows, dtype and GPU");
}

void check_grad(const Tensor& grad_y, const Shape& s) {
  STD_TORCH_CHECK(grad_y.size(0) == s.batch && grad_y.size(1) == int64_t(s.channels.value) * s.multiplier &&
                      grad_y.size(2) == s.out_h && grad_y.size(3) == s.out_w,
                  "depthwise_conv2d: grad_output has not the output's shape");
}

Tensor new_image(const Tensor& like, const Ints& size, bool channels_last) {
  return torch::stable::empty(
      size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

bool is_channels_last(const Tensor& t) { return t.size(1) > 1 && t.stride(1) == 1 && !(t.size(2) * t.size(3) == 1); }

// The prologue of a call to the vector kernels, which alone know one.
DepthwiseConv2dFusion make_fusion(const Shape& s, const Tensor& x, const std::optional<Tensor>& prologue,
                                  int64_t activation) {
  STD_TORCH_CHECK(
      depthwise_conv2d_has_vectors(s) && x.scalar_type() != ScalarType::Double,
      "depthwise_conv2d_bn: needs dense channels_last images of at most 32 bits a value, a square kernel of "
      "3, 5 or 7, stride 1 or 2, dilation 1 and multiplier 1");
  STD_TORCH_CHECK(activation >= 0 && activation <= int(Activation::relu6),
                  "depthwise_conv2d_bn: the prologue's activation must be none, relu or relu6");
  DepthwiseConv2dFusion fusion;
  if (prologue) {
    STD_TORCH_CHECK(prologue->get_device_index() == x.get_device_index() && prologue->is_contiguous() &&
                        prologue->dim() == 2 && prologue->size(0) == 3 && prologue->size(1) == x.size(1) &&
                        prologue->scalar_type() == ScalarType::Float,
                    "depthwise_conv2d_bn: prologue must be a contiguous float32 (3, C) on x's GPU");
    fusion.prologue = read<float>(*prologue);
    if (activation != int(Activation::none)) fusion.low = 0;
    if (activation == int(Activation::relu6)) fusion.high = 6;
  }
  return fusion;
}

// A call of the forward kernels: everything but the fusion.
struct Forward {
  Shape s;
  Tensor y;
};

Forward make_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                     const Ints& padding, const Ints& dilation, const Ints& segments, int64_t multiplier) {
  check_image(x, weight, "x");
  Shape s =
      make_shape({x.size(0), x.size(1), x.size(2), x.size(3)}, weight, stride, padding, dilation, segments, multiplier);
  if (bias) check_row_vector(*bias, weight, "bias");
  s.channels_last = is_channels_last(x);
  Tensor y = new_image(x, {s.batch, int64_t(s.channels.value) * multiplier, s.out_h, s.out_w}, s.channels_last);
  s.x = strides_of(x), s.y = strides_of(y), s.bias = bias ? bias->stride(0) : 0;
  return {s, y};
}

void launch_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Forward& call,
                    const DepthwiseConv2dFusion* fusion) {
  for_dtype(x.scalar_type(), "depthwise_conv2d", [&](auto type) {
    using T = decltype(type);
    STD_CUDA_CHECK(DepthwiseConv2dCudaLaunchers<T>::forward(read<T>(x), read<T>(weight), read<T>(bias),
                                                            write<T>(call.y), call.s, fusion, current_stream(x)));
  });
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride, Ints padding,
               Ints dilation, Ints segments, int64_t multiplier) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Forward call = make_forward(x, weight, bias, stride, padding, dilation, segments, multiplier);
  launch_forward(x, weight, bias, call, nullptr);
  return call.y;
}

std::tuple<Tensor, Tensor> forward_bn(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& prologue, int64_t activation, Ints stride,
                                      Ints padding, Ints dilation, Ints segments, int64_t multiplier, bool statistics) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Forward call = make_forward(x, weight, bias, stride, padding, dilation, segments, multiplier);
  DepthwiseConv2dFusion fusion = make_fusion(call.s, x, prologue, activation);
  const int64_t chunks = statistics ? depthwise_conv2d_statistics_chunks(call.s).chunks : 0;
  Tensor partials = torch::stable::empty({chunks, 3, x.size(1)}, ScalarType::Float, std::nullopt, x.device());
  if (statistics) fusion.partials = write<float>(partials);
  launch_forward(x, weight, bias, call, &fusion);
  return {call.y, partials};
}

Tensor backward_input(const Tensor& grad_y, const Tensor& weight, Ints input_size, bool channels_last, Ints stride,
                      Ints padding, Ints dilation, Ints segments, int64_t multiplier) {
  check_image(grad_y, weight, "grad_output");
  Shape s = make_shape(input_size, weight, stride, padding, dilation, segments, multiplier);
  check_grad(grad_y, s);
  torch::stable::accelerator::DeviceGuard guard(grad_y.get_device_index());
  s.channels_last = channels_last;
  Tensor grad_x = new_image(grad_y, input_size, channels_last);
  s.x = strides_of(grad_x), s.y = strides_of(grad_y);
  for_dtype(grad_y.scalar_type(), "depthwise_conv2d", [&](auto type) {
    using T = decltype(type);
    STD_CUDA_CHECK(DepthwiseConv2dCudaLaunchers<T>::backward_input(read<T>(grad_y), read<T>(weight), write<T>(grad_x),
                                                                   s, current_stream(grad_y)));
  });
  return grad_x;
}

void backward_weight_bn(const Tensor& grad_y, const Tensor& x, Tensor grad_weight, std::optional<Tensor> grad_bias,
                        const std::optional<Tensor>& prologue, int64_t activation, Ints stride, Ints padding,
                        Ints dilation, Ints segments, int64_t multiplier, bool add_weight, bool add_bias) {
  check_image(x, grad_y, "x");
  STD_TORCH_CHECK(grad_y.dim() == 4, "depthwise_conv2d: grad_output must have 4 dimensions");
  Shape s = make_shape({x.size(0), x.size(1), x.size(2), x.size(3)}, grad_weight, stride, padding, dilation, segments,
                       multiplier);
  check_grad(grad_y, s);
  const ScalarType wanted = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(grad_weight.scalar_type() == wanted && grad_weight.get_device_index() == x.get_device_index(),
                  "depthwise_conv2d: grad_weight must be float32 (float64 for float64 operands) on x's GPU");
  if (grad_bias) check_row_vector(*grad_bias, grad_weight, "grad_bias");
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  s.channels_last = is_channels_last(x);
  s.x = strides_of(x), s.y = strides_of(grad_y), s.bias = grad_bias ? grad_bias->stride(0) : 0;
  const DepthwiseConv2dFusion fusion = prologue ? make_fusion(s, x, prologue, activation) : DepthwiseConv2dFusion{};
  for_dtype(x.scalar_type(), "depthwise_conv2d", [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    using Launchers = DepthwiseConv2dCudaLaunchers<T>;
    Tensor partials = workspace(x, Launchers::backward_weight_workspace(s) * int64_t(sizeof(float)));
    STD_CUDA_CHECK(Launchers::backward_weight(read<T>(grad_y), read<T>(x), write<A>(grad_weight), write<A>(grad_bias),
                                              write<float>(partials), add_weight, add_bias, s,
                                              prologue ? &fusion : nullptr, current_stream(x)));
  });
}

void backward_weight(const Tensor& grad_y, const Tensor& x, Tensor grad_weight, std::optional<Tensor> grad_bias,
                     Ints stride, Ints padding, Ints dilation, Ints segments, int64_t multiplier, bool add_weight,
                     bool add_bias) {
  backward_weight_bn(grad_y, x, grad_weight, grad_bias, std::nullopt, 0, stride, padding, dilation, segments,
                     multiplier, add_weight, add_bias);
}

}  // namespace
}  // namespace fastslim

STABLE_TORCH_LIBRARY_IMPL(fastslim, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&fastslim::forward));
  m.impl("depthwise_conv2d_bn", TORCH_BOX(&fastslim::forward_bn));
  m.impl("depthwise_conv2d_backward_input", TORCH_BOX(&fastslim::backward_input));
  m.impl("depthwise_conv2d_backward_weight", TORCH_BOX(&fastslim::backward_weight));
  m.impl("depthwise_conv2d_bn_backward_weight", TORCH_BOX(&fastslim::backward_weight_bn));
}
