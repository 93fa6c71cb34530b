// Binds slim_conv2d's CPU kernels: checks, allocates, lends scratch memory and torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "blas.h"
#include "conv_geometry.h"
#include "fastslim/isa.h"
#include "fastslim/slim_conv2d.h"
#include "scratch.h"

FASTSLIM_DEFINE_DISPATCH(SlimConv2dFloatTable, slim_conv2d_float)
FASTSLIM_DEFINE_DISPATCH(SlimConv2dBfloat16Table, slim_conv2d_bfloat16)

namespace fastslim {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Shape = SlimConv2dShape;

// Kept from call to call: the page faults of fresh memory cost more than a small convolution.
thread_local Scratch scratch;

void on_threads(int64_t items, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}
void on_this_thread(int64_t items, void* context, void (*body)(void*, int64_t, int64_t)) {
  if (items > 0) body(context, 0, items);
}

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 18;

SlimConv2dParallel threads_for(const Shape& s) {
  const int64_t work = s.batch * s.out_h * s.out_w * s.kernel_h * s.kernel_w * s.c_in * s.c_out;
  return {work < kGrain ? on_this_thread : on_threads};
}

struct Call {
  Shape shape;
  Ints segments;
};

// `weight` is the full-size weight or its gradient: (C_out, C_in, kh, kw).
Call make_call(const Ints& x_size, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation,
               int64_t c_out, const Ints& segments) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.scalar_type() == ScalarType::Float,
                  "slim_conv2d: weight must be float32 (C_out, C_in, kh, kw) on the CPU");
  check_conv_settings("slim_conv2d", stride, padding, dilation);
  STD_TORCH_CHECK(x_size.size() == 4, "slim_conv2d: x has 4 dimensions");
  const int64_t c_in = x_size[1], kh = weight.size(2), kw = weight.size(3);
  STD_TORCH_CHECK(kh > 0 && kw > 0 && x_size[0] >= 0 && c_in > 0 && x_size[2] > 0 && x_size[3] > 0,
                  "slim_conv2d: empty image or kernel");
  STD_TORCH_CHECK(c_out > 0 && c_out <= weight.size(0), "slim_conv2d: c_out=", c_out,
                  " must be at least 1 and at most the layer's ", weight.size(0), " channels");
  Call call;
  call.shape = {x_size[0],
                c_in,
                c_out,
                x_size[2],
                x_size[3],
                conv_out_size("slim_conv2d", x_size[2], kh, stride[0], padding[0], dilation[0]),
                conv_out_size("slim_conv2d", x_size[3], kw, stride[1], padding[1], dilation[1]),
                kh,
                kw,
                stride[0],
                stride[1],
                padding[0],
                padding[1],
                dilation[0],
                dilation[1],
                c_in};
  call.segments = segments.empty() ? Ints{0, c_in} : segments;
  STD_TORCH_CHECK(call.segments.size() % 2 == 0, "slim_conv2d: segments are pairs of start and count");
  int64_t total = 0;
  for (size_t i = 0; i < call.segments.size(); i += 2) {
    const int64_t start = call.segments[i], count = call.segments[i + 1];
    STD_TORCH_CHECK(start >= 0 && count >= 0 && start <= weight.size(1) - count,
                    "slim_conv2d: active channels beyond the weight");
    total += count;
  }
  STD_TORCH_CHECK(total == c_in, "slim_conv2d: segments do not add up to the input's channels");
  return call;
}

template <class W> SlimConv2dWeight<W> view_of(W* data, const Tensor& weight, const Call& call) {
  return {data,
          weight.stride(0),
          weight.stride(1),
          weight.stride(2),
          weight.stride(3),
          call.segments.data(),
          int64_t(call.segments.size() / 2)};
}

// Elements from one pixel to the next, where the pixels follow each other and a pixel's channels lie side by
// side; else 0. Strides of dimensions of size 1 mean nothing.
int64_t pixel_of(const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  if (c != 1 && t.stride(1) != 1) return 0;
  int64_t pixel = c;
  if (w != 1)
    pixel = t.stride(3);
  else if (h != 1)
    pixel = t.stride(2);
  else if (t.size(0) > 1)
    pixel = t.stride(0);
  const bool follow = (h == 1 || t.stride(2) == w * pixel) && (t.size(0) <= 1 || t.stride(0) == h * w * pixel);
  return follow && pixel >= c ? pixel : 0;
}

// The tensor itself where pixels lie as kernels read them, else a channels_last copy.
Tensor readable(const Tensor& t, const char* name, bool dense) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4, "slim_conv2d: ", name, " must be a CPU tensor with 4 dimensions");
  const int64_t pixel = pixel_of(t);
  return pixel == 0 || (dense && pixel != t.size(1)) ? torch::stable::contiguous(t, MemoryFormat::ChannelsLast) : t;
}

