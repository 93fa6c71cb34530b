// What the CUDA bindings share: torch's current stream, C++ types of data types, workspaces.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "fastslim/scalar.h"

namespace fastslim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls body with a value of the operands' C++ type.
template <class Body> void for_dtype(ScalarType dtype, const char* op, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float());
    case ScalarType::BFloat16: return body(bfloat16());
    case ScalarType::Half: return body(float16());
    case ScalarType::Double: return body(double());
    default: STD_TORCH_CHECK(false, op, ": float32, bfloat16, float16 and float64 only");
  }
}

template <class T> const T* read(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> const T* read(const std::optional<Tensor>& t) { return t ? read<T>(*t) : nullptr; }
template <class T> T* write(Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }
template <class T> T* write(std::optional<Tensor>& t) { return t ? write<T>(*t) : nullptr; }

// Scratch memory from torch's allocator: no synchronisation, and safe under stream capture.
inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, like.device());
}

}  // namespace fastslim
