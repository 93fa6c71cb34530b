// The launchers of csrc/cuda/sandwich_loss.cu, run by the host, for ctypes.
#include "../../csrc/cuda/sandwich_loss.cu"

namespace {

using fastslim::Accumulate;
using fastslim::SandwichLossCuda;

// pointers: teacher, target, class weight, teacher's gradient, students' gradients, losses, workspace, students ...
// numbers: rows, classes, students, ignore_index, whether there is a target. options: tau, label smoothing, scale of
// the KL.
template <class T> void run(void* const* pointers, const int64_t* numbers, const double* options) {
  SandwichLossCuda s{};
  s.teacher = pointers[0], s.target = static_cast<const int64_t*>(pointers[1]), s.class_weight = pointers[2];
  s.teacher_grad = pointers[3], s.student_grads = pointers[4], s.losses = pointers[5];
  s.workspace = static_cast<double*>(pointers[6]), s.students = pointers + 7;
  s.rows = numbers[0], s.classes = numbers[1], s.num_students = numbers[2], s.ignore_index = numbers[3];
  s.has_target = numbers[4] != 0;
  s.tau = options[0], s.label_smoothing = options[1], s.kl_scale = options[2];
  fastslim::SandwichLossCudaLaunchers<T>::run(s, nullptr);
}

template <class T> void scale(void* grads, const void* scales, int64_t count, int64_t size, int64_t stride) {
  fastslim::SandwichLossCudaLaunchers<T>::scale_gradients(static_cast<T*>(grads), count, size,
                                                          static_cast<const Accumulate<T>*>(scales), stride, nullptr);
}

}  // namespace

#define EXPORT(dtype, T)                                                                               \
  extern "C" void run_##dtype(void* const* p, const int64_t* n, const double* o) { run<T>(p, n, o); }  \
  extern "C" void scale_##dtype(void* g, const void* s, int64_t count, int64_t size, int64_t stride) { \
    scale<T>(g, s, count, size, stride);                                                               \
  }
EXPORT(float32, float)
EXPORT(bfloat16, fastslim::bfloat16)
EXPORT(float16, fastslim::float16)
EXPORT(float64, double)

extern "C" int64_t workspace(int64_t students) { return fastslim::sandwich_loss_workspace(students); }
