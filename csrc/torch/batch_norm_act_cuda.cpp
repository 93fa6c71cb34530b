// CUDA binding of batch_norm_act and of its second stage alone: checks, allocates, launches on
// torch's current stream.
#include "fastslim/batch_norm_act_cuda.h"

#include <tuple>

#include "cuda_common.h"
#include "dense.h"

namespace fastslim {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Segments = std::vector<int64_t>;

// What all tensors of a call share: the shape for the launchers, and the order of dimensions.
struct Memory {
  BatchNormCuda shape{};
  Segments order;

  explicit Memory(const Tensor& x) {
    const int64_t dims = x.dim();
    STD_TORCH_CHECK(dims >= 2, "batch_norm_act: x must have at least 2 dimensions (N, C, ...), has ", dims);
    STD_TORCH_CHECK(x.size(1) <= INT32_MAX, "batch_norm_act: x has too many channels");
    int64_t pixels = 1;
    for (int64_t d = 2; d < dims; ++d) pixels *= x.size(d);
    for (int64_t d = 0; d < dims; ++d) order.push_back(d);
    shape.outer = x.size(0), shape.inner = pixels;
    shape.channels = Width(int32_t(x.size(1)));
    shape.multiple = shape.channels.value;
    if (!dense_in(x, order)) {
      order.erase(order.begin() + 1);
      order.push_back(1);
      shape.outer *= pixels, shape.inner = 1;
      STD_TORCH_CHECK(x.numel() == 0 || dense_in(x, order), "batch_norm_act: x must be contiguous or channels_last");
    }
    STD_TORCH_CHECK(shape.inner <= INT32_MAX, "batch_norm_act: an image has too many pixels");
  }
};

void check_like(const Tensor& t, const Tensor& x, const Memory& memory, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index() && t.scalar_type() == x.scalar_type() &&
                      t.dim() == x.dim(),
                  "batch_norm_act: ", name, " must have x's device, data type and dimensions");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(t.size(d) == x.size(d), "batch_norm_act: ", name, " must have x's shape");
  STD_TORCH_CHECK(x.numel() == 0 || dense_in(t, memory.order), "batch_norm_act: ", name,
                  " must have x's memory format");
}

void set_segments(BatchNormCuda& s, const Segments& segments) {
  STD_TORCH_CHECK(segments.size() % 2 == 0, "batch_norm_act: segments must be pairs of start and count");
  STD_TORCH_CHECK(segments.size() <= 2 * kBatchNormMaxSegments, "batch_norm_act: at most ", kBatchNormMaxSegments,
                  " segments on a GPU, got ", segments.size() / 2, "; use_backend(\"reference\") takes any number");
  ChannelSegments& active = s.parameters.segments;
  active.number = int32_t(segments.size() / 2);
  int64_t total = 0;
  for (size_t i = 0; i < segments.size(); i += 2) {
    const int64_t start = segments[i], count = segments[i + 1];
    STD_TORCH_CHECK(start >= 0 && count >= 0 && start <= INT32_MAX && count <= INT32_MAX,
                    "batch_norm_act: bad segment (", start, ", ", count, ")");
    active.start[i / 2] = int32_t(start), active.count[i / 2] = int32_t(count);
    total += count;
  }
  STD_TORCH_CHECK(segments.empty() || total == s.channels.value, "batch_norm_act: segments hold ", total,
                  " channels, x has ", s.channels.value);
}

ElementType element_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return ElementType::f32;
    case ScalarType::BFloat16: return ElementType::bf16;
    case ScalarType::Half: return ElementType::f16;
    case ScalarType::Double: return ElementType::f64;
    default:
      STD_TORCH_CHECK(false, "batch_norm_act: ", name, " must be float32, bfloat16, float16 or float64");
      return ElementType::f32;  // not reached
  }
}

ChannelVector vector_of(const OptionalTensor& t, const Tensor& x, const BatchNormCuda& s, const char* name,
                        bool written = false) {
  if (!t) return {};
  STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == x.get_device_index() && t->dim() == 1,
                  "batch_norm_act: ", name, " must be a vector on x's GPU");
  const ChannelSegments& active = s.parameters.segments;
  const int64_t full = t->size(0);
  STD_TORCH_CHECK(active.number > 0 || s.channels.value <= full, "batch_norm_act: ", name, " has ", full,
                  " channels, x has ", s.channels.value);
  for (int i = 0; i < active.number; ++i)
    STD_TORCH_CHECK(active.start[i] <= full - active.count[i], "batch_norm_act: ", name, " has ", full,
                    " channels, segment (", active.start[i], ", ", active.count[i], ") exceeds it");
  void* const data = written ? t->mutable_data_ptr() : const_cast<void*>(t->const_data_ptr());
  return {data, t->stride(0), element_type(*t, name)};
}

Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code < kActivations, "batch_norm_act: no activation ", code);
  return Activation(code);
}

Tensor new_stats(const Tensor& x, BatchNormCuda& s) {
  Tensor stats = torch::stable::new_empty(x, {2, s.channels.value}, ScalarType::Double);
  s.stats = static_cast<double*>(stats.mutable_data_ptr());
  return stats;
}

