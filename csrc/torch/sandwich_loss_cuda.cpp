// Binds sandwich_loss's CUDA kernels: checks, allocates, launches on torch's current stream.
#include "fastslim/sandwich_loss_cuda.h"

#include <tuple>

#include "cuda_common.h"

namespace fastslim {
namespace {

void check_logits(const Tensor& t, const Tensor& teacher) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == teacher.get_device_index() &&
                      t.scalar_type() == teacher.scalar_type() && t.dim() == 2 && t.is_contiguous() &&
                      t.size(0) == teacher.size(0) && t.size(1) == teacher.size(1),
                  "sandwich_loss: a student's logits have the teacher's shape, dtype and GPU and are contiguous");
}

std::tuple<Tensor, Tensor> sandwich_loss(const Tensor& teacher, const std::vector<Tensor>& students,
                                         const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight,
                                         double tau, double label_smoothing, int64_t ignore_index, double kl_scale,
                                         bool teacher_grad, bool student_grad) {
  const ScalarType accumulate = teacher.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(teacher.is_cuda() && teacher.dim() == 2 && teacher.is_contiguous() && teacher.size(1) > 0,
                  "sandwich_loss: logits are contiguous (rows, classes) with at least one class");
  STD_TORCH_CHECK(teacher.size(1) <= kSandwichLossMaxClasses, "sandwich_loss: at most ", kSandwichLossMaxClasses,
                  " classes on a GPU");
  SandwichLossCuda args{};
  args.rows = teacher.size(0), args.classes = teacher.size(1), args.num_students = int64_t(students.size());
  args.tau = tau, args.label_smoothing = label_smoothing, args.kl_scale = kl_scale, args.ignore_index = ignore_index;
  args.teacher = teacher.const_data_ptr();
  std::vector<const void*> student_rows;
  for (const Tensor& student : students) {
    check_logits(student, teacher);
    student_rows.push_back(student.const_data_ptr());
  }
  args.students = student_rows.data();
  if (target) {
    STD_TORCH_CHECK(target->is_cuda() && target->get_device_index() == teacher.get_device_index() &&
                        target->scalar_type() == ScalarType::Long && target->is_contiguous() && target->dim() == 1 &&
                        target->size(0) == args.rows,
                    "sandwich_loss: target is a contiguous int64 (rows,) tensor on the logits' GPU");
    args.target = target->const_data_ptr<int64_t>(), args.has_target = true;
  }
  if (class_weight) {
    STD_TORCH_CHECK(class_weight->is_cuda() && class_weight->get_device_index() == teacher.get_device_index() &&
                        class_weight->scalar_type() == accumulate && class_weight->dim() == 1 &&
                        class_weight->is_contiguous() && class_weight->size(0) == args.classes,
                    "sandwich_loss: class_weight is a contiguous (classes,) tensor of the accumulation dtype");
    args.class_weight = class_weight->const_data_ptr();
  }

  torch::stable::accelerator::DeviceGuard guard(teacher.get_device_index());
  const int64_t of_teacher = teacher_grad && target ? 1 : 0, of_students = student_grad ? args.num_students : 0;
  Tensor losses = torch::stable::new_empty(teacher, {1 + args.num_students}, accumulate);
  Tensor grads = torch::stable::new_empty(teacher, {of_teacher + of_students, args.rows, args.classes});
  Tensor parts = workspace(teacher, sandwich_loss_workspace(args.num_students) * int64_t(sizeof(double)));
  args.losses = losses.mutable_data_ptr();
  args.workspace = write<double>(parts);
  for_dtype(teacher.scalar_type(), "sandwich_loss", [&](auto type) {
    using T = decltype(type);
    T* grad = write<T>(grads);
    args.teacher_grad = of_teacher ? grad : nullptr;
    args.student_grads = of_students ? grad + of_teacher * args.rows * args.classes : nullptr;
    STD_CUDA_CHECK(SandwichLossCudaLaunchers<T>::run(args, current_stream(teacher)));
  });
  return {losses, grads};
}

void scale_gradients(Tensor grads, const Tensor& scales) {
  const ScalarType accumulate = grads.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(grads.is_cuda() && grads.is_contiguous() && grads.dim() == 3 && grads.size(0) <= 65535,
                  "scale_gradients: gradients are one contiguous (count, rows, classes) tensor, count at most 65535");
  STD_TORCH_CHECK(scales.is_cuda() && scales.get_device_index() == grads.get_device_index() && scales.dim() == 1 &&
                      scales.size(0) == grads.size(0) && scales.scalar_type() == accumulate,
                  "scale_gradients: scales are (count,) numbers of the accumulation dtype on the gradients' GPU");
  torch::stable::accelerator::DeviceGuard guard(grads.get_device_index());
  for_dtype(grads.scalar_type(), "scale_gradients", [&](auto type) {
    using T = decltype(type);
    STD_CUDA_CHECK(SandwichLossCudaLaunchers<T>::scale_gradients(
        write<T>(grads), grads.size(0), grads.size(1) * grads.size(2), read<Accumulate<T>>(scales), scales.stride(0),
        current_stream(grads)));
  });
}

}  // namespace
}  // namespace fastslim

STABLE_TORCH_LIBRARY_IMPL(fastslim, CUDA, m) {
  m.impl("sandwich_loss", TORCH_BOX(&fastslim::sandwich_loss));
  m.impl("scale_gradients", TORCH_BOX(&fastslim::scale_gradients));
}
