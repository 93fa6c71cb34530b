// Binds depthwise_conv2d's CPU kernels: checks, allocates, splits the work over torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "conv_geometry.h"
#include "fastslim/depthwise_conv2d.h"
#include "fastslim/isa.h"
#include "scratch.h"

FASTSLIM_DEFINE_DISPATCH(DepthwiseConv2dForwardTable, depthwise_conv2d_forward)
FASTSLIM_DEFINE_DISPATCH(DepthwiseConv2dBackwardInputTable, depthwise_conv2d_backward_input)
FASTSLIM_DEFINE_DISPATCH(DepthwiseConv2dBackwardWeightTable, depthwise_conv2d_backward_weight)
FASTSLIM_DEFINE_DISPATCH(DepthwiseConv2dPackingTable, depthwise_conv2d_packing)

namespace fastslim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Shape = DepthwiseConv2dShape;

bool is_dense(const Tensor& t, bool channels_last) {
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  for (int dim : channels_last ? std::vector<int>{1, 3, 2, 0} : std::vector<int>{3, 2, 1, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

// A tensor that is dense in both orders (one channel, or one pixel) counts as NCHW.
bool is_channels_last(const Tensor& t) { return !is_dense(t, false); }

struct Call {
  Shape shape;
  Ints segments;
  DepthwiseConv2dRows rows;  // points into segments
};

// `weight` is the full-size weight or its gradient: (C_full * m, 1, kh, kw).
Call make_call(int64_t batch, int64_t channels, int64_t in_h, int64_t in_w, bool channels_last, const Tensor& weight,
               const Ints& stride, const Ints& padding, const Ints& dilation, const Ints& segments,
               int64_t multiplier) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.size(1) == 1,
                  "depthwise_conv2d: weight must be (C, 1, kh, kw) on the CPU");
  check_conv_settings("depthwise_conv2d", stride, padding, dilation);
  Call call;
  const int64_t kh = weight.size(2), kw = weight.size(3);
  STD_TORCH_CHECK(kh > 0 && kw > 0 && in_h > 0 && in_w > 0, "depthwise_conv2d: empty image or kernel");
  call.shape = {batch,
                channels,
                multiplier,
                in_h,
                in_w,
                conv_out_size("depthwise_conv2d", in_h, kh, stride[0], padding[0], dilation[0]),
                conv_out_size("depthwise_conv2d", in_w, kw, stride[1], padding[1], dilation[1]),
                kh,
                kw,
                stride[0],
                stride[1],
                padding[0],
                padding[1],
                dilation[0],
                dilation[1],
                channels_last};
  STD_TORCH_CHECK(multiplier > 0 && weight.size(0) % multiplier == 0,
                  "depthwise_conv2d: weight rows are no multiple of the channel multiplier");
  call.segments = segments.empty() ? Ints{0, channels} : segments;
  STD_TORCH_CHECK(call.segments.size() % 2 == 0, "depthwise_conv2d: segments are pairs of start and count");
  int64_t total = 0;
  for (size_t i = 0; i < call.segments.size(); i += 2) {
    const int64_t start = call.segments[i], count = call.segments[i + 1];
    STD_TORCH_CHECK(start >= 0 && count >= 0 && start <= weight.size(0) / multiplier - count,
                    "depthwise_conv2d: active channels beyond the weight");
    total += count;
  }
  STD_TORCH_CHECK(total == channels, "depthwise_conv2d: segments do not add up to the input's channels");
  call.rows = {call.segments.data(), int64_t(call.segments.size() / 2), weight.stride(0), weight.stride(2),
               weight.stride(3)};
  return call;
}

void check_image(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && t.scalar_type() == like.scalar_type(), "depthwise_conv2d: ", name,
                  " must be a CPU tensor with 4 dimensions and the weight's dtype");
  STD_TORCH_CHECK(is_dense(t, false) || is_dense(t, true), "depthwise_conv2d: ", name,
                  " must be contiguous or channels_last");
}

