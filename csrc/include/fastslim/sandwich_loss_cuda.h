// sandwich_loss on a GPU: the losses and gradients of sandwich_loss.h in three launches and without
// a host sync; what the CPU refuses, a target that is no class, makes its row NaN here.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "fastslim/scalar.h"

namespace fastslim {

struct SandwichLossCuda {
  const void* teacher;          // [rows, classes]
  const void* const* students;  // num_students pointers, on the host, to [rows, classes]
  const int64_t* target;        // [rows]
  const void* class_weight;     // [classes] in the accumulation type; null: all ones
  void* teacher_grad;           // [rows, classes], or null
  void* student_grads;          // [num_students, rows, classes], or null
  void* losses;                 // [1 + num_students] in the accumulation type
  double* workspace;            // sandwich_loss_workspace(num_students) numbers
  int64_t rows, classes, num_students, ignore_index;
  double tau, label_smoothing, kl_scale;
  bool has_target;  // else there is no cross-entropy; memory of an empty tensor may be null, too
};

// Parts of a sum that different blocks compute and that is finished in a fixed order.
constexpr int64_t kSandwichLossParts = 32;
// Groups of threads that walk over the rows; each keeps one sum per loss.
constexpr int64_t kSandwichLossGroups = 8192;

// Classes of a row are counted in 32 bits.
constexpr int64_t kSandwichLossMaxClasses = int64_t(1) << 30;

// Numbers in the workspace.
constexpr int64_t sandwich_loss_workspace(int64_t num_students) {
  return 2 * kSandwichLossParts + (1 + num_students) * kSandwichLossGroups;
}

template <class T> struct SandwichLossCudaLaunchers {
  using A = Accumulate<T>;
  static cudaError_t run(const SandwichLossCuda& args, cudaStream_t stream);
  // grads[i] *= scales[i * stride], for `count` gradients of `size` numbers; those with scale 1 are not touched.
  static cudaError_t scale_gradients(T* grads, int64_t count, int64_t size, const A* scales, int64_t stride,
                                     cudaStream_t stream);
};

}  // namespace fastslim
