// CPU binding of batch_norm_act: checks, allocates, gathers the active channels' parameters, runs
// the kernels in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm_act_vectors.h"
#include "dense.h"
#include "fastslim/batch_norm_act.h"
#include "fastslim/isa.h"
#include "fastslim/scalar.h"
#include "scratch.h"

FASTSLIM_DEFINE_DISPATCH(BatchNormTable<BatchNormRows>, batch_norm_act_rows)
FASTSLIM_DEFINE_DISPATCH(BatchNormTable<BatchNormPlanes>, batch_norm_act_planes)

namespace fastslim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The memory of an activation tensor, and the order of dimensions all others must share.
struct Memory {
  BatchNormShape shape;
  std::vector<int64_t> order;

  explicit Memory(const Tensor& x) {
    const int64_t dims = x.dim();
    STD_TORCH_CHECK(dims >= 2, "batch_norm_act: x must have at least 2 dimensions (N, C, ...), has ", dims);
    int64_t pixels = 1;
    for (int64_t d = 2; d < dims; ++d) pixels *= x.size(d);
    for (int64_t d = 0; d < dims; ++d) order.push_back(d);
    shape = {x.size(0), x.size(1), pixels};
    if (dense_in(x, order)) return;
    order.erase(order.begin() + 1);
    order.push_back(1);
    shape = {x.size(0) * pixels, x.size(1), 1};
    STD_TORCH_CHECK(dense_in(x, order), "batch_norm_act: x must be contiguous or channels_last");
  }
};

void check_like(const Tensor& t, const Tensor& x, const Memory& memory, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == x.scalar_type() && t.dim() == x.dim(), "batch_norm_act: ", name,
                  " must have x's device, data type and dimensions");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(t.size(d) == x.size(d), "batch_norm_act: ", name, " must have x's shape");
  STD_TORCH_CHECK(x.numel() == 0 || dense_in(t, memory.order), "batch_norm_act: ", name,
                  " must have x's memory format");
}

template <class Kernels> const Kernels& kernels_of(const BatchNormTable<Kernels>& table, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return table.f32;
    case ScalarType::BFloat16: return table.bf16;
    case ScalarType::Double: return table.f64;
    default: STD_TORCH_CHECK(false, "batch_norm_act: x must be float32, float64 or bfloat16");
  }
}

Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code < kActivations, "batch_norm_act: no activation ", code);
  return Activation(code);
}

// Channels a task should hold so that starting a thread pays.
int64_t grain(const BatchNormShape& shape) { return shape.values() > 16384 ? 1 : 16384 / shape.values() + 1; }

thread_local Scratch scratch;

// The two ways of running: see BatchNormRows and BatchNormPlanes.
struct Runner {
  const BatchNormRows& rows;
  const BatchNormPlanes& planes;
  BatchNormArgs args;
  bool as_rows;
  int64_t chunks = 0;