template <class T> Tensor make_workspace(const Tensor& x, BatchNormCuda& s) {
  Tensor t = workspace(x, BatchNormActCudaLaunchers<T>::workspace_bytes(s));
  s.workspace = t.mutable_data_ptr();
  return t;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                   const OptionalTensor& residual, bool training, double momentum, double eps,
                                   int64_t activation, Segments segments) {
  Memory memory(x);
  BatchNormCuda& s = memory.shape;
  STD_TORCH_CHECK(!training || s.outer * s.inner != 1,
                  "batch_norm_act: more than 1 value per channel is needed in training");
  STD_TORCH_CHECK(training || (running_mean && running_var), "batch_norm_act: evaluation needs running statistics");
  s.activation = activation_of(activation), s.training = training, s.momentum = momentum, s.eps = eps;
  set_segments(s, segments);
  s.parameters.weight = vector_of(weight, x, s, "weight");
  s.parameters.bias = vector_of(bias, x, s, "bias");
  s.parameters.running_mean = vector_of(running_mean, x, s, "running_mean", training);
  s.parameters.running_var = vector_of(running_var, x, s, "running_var", training);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  check_like(y, x, memory, "y");
  if (residual) check_like(*residual, x, memory, "residual");
  Tensor stats = new_stats(x, s);
  for_dtype(x.scalar_type(), "batch_norm_act", [&](auto type) {
    using T = decltype(type);
    const Tensor scratch = make_workspace<T>(x, s);
    STD_CUDA_CHECK(
        BatchNormActCudaLaunchers<T>::forward(read<T>(x), read<T>(residual), write<T>(y), s, current_stream(x)));
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const OptionalTensor& extra,
                                                    const Tensor& stats, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, bool training, int64_t activation,
                                                    bool want_residual, bool want_parameters, Segments segments) {
  Memory memory(x);
  BatchNormCuda& s = memory.shape;
  check_like(dy, x, memory, "dy");
  if (extra) check_like(*extra, x, memory, "y or residual");
  STD_TORCH_CHECK(!want_residual || extra, "batch_norm_act: the residual's gradient needs y or the residual");
  STD_TORCH_CHECK(stats.is_cuda() && stats.get_device_index() == x.get_device_index() &&
                      stats.scalar_type() == ScalarType::Double && stats.dim() == 2 && stats.size(0) == 2 &&
                      stats.size(1) == s.channels.value && stats.is_contiguous(),
                  "batch_norm_act: stats must be what the forward returned");
  s.activation = activation_of(activation), s.training = training;
  s.stats = const_cast<double*>(static_cast<const double*>(stats.const_data_ptr()));
  set_segments(s, segments);
  s.parameters.weight = vector_of(weight, x, s, "weight");
  s.parameters.bias = vector_of(bias, x, s, "bias");
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x);
  check_like(dx, x, memory, "dx");
  Tensor dresidual = want_residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  if (want_residual) check_like(dresidual, x, memory, "dresidual");
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor dweight = torch::stable::new_empty(x, {s.channels.value}, wide);
  Tensor dbias = torch::stable::new_empty(x, {s.channels.value}, wide);
  for_dtype(x.scalar_type(), "batch_norm_act", [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Tensor scratch = make_workspace<T>(x, s);
    STD_CUDA_CHECK(BatchNormActCudaLaunchers<T>::backward(
        read<T>(dy), read<T>(x), read<T>(extra), write<T>(dx), want_residual ? write<T>(dresidual) : nullptr,
        write<A>(dweight), write<A>(dbias), training || want_parameters, s, current_stream(x)));
  });
  return {dx, dresidual, dweight, dbias};
}

std::tuple<Tensor, Tensor> finalize(const Tensor& partials, int64_t rows, int64_t rows_per_chunk,
                                    const OptionalTensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                    double momentum, double eps, Segments segments) {
  STD_TORCH_CHECK(partials.is_cuda() && partials.scalar_type() == ScalarType::Float && partials.dim() == 3 &&
                      partials.size(1) == 3 && partials.size(2) <= INT32_MAX && partials.is_contiguous(),
                  "batch_norm_finalize: partials must be float32 (chunks, 3, C), contiguous, on the GPU");
  STD_TORCH_CHECK(rows > 1 && rows_per_chunk > 0 && rows_per_chunk <= INT32_MAX,
                  "batch_norm_finalize: more than 1 row is needed, in chunks of 1 and more");
  const BatchNormChunks chunks = chunks_of_rows(rows, rows_per_chunk);
  STD_TORCH_CHECK(partials.size(0) == (rows - 1) / rows_per_chunk + 1, "batch_norm_finalize: ", rows,
                  " rows in chunks of ", rows_per_chunk, " make other than ", partials.size(0), " chunks");
  BatchNormCuda s{};
  s.outer = rows, s.inner = 1, s.training = true, s.momentum = momentum, s.eps = eps;
  s.channels = Width(int32_t(partials.size(2)));
  set_segments(s, segments);
  s.parameters.weight = vector_of(weight, partials, s, "weight");
  s.parameters.bias = vector_of(bias, partials, s, "bias");
  s.parameters.running_mean = vector_of(running_mean, partials, s, "running_mean", true);
  s.parameters.running_var = vector_of(running_var, partials, s, "running_var", true);
  torch::stable::accelerator::DeviceGuard guard(partials.get_device_index());
  Tensor stats = new_stats(partials, s);
  Tensor coefficients = torch::stable::new_empty(partials, {3, s.channels.value});
  STD_CUDA_CHECK(
      batch_norm_finalize(read<float>(partials), chunks, write<float>(coefficients), s, current_stream(partials)));
  return {stats, coefficients};
}

}  // namespace
}  // namespace fastslim

STABLE_TORCH_LIBRARY_IMPL(fastslim, CUDA, m) {
  m.impl("batch_norm_act", TORCH_BOX(&fastslim::forward));
  m.impl("batch_norm_act_backward", TORCH_BOX(&fastslim::backward));
  m.impl("batch_norm_finalize", TORCH_BOX(&fastslim::finalize));
}