Tensor new_image(const Tensor& like, const Ints& size) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

// Calls body(table, a T) with the kernels of the images' dtype.
template <class Body> void for_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(slim_conv2d_float().f, float());
    case ScalarType::BFloat16:
      STD_TORCH_CHECK(slim_conv2d_bfloat16().usable(), "slim_conv2d: bfloat16 needs a processor with AMX");
      return body(slim_conv2d_bfloat16().b, bfloat16());
    default: STD_TORCH_CHECK(false, "slim_conv2d: images must be float32 or bfloat16");
  }
}

// A float32 product of pixels and a weight whose rows lie side by side in memory, for which BLAS is at its best.
bool is_matrix_product(ScalarType dtype, const Shape& s, const Tensor& weight) {
  constexpr int64_t kMost = int64_t(1) << 31;  // BLAS counts in int
  return has_sgemm() && dtype == ScalarType::Float && s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 &&
         s.stride_w == 1 && !s.pad_h && !s.pad_w && (weight.size(1) == 1 || weight.stride(1) == 1) &&
         weight.stride(0) >= s.c_in && weight.stride(0) < kMost && s.batch * s.in_h * s.in_w < kMost &&
         s.x_pixel < kMost;
}

// Calls body(first channel of x, first channel of the weight, channels) for every segment.
template <class Body> void for_each_segment(const Ints& segments, const Body& body) {
  int64_t offset = 0;
  for (size_t i = 0; i < segments.size(); offset += segments[i + 1], i += 2)
    if (segments[i + 1]) body(offset, segments[i], segments[i + 1]);
}

template <class T> const T* data_of(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }

Tensor forward(const Tensor& image, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride, Ints padding,
               Ints dilation, int64_t c_out, Ints segments) {
  const Tensor x = readable(image, "x", false);
  Call call =
      make_call({x.size(0), x.size(1), x.size(2), x.size(3)}, weight, stride, padding, dilation, c_out, segments);
  Shape& s = call.shape;
  s.x_pixel = pixel_of(x);
  std::optional<Tensor> b;
  if (bias) {
    STD_TORCH_CHECK(
        bias->is_cpu() && bias->dim() == 1 && bias->size(0) >= c_out && bias->scalar_type() == ScalarType::Float,
        "slim_conv2d: bias must be float32 with at least c_out elements");
    b = bias->stride(0) == 1 ? *bias : torch::stable::contiguous(*bias);
  }
  Tensor y = new_image(x, {s.batch, c_out, s.out_h, s.out_w});
  if (is_matrix_product(x.scalar_type(), s, weight)) {
    const int64_t pixels = s.batch * s.in_h * s.in_w;
    float* out = static_cast<float*>(y.mutable_data_ptr());
    if (b)
      for (int64_t p = 0; p < pixels; ++p) std::copy_n(data_of<float>(*b), c_out, out + p * c_out);
    float beta = b ? 1.0f : 0.0f;
    for_each_segment(call.segments, [&](int64_t from, int64_t first, int64_t count) {
      if (pixels)
        sgemm(pixels, c_out, count, {data_of<float>(x) + from, s.x_pixel, false},
              {data_of<float>(weight) + first, weight.stride(0), true}, beta, out, c_out);
      beta = 1;
    });
    return y;
  }
  for_dtype(x.scalar_type(), [&](const auto& table, auto type) {
    using T = decltype(type);
    if (s.batch == 0) return;
    table.forward.run(data_of<T>(x), view_of(data_of<float>(weight), weight, call), b ? data_of<float>(*b) : nullptr,
                      static_cast<T*>(y.mutable_data_ptr()), s, scratch.get<char>(table.forward.scratch_bytes(s)),
                      threads_for(s));
  });
  return y;
}

Tensor readable_grad(const Tensor& grad, const Shape& s) {
  const Tensor result = readable(grad, "grad", true);
  STD_TORCH_CHECK(
      result.size(0) == s.batch && result.size(1) == s.c_out && result.size(2) == s.out_h && result.size(3) == s.out_w,
      "slim_conv2d: grad has not the output's shape");
  return result;
}

