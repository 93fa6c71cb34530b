// Binding of sandwich_loss: checks, allocates, runs rows in parallel and adds their losses in order.
#include "fastslim/sandwich_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "fastslim/isa.h"
#include "scratch.h"

FASTSLIM_DEFINE_DISPATCH(SandwichLossTable, sandwich_loss_kernels)

namespace fastslim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Work of one task, in logits: large enough to hide the cost of starting it.
constexpr int64_t kGrain = 16384;

thread_local Scratch scratch;

double class_weight_at(const void* weight, bool is_double, int64_t c) {
  if (!weight) return 1;
  return is_double ? static_cast<const double*>(weight)[c] : static_cast<const float*>(weight)[c];
}

// Sum of the targets' class weights; refuses a target that is no class, which would be read out of bounds.
double target_weight_sum(const SandwichLossArgs& args, bool is_double) {
  double total = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t y = args.target[row];
    if (y == args.ignore_index) continue;
    STD_TORCH_CHECK(y >= 0 && y < args.classes, "sandwich_loss: target ", y, " is not a class of [0, ", args.classes,
                    ")");
    total += class_weight_at(args.class_weight, is_double, y);
  }
  return total;
}

std::tuple<Tensor, Tensor> sandwich_loss(const Tensor& teacher, const std::vector<Tensor>& students,
                                         const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight,
                                         double tau, double label_smoothing, int64_t ignore_index, double kl_scale,
                                         bool teacher_grad, bool student_grad) {
  const ScalarType dtype = teacher.scalar_type();
  const bool is_double = dtype == ScalarType::Double;
  const ScalarType accumulate = is_double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(is_double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "sandwich_loss: logits are float32, bfloat16 or float64");
  STD_TORCH_CHECK(teacher.dim() == 2 && teacher.is_contiguous() && teacher.size(1) > 0,
                  "sandwich_loss: logits are contiguous (rows, classes) with at least one class");
  SandwichLossArgs args{};
  args.rows = teacher.size(0);
  args.classes = teacher.size(1);
  args.num_students = int64_t(students.size());
  args.tau = tau;
  args.label_smoothing = label_smoothing;
  args.ignore_index = ignore_index;
  args.kl_scale = kl_scale;
  args.teacher = teacher.const_data_ptr();

  std::vector<const void*> student_rows;
  for (const Tensor& student : students) {
    STD_TORCH_CHECK(student.is_cpu() && student.scalar_type() == dtype && student.dim() == 2 &&
                        student.is_contiguous() && student.size(0) == args.rows && student.size(1) == args.classes,
                    "sandwich_loss: a student's logits have the teacher's shape and dtype and are contiguous");
    student_rows.push_back(student.const_data_ptr());
  }
  args.students = student_rows.data();
  args.class_weight_sum = double(args.classes);
  if (class_weight) {
    STD_TORCH_CHECK(class_weight->is_cpu() && class_weight->scalar_type() == accumulate && class_weight->dim() == 1 &&
                        class_weight->is_contiguous() && class_weight->size(0) == args.classes,
                    "sandwich_loss: class_weight is a contiguous (classes,) tensor of the accumulation dtype");
    args.class_weight = class_weight->const_data_ptr();
    args.class_weight_sum = 0;
    for (int64_t c = 0; c < args.classes; ++c)
      args.class_weight_sum += class_weight_at(args.class_weight, is_double, c);
  }
  double target_weight = 1;
  if (target) {
    STD_TORCH_CHECK(target->is_cpu() && target->scalar_type() == ScalarType::Long && target->is_contiguous() &&
                        target->dim() == 1 && target->size(0) == args.rows,
                    "sandwich_loss: target is a contiguous int64 (rows,) tensor");
    args.target = target->const_data_ptr<int64_t>();
    target_weight = target_weight_sum(args, is_double);
  }
  args.ce_scale = 1 / target_weight;

  const bool has_teacher_grad = teacher_grad && target;
  const int64_t num_grads = int64_t(has_teacher_grad) + (student_grad ? args.num_students : 0);
  Tensor grads = torch::stable::new_empty(teacher, {num_grads, args.rows, args.classes});
  char* grad = static_cast<char*>(grads.mutable_data_ptr());
  if (has_teacher_grad) {
    args.teacher_grad = grad;
    grad += args.rows * args.classes * int64_t(teacher.element_size());
  }
  if (student_grad) args.student_grads = grad;

  std::vector<double> row_losses(size_t((1 + args.num_students) * args.rows));
  args.row_losses = row_losses.data();
  const SandwichLossTable& kernels = sandwich_loss_kernels();
  const SandwichLossFn run = is_double ? kernels.f64 : dtype == ScalarType::Float ? kernels.f32 : kernels.bf16;
  const int64_t row_work = args.classes * (1 + args.num_students);
  torch::stable::parallel_for(
      0, args.rows, row_work >= kGrain ? 1 : kGrain / row_work,
      [&](int64_t begin, int64_t end) { run(args, scratch.get<double>(3 * args.scratch_stride()), begin, end); });

  Tensor losses = torch::stable::new_empty(teacher, {1 + args.num_students}, accumulate);
  for (int64_t i = 0; i <= args.num_students; ++i) {
    double total = 0;
    for (int64_t row = 0; row < args.rows; ++row) total += row_losses[size_t(i * args.rows + row)];
    total = i ? total * kl_scale : total / target_weight;
    if (is_double)
      losses.mutable_data_ptr<double>()[i] = total;
    else
      losses.mutable_data_ptr<float>()[i] = float(total);
  }
  return {losses, grads};
}

}  // namespace
}  // namespace fastslim

STABLE_TORCH_LIBRARY_IMPL(fastslim, CPU, m) { m.impl("sandwich_loss", TORCH_BOX(&fastslim::sandwich_loss)); }