Tensor new_image(const Tensor& like, const Ints& size, bool channels_last) {
  return torch::stable::empty(
      size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 16;

thread_local Scratch task_scratch, weight_scratch, bias_scratch;

// Calls run(scratch, begin, end) on torch's threads.
template <class A, class Run> void parallel_items(int64_t items, int64_t work, int64_t scratch, const Run& run) {
  if (items <= 0) return;
  const int64_t per_item = work / items + 1;
  torch::stable::parallel_for(0, items, kGrain / per_item + 1,
                              [&](int64_t begin, int64_t end) { run(task_scratch.get<A>(scratch), begin, end); });
}

int64_t multiply_adds(const Shape& s) {
  return s.batch * s.channels * s.multiplier * s.out_h * s.out_w * s.kernel_h * s.kernel_w;
}

template <class T>
const Accumulate<T>* packed(const Tensor& weight, const Call& call, const DepthwiseConv2dPacking<T>& packing) {
  const Shape& s = call.shape;
  auto* result = weight_scratch.get<Accumulate<T>>(s.kernel_h * s.kernel_w * s.channels * s.multiplier);
  packing.pack(static_cast<const T*>(weight.const_data_ptr()), call.rows, s, result);
  return result;
}

// Calls body with the members of T in the tables.
template <class Body> void for_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body([](const auto& table) -> const auto& { return table.float32; }, float());
    case ScalarType::BFloat16: return body([](const auto& table) -> const auto& { return table.bf16; }, bfloat16());
    case ScalarType::Double: return body([](const auto& table) -> const auto& { return table.float64; }, double());
    default: STD_TORCH_CHECK(false, "depthwise_conv2d: float32, bfloat16 and float64 only");
  }
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride, Ints padding,
               Ints dilation, Ints segments, int64_t multiplier) {
  check_image(x, weight, "x");
  const Call call = make_call(x.size(0), x.size(1), x.size(2), x.size(3), is_channels_last(x), weight, stride, padding,
                              dilation, segments, multiplier);
  const Shape& s = call.shape;
  if (bias)
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                        bias->scalar_type() == weight.scalar_type(),
                    "depthwise_conv2d: bias must have the weight's rows and dtype");
  Tensor y = new_image(x, {s.batch, s.channels * multiplier, s.out_h, s.out_w}, s.channels_last);
  for_dtype(x.scalar_type(), [&](auto member, auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const auto& packing = member(depthwise_conv2d_packing());
    const auto& kernel = member(depthwise_conv2d_forward());
    const A* w = packed<T>(weight, call, packing);
    A* b = nullptr;
    if (bias) {
      Shape row = s;
      row.kernel_h = row.kernel_w = 1;
      DepthwiseConv2dRows rows = call.rows;
      rows.stride_row = bias->stride(0);
      b = bias_scratch.get<A>(s.channels * multiplier);
      packing.pack(static_cast<const T*>(bias->const_data_ptr()), rows, row, b);
    }
    const T* xp = static_cast<const T*>(x.const_data_ptr());
    T* yp = static_cast<T*>(y.mutable_data_ptr());
    parallel_items<A>(
        depthwise_conv2d_forward_items(s), multiply_adds(s), kernel.scratch(s),
        [&](A* scratch, int64_t begin, int64_t end) { kernel.run(xp, w, b, yp, s, scratch, begin, end); });
  });
  return y;
}

void check_grad(const Tensor& grad_y, const Shape& s) {
  STD_TORCH_CHECK(grad_y.size(0) == s.batch && grad_y.size(1) == s.channels * s.multiplier &&
                      grad_y.size(2) == s.out_h && grad_y.size(3) == s.out_w,
                  "depthwise_conv2d: grad_output has not the output's shape");
  STD_TORCH_CHECK(is_dense(grad_y, s.channels_last), "depthwise_conv2d: grad_output must have x's memory format");
}