  Runner(const Tensor& x, const BatchNormArgs& arguments)
      : rows(kernels_of(batch_norm_act_rows(), x)),
        planes(kernels_of(batch_norm_act_planes(), x)),
        args(arguments),
        as_rows(args.shape.inner < planes.smallest_inner) {
    if (!as_rows) return;
    chunks = rows.chunks(args.shape);
    args.scratch = scratch.get<char>(rows.scratch_bytes(args.shape));
  }
  void parallel(void (*kernel)(const BatchNormArgs&, int64_t, int64_t), int64_t n, int64_t least) const {
    torch::stable::parallel_for(0, n, least, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  void forward() const {
    if (!as_rows) return parallel(planes.fwd, args.shape.channels, grain(args.shape));
    if (args.training) {
      parallel(rows.fwd_sums, chunks, 1);
      rows.fwd_finish(args);
    }
    rows.prepare(args);
    parallel(rows.fwd_apply, chunks, 1);
  }
  void backward() const {
    if (!as_rows) return parallel(planes.bwd, args.shape.channels, grain(args.shape));
    rows.prepare(args);
    if (args.sums) parallel(rows.bwd_sums, chunks, 1);
    rows.bwd_finish(args);
    parallel(rows.bwd_apply, chunks, 1);
  }
};

// Returns y and the statistics it was made with, (2, C) float64: mean, 1 / sqrt(variance + eps).
std::tuple<Tensor, Tensor> batch_norm_act_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                              const OptionalTensor& residual, bool training, double momentum,
                                              double eps, int64_t activation, const Segments& segments) {
  const Memory memory(x);
  const int64_t channels = memory.shape.channels, n = memory.shape.values();
  const Segments active = or_prefix(segments, channels);
  STD_TORCH_CHECK(!training || n != 1, "batch_norm_act: more than 1 value per channel is needed in training");
  STD_TORCH_CHECK(training || (running_mean && running_var), "batch_norm_act: evaluation needs running statistics");
  Tensor y = torch::stable::empty_like(x);
  check_like(y, x, memory, "y");
  if (residual) check_like(*residual, x, memory, "residual");
  Tensor stats = torch::stable::new_empty(x, {2, channels}, ScalarType::Double);
  std::vector<double> vectors(3 * channels);
  double *mean = stats.mutable_data_ptr<double>(), *parameters = vectors.data();

  BatchNormArgs args{};
  args.shape = memory.shape;
  args.activation = activation_of(activation);
  args.training = training;
  args.eps = eps;
  args.weight = parameters;
  args.bias = parameters + channels;
  args.mean = mean;
  args.invstd = mean + channels;
  args.variance = parameters + 2 * channels;
  args.x = x.const_data_ptr();
  args.residual = residual ? residual->const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();
  gather(weight, active, channels, 1, parameters, "weight");
  gather(bias, active, channels, 0, parameters + channels, "bias");
  // In training the gathered values are overwritten; it checks what will be updated.
  gather(running_mean, active, channels, 0, args.mean, "running_mean");
  gather(running_var, active, channels, 1, args.variance, "running_var");
  for (int64_t c = 0; c < channels; ++c) args.invstd[c] = 1 / std::sqrt(args.variance[c] + eps);
  if (!x.numel()) return {y, stats};

  Runner(x, args).forward();
  if (training) {
    update_running(running_mean, active, momentum, args.mean, 1);
    update_running(running_var, active, momentum, args.variance, double(n) / double(n - 1));
  }
  return {y, stats};
}

struct Gradients {
  Tensor dx, dresidual;           // the latter empty unless wanted
  std::vector<double> vectors;    // of which two:
  const double *dweight, *dbias;  // (C,), of the active channels
};

// `extra`: see BatchNormArgs.
Gradients backward(const Tensor& dy, const Tensor& x, const OptionalTensor& extra, const Tensor& stats,
                   const OptionalTensor& weight, const OptionalTensor& bias, bool training, int64_t activation,
                   bool want_residual, bool want_parameters, const Segments& segments) {
  const Memory memory(x);
  const int64_t channels = memory.shape.channels;
  const Segments active = or_prefix(segments, channels);
  check_like(dy, x, memory, "dy");
  if (extra) check_like(*extra, x, memory, "y or residual");
  STD_TORCH_CHECK(!want_residual || extra, "batch_norm_act: the residual's gradient needs y or the residual");
  STD_TORCH_CHECK(stats.is_cpu() && stats.scalar_type() == ScalarType::Double && stats.dim() == 2 &&
                      stats.size(0) == 2 && stats.size(1) == channels && stats.is_contiguous(),
                  "batch_norm_act: stats must be what the forward returned");
  Tensor dx = torch::stable::empty_like(x);
  check_like(dx, x, memory, "dx");
  Tensor dresidual = want_residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  if (want_residual) check_like(dresidual, x, memory, "dresidual");
  std::vector<double> vectors(6 * channels);
  double* parameters = vectors.data();
  const double* saved = stats.const_data_ptr<double>();
  for (int64_t c = 0; c < 2 * channels; ++c) parameters[c] = saved[c];

  BatchNormArgs args{};
  args.shape = memory.shape;
  args.activation = activation_of(activation);
  args.training = training;
  args.sums = training || want_parameters;
  args.mean = parameters;
  args.invstd = parameters + channels;
  args.weight = parameters + 2 * channels;
  args.bias = parameters + 3 * channels;
  args.dweight = parameters + 4 * channels;
  args.dbias = parameters + 5 * channels;
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.extra = extra ? extra->const_data_ptr() : nullptr;
  args.dx = dx.mutable_data_ptr();
  args.dresidual = want_residual ? dresidual.mutable_data_ptr() : nullptr;
  gather(weight, active, channels, 1, parameters + 2 * channels, "weight");
  gather(bias, active, channels, 0, parameters + 3 * channels, "bias");
  if (x.numel()) Runner(x, args).backward();
  return {dx, dresidual, std::move(vectors), args.dweight, args.dbias};
}

// Returns dx, dresidual and, of the active channels, dweight and dbias (C,) in float64 for float64 x, else float32.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward_cpu(const Tensor& dy, const Tensor& x,
                                                                       const OptionalTensor& extra, const Tensor& stats,
                                                                       const OptionalTensor& weight,
                                                                       const OptionalTensor& bias, bool training,
                                                                       int64_t activation, bool want_residual,
                                                                       bool want_parameters, const Segments& segments) {
  const Gradients gradients =
      backward(dy, x, extra, stats, weight, bias, training, activation, want_residual, want_parameters, segments);
  const int64_t channels = x.size(1);
  const bool wide = x.scalar_type() == ScalarType::Double;
  const auto parameter_gradient = [&](const double* values) {
    Tensor t = torch::stable::new_empty(x, {channels}, wide ? ScalarType::Double : ScalarType::Float);
    void* data = t.mutable_data_ptr();
    for (int64_t c = 0; c < channels; ++c) {
      if (wide) {
        static_cast<double*>(data)[c] = values[c];
      } else {
        static_cast<float*>(data)[c] = float(values[c]);
      }
    }
    return t;
  };
  return {gradients.dx, gradients.dresidual, parameter_gradient(gradients.dweight),
          parameter_gradient(gradients.dbias)};
}

// As batch_norm_act_backward_cpu; dweight and dbias go straight into full-size gradients.
std::tuple<Tensor, Tensor> batch_norm_act_backward_into_cpu(
    const Tensor& dy, const Tensor& x, const OptionalTensor& extra, const Tensor& stats, const OptionalTensor& weight,
    const OptionalTensor& bias, bool training, int64_t activation, bool want_residual, const Segments& segments,
    const OptionalTensor& grad_weight, bool add_weight, const OptionalTensor& grad_bias, bool add_bias) {
  const Gradients gradients = backward(dy, x, extra, stats, weight, bias, training, activation, want_residual,
                                       grad_weight || grad_bias, segments);
  const int64_t channels = x.size(1);
  const Segments active = or_prefix(segments, channels);
  put(grad_weight, add_weight, gradients.dweight, active, channels);
  put(grad_bias, add_bias, gradients.dbias, active, channels);
  return {gradients.dx, gradients.dresidual};
}

}  // namespace
}  // namespace fastslim

STABLE_TORCH_LIBRARY_IMPL(fastslim, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&fastslim::batch_norm_act_cpu));
  m.impl("batch_norm_act_backward", TORCH_BOX(&fastslim::batch_norm_act_backward_cpu));
  m.impl("batch_norm_act_backward_into", TORCH_BOX(&fastslim::batch_norm_act_backward_into_cpu));
}
