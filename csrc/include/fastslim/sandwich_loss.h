// sandwich_loss: cross-entropy of the max subnet (the teacher) and the distillation losses of its
// students, with the gradients of all logits, from one read of every row.
#pragma once
#include <cstdint>

namespace fastslim {

struct SandwichLossArgs {
  const void* teacher;          // [rows, classes]
  const void* const* students;  // num_students pointers to [rows, classes]
  const int64_t* target;        // [rows], each ignore_index or in [0, classes); null: no cross-entropy
  const void* class_weight;     // [classes] in the accumulation type; null: all ones
  void* teacher_grad;           // [rows, classes], or null
  void* student_grads;          // [num_students, rows, classes], or null
  double* row_losses;           // [1 + num_students, rows], before ce_scale and kl_scale
  int64_t rows, classes, num_students, ignore_index;
  double tau, label_smoothing;
  double class_weight_sum;    // over all classes
  double ce_scale, kl_scale;  // what the gradient of a row's cross-entropy and KL is multiplied by

  int64_t scratch_stride() const { return (classes + 15) / 16 * 16; }  // whole cache lines
};

// Rows [begin, end). scratch: 3 * scratch_stride() numbers of the accumulation type, one per thread, best on a cache
// line.
using SandwichLossFn = void (*)(const SandwichLossArgs& args, void* scratch, int64_t begin, int64_t end);

struct SandwichLossTable {
  SandwichLossFn f32, bf16, f64;
};

const SandwichLossTable& sandwich_loss_kernels();

}  // namespace fastslim