Tensor backward_input(const Tensor& grad_y, const Tensor& weight, Ints input_size, bool channels_last, Ints stride,
                      Ints padding, Ints dilation, Ints segments, int64_t multiplier) {
  check_image(grad_y, weight, "grad_output");
  STD_TORCH_CHECK(input_size.size() == 4, "depthwise_conv2d: input_size has 4 entries");
  const Call call = make_call(input_size[0], input_size[1], input_size[2], input_size[3], channels_last, weight, stride,
                              padding, dilation, segments, multiplier);
  const Shape& s = call.shape;
  check_grad(grad_y, s);
  Tensor grad_x = new_image(grad_y, input_size, s.channels_last);
  for_dtype(grad_y.scalar_type(), [&](auto member, auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const auto& kernel = member(depthwise_conv2d_backward_input());
    const A* w = packed<T>(weight, call, member(depthwise_conv2d_packing()));
    const T* gp = static_cast<const T*>(grad_y.const_data_ptr());
    T* out = static_cast<T*>(grad_x.mutable_data_ptr());
    parallel_items<A>(depthwise_conv2d_backward_input_items(s), multiply_adds(s), kernel.scratch(s),
                      [&](A* scratch, int64_t begin, int64_t end) { kernel.run(gp, w, out, s, scratch, begin, end); });
  });
  return grad_x;
}

void backward_weight(const Tensor& grad_y, const Tensor& x, Tensor grad_weight, std::optional<Tensor> grad_bias,
                     Ints stride, Ints padding, Ints dilation, Ints segments, int64_t multiplier, bool add_weight,
                     bool add_bias) {
  check_image(x, grad_y, "x");
  check_image(grad_y, x, "grad_output");
  const Call call = make_call(x.size(0), x.size(1), x.size(2), x.size(3), is_channels_last(x), grad_weight, stride,
                              padding, dilation, segments, multiplier);
  const Shape& s = call.shape;
  check_grad(grad_y, s);
  const ScalarType wanted = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(grad_weight.scalar_type() == wanted,
                  "depthwise_conv2d: grad_weight must be float32 (float64 for float64 operands)");
  if (grad_bias)
    STD_TORCH_CHECK(grad_bias->is_cpu() && grad_bias->dim() == 1 && grad_bias->size(0) == grad_weight.size(0) &&
                        grad_bias->scalar_type() == wanted,
                    "depthwise_conv2d: grad_bias must have grad_weight's rows and dtype");
  for_dtype(x.scalar_type(), [&](auto member, auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const auto& kernel = member(depthwise_conv2d_backward_weight());
    const int64_t rows = depthwise_conv2d_chunks(s).count * (s.kernel_h * s.kernel_w + 1);
    const int64_t elements = rows * s.channels * s.multiplier;
    A* partial = weight_scratch.get<A>(elements);
    std::fill(partial, partial + elements, A(0));
    const T* gp = static_cast<const T*>(grad_y.const_data_ptr());
    const T* xp = static_cast<const T*>(x.const_data_ptr());
    parallel_items<A>(depthwise_conv2d_backward_weight_items(s), multiply_adds(s), kernel.scratch(s),
                      [&](A* scratch, int64_t begin, int64_t end) {
                        kernel.run(gp, xp, partial, grad_bias.has_value(), s, scratch, begin, end);
                      });
    member(depthwise_conv2d_packing())
        .merge(partial, static_cast<A*>(grad_weight.mutable_data_ptr()), add_weight, call.rows,
               grad_bias ? static_cast<A*>(grad_bias->mutable_data_ptr()) : nullptr, add_bias,
               grad_bias ? grad_bias->stride(0) : 0, s);
  });
}

}  // namespace
}  // namespace fastslim

STABLE_TORCH_LIBRARY_IMPL(fastslim, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&fastslim::forward));
  m.impl("depthwise_conv2d_backward_input", TORCH_BOX(&fastslim::backward_input));
  m.impl("depthwise_conv2d_backward_weight", TORCH_BOX(&fastslim::backward_weight));
}