void put_backward_input(const Tensor& grad_y, const Tensor& weight, Tensor& grad_x, bool add, const Call& call) {
  const Shape& s = call.shape;
  float* const out = static_cast<float*>(grad_x.mutable_data_ptr());
  if (is_matrix_product(grad_y.scalar_type(), s, weight)) {
    const int64_t pixels = s.batch * s.in_h * s.in_w;
    return for_each_segment(call.segments, [&](int64_t to, int64_t first, int64_t count) {
      if (pixels)
        sgemm(pixels, count, s.c_out, {data_of<float>(grad_y), s.c_out, false},
              {data_of<float>(weight) + first, weight.stride(0), false}, add ? 1.0f : 0.0f, out + to, s.c_in);
    });
  }
  for_dtype(grad_y.scalar_type(), [&](const auto& table, auto type) {
    using T = decltype(type);
    if (s.batch == 0) return;
    table.backward_input.run(data_of<T>(grad_y), view_of(data_of<float>(weight), weight, call),
                             static_cast<T*>(grad_x.mutable_data_ptr()), add, s,
                             scratch.get<char>(table.backward_input.scratch_bytes(s)), threads_for(s));
  });
}

Tensor backward_input(const Tensor& grad, const Tensor& weight, Ints x_size, Ints stride, Ints padding, Ints dilation,
                      int64_t c_out, Ints segments) {
  const Call call = make_call(x_size, weight, stride, padding, dilation, c_out, segments);
  const Tensor grad_y = readable_grad(grad, call.shape);
  Tensor grad_x = new_image(grad_y, x_size);
  put_backward_input(grad_y, weight, grad_x, false, call);
  return grad_x;
}

// Adds to grad_x, which is dense in channels_last.
void backward_input_add(const Tensor& grad, const Tensor& weight, Tensor grad_x, Ints stride, Ints padding,
                        Ints dilation, int64_t c_out, Ints segments) {
  STD_TORCH_CHECK(grad_x.is_cpu() && grad_x.dim() == 4 && grad_x.scalar_type() == grad.scalar_type() &&
                      pixel_of(grad_x) == grad_x.size(1),
                  "slim_conv2d: grad_x must be in channels_last, of grad's dtype, on the CPU");
  const Ints x_size = {grad_x.size(0), grad_x.size(1), grad_x.size(2), grad_x.size(3)};
  const Call call = make_call(x_size, weight, stride, padding, dilation, c_out, segments);
  put_backward_input(readable_grad(grad, call.shape), weight, grad_x, true, call);
}

void clear(const Tensor& grad_weight, const Call& call) {
  Tensor rows = grad_weight;
  rows = torch::stable::narrow(rows, 0, 0, call.shape.c_out);
  for (size_t i = 0; i < call.segments.size(); i += 2) {
    Tensor region = torch::stable::narrow(rows, 1, call.segments[i], call.segments[i + 1]);
    torch::stable::zero_(region);
  }
}

void backward_weight(const Tensor& grad, const Tensor& image, Tensor grad_weight, Ints stride, Ints padding,
                     Ints dilation, int64_t c_out, Ints segments, bool add) {
  const Tensor x = readable(image, "x", false);
  Call call =
      make_call({x.size(0), x.size(1), x.size(2), x.size(3)}, grad_weight, stride, padding, dilation, c_out, segments);
  Shape& s = call.shape;
  s.x_pixel = pixel_of(x);
  const Tensor grad_y = readable_grad(grad, s);
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type(), "slim_conv2d: grad must have x's dtype");
  if (s.batch && is_matrix_product(x.scalar_type(), s, grad_weight)) {
    for_each_segment(call.segments, [&](int64_t from, int64_t first, int64_t count) {
      sgemm(c_out, count, s.batch * s.in_h * s.in_w, {data_of<float>(grad_y), c_out, true},
            {data_of<float>(x) + from, s.x_pixel, false}, add ? 1.0f : 0.0f,
            static_cast<float*>(grad_weight.mutable_data_ptr()) + first, grad_weight.stride(0));
    });
    return;
  }
  for_dtype(x.scalar_type(), [&](const auto& table, auto type) {
    using T = decltype(type);
    if (s.batch == 0) {
      if (!add) clear(grad_weight, call);
      return;
    }
    table.backward_weight.run(data_of<T>(grad_y), data_of<T>(x),
                              view_of(static_cast<float*>(grad_weight.mutable_data_ptr()), grad_weight, call), add, s,
                              scratch.get<char>(table.backward_weight.scratch_bytes(s)), threads_for(s));
  });
}

}  // namespace
}  // namespace fastslim

STABLE_TORCH_LIBRARY_IMPL(fastslim, CPU, m) {
  m.impl("slim_conv2d_cpp", TORCH_BOX(&fastslim::forward));
  m.impl("slim_conv2d_backward_input_cpp", TORCH_BOX(&fastslim::backward_input));
  m.impl("slim_conv2d_backward_input_add_cpp", TORCH_BOX(&fastslim::backward_input_add));
  m.impl("slim_conv2d_backward_weight_cpp", TORCH_BOX(&fastslim::backward_weight));
}
