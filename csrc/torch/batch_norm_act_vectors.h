// A layer's full-size vectors (weight, bias, running statistics, their gradients) and the channels of them that are
// active.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "fastslim/scalar.h"

namespace fastslim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Segments = std::vector<int64_t>;

Segments or_prefix(const Segments& segments, int64_t channels) {
  return segments.empty() ? Segments{0, channels} : segments;
}

void check_vector(const Tensor& t, const Segments& segments, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1, "batch_norm_act: ", name, " must be a vector on the CPU");
  STD_TORCH_CHECK(segments.size() % 2 == 0, "batch_norm_act: segments must be pairs of start and count");
  int64_t total = 0;
  for (size_t i = 0; i < segments.size(); i += 2) {
    const int64_t start = segments[i], count = segments[i + 1];
    STD_TORCH_CHECK(start >= 0 && count >= 0 && count <= t.size(0) && start <= t.size(0) - count,
                    "batch_norm_act: ", name, " has ", t.size(0), " channels, segment (", start, ", ", count,
                    ") exceeds it");
    total += count;
  }
  STD_TORCH_CHECK(total == channels, "batch_norm_act: segments hold ", total, " channels, x has ", channels);
}

// Calls f(channel of x, element of the full vector) for the active channels.
template <class T, class F> void each_active(T* data, int64_t stride, const Segments& segments, F f) {
  int64_t c = 0;
  for (size_t i = 0; i < segments.size(); i += 2)
    for (int64_t j = 0; j < segments[i + 1]; ++j) f(c++, data + (segments[i] + j) * stride);
}

void gather(const OptionalTensor& t, const Segments& segments, int64_t channels, double missing, double* out,
            const char* name) {
  if (!t) {
    for (int64_t c = 0; c < channels; ++c) out[c] = missing;
    return;
  }
  check_vector(*t, segments, channels, name);
  const int64_t stride = t->stride(0);
  const void* data = t->const_data_ptr();
  const auto read = [&](int64_t c, const auto* p) { out[c] = double(to_accumulate(*p)); };
  switch (t->scalar_type()) {
    case ScalarType::Float: return each_active(static_cast<const float*>(data), stride, segments, read);
    case ScalarType::Double: return each_active(static_cast<const double*>(data), stride, segments, read);
    case ScalarType::BFloat16: return each_active(static_cast<const bfloat16*>(data), stride, segments, read);
    default: STD_TORCH_CHECK(false, "batch_norm_act: ", name, " must be float32, float64 or bfloat16");
  }
}

// running <- (1 - momentum) * running + momentum * batch, for the active channels.
void update_running(const OptionalTensor& t, const Segments& segments, double momentum, const double* batch,
                    double factor) {
  if (!t) return;
  const int64_t stride = t->stride(0);
  void* data = t->mutable_data_ptr();
  const auto write = [&](int64_t c, auto* p) {
    const double value = (1 - momentum) * double(to_accumulate(*p)) + momentum * batch[c] * factor;
    from_accumulate(Accumulate<std::remove_pointer_t<decltype(p)>>(value), p);
  };
  switch (t->scalar_type()) {
    case ScalarType::Float: return each_active(static_cast<float*>(data), stride, segments, write);
    case ScalarType::Double: return each_active(static_cast<double*>(data), stride, segments, write);
    default: return each_active(static_cast<bfloat16*>(data), stride, segments, write);
  }
}

// Adds to the active channels of a full-size gradient, or overwrites them.
void put(const OptionalTensor& full, bool add, const double* values, const Segments& active, int64_t channels) {
  if (!full) return;
  check_vector(*full, active, channels, "a gradient");
  void* data = full->mutable_data_ptr();
  const auto write = [&](int64_t c, auto* p) {
    using A = Accumulate<std::remove_pointer_t<decltype(p)>>;
    from_accumulate(add ? to_accumulate(*p) + A(values[c]) : A(values[c]), p);
  };
  switch (full->scalar_type()) {
    case ScalarType::Float: return each_active(static_cast<float*>(data), full->stride(0), active, write);
    case ScalarType::Double: return each_active(static_cast<double*>(data), full->stride(0), active, write);
    default: STD_TORCH_CHECK(false, "batch_norm_act: gradients must be float32 or float64");
  }
}

}  // namespace
}  // namespace fastslim
