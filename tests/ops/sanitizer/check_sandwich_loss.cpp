// sandwich_loss: rows classes students with_target with_class_weight smoothing_percent tau_tenths scale seed.
#include <cstring>
#include <vector>

#include "driver.h"
#include "fastslim/isa.h"
#include "fastslim/sandwich_loss.h"

FASTSLIM_DEFINE_DISPATCH(SandwichLossTable, sandwich_loss_kernels)

namespace fastslim {
namespace {

constexpr int64_t kIgnored = -100;

// log(sum(exp(row / tau))), and the softmax at class c.
template <class T> double log_sum(const Buffer<T>& logits, int64_t start, int64_t classes, double tau) {
  double largest = -1e300, total = 0;
  for (int64_t c = 0; c < classes; ++c) largest = std::fmax(largest, logits[start + c] / tau);
  for (int64_t c = 0; c < classes; ++c) total += std::exp(logits[start + c] / tau - largest);
  return largest + std::log(total);
}

template <class T>
void check(int64_t rows, int64_t classes, int64_t students, bool with_target, bool with_weight, double smoothing,
           double tau, double scale, Random random, SandwichLossFn run) {
  using A = Accumulate<T>;
  const int64_t size = rows * classes;
  Input<T> teacher(size, random), all_students(students * size, random);
  for (int64_t i = 0; i < teacher.size(); ++i) teacher.set(i, teacher[i] * scale);
  for (int64_t i = 0; i < all_students.size(); ++i) all_students.set(i, all_students[i] * scale);
  std::vector<const void*> pointers;
  for (int64_t i = 0; i < students; ++i) pointers.push_back(all_students.data() + i * size);
  Buffer<int64_t> target(rows);
  Buffer<A> class_weight(classes);
  for (int64_t r = 0; r < rows; ++r)
    target.data()[r] = r % 5 == 4 ? kIgnored : int64_t((random.next() + 1) / 2 * double(classes)) % classes;
  double weight_sum = 0;
  for (int64_t c = 0; c < classes; ++c) class_weight.set(c, with_weight ? random.next() + 1.5 : 1);
  for (int64_t c = 0; c < classes; ++c) weight_sum += class_weight[c];

  Output<T> teacher_grad(size), student_grads(students * size);
  Output<double> losses((1 + students) * rows);
  SandwichLossArgs args{};
  args.teacher = teacher.data();
  args.students = pointers.data();
  args.target = with_target ? target.data() : nullptr;
  args.class_weight = with_weight ? class_weight.data() : nullptr;
  args.teacher_grad = with_target ? teacher_grad.data() : nullptr;
  args.student_grads = student_grads.data();
  args.row_losses = losses.data();
  args.rows = rows, args.classes = classes, args.num_students = students, args.ignore_index = kIgnored;
  args.tau = tau, args.label_smoothing = smoothing, args.class_weight_sum = weight_sum;
  args.ce_scale = 0.5, args.kl_scale = 0.25;
  in_two_pieces(rows, [&](int64_t begin, int64_t end) {
    Output<A> scratch(3 * args.scratch_stride());
    run(args, scratch.data(), begin, end);
  });

  const double loss_tolerance = kEpsilon<A> * 64 * (1 + scale / tau) * weight_sum, share = smoothing / double(classes);
  const double grad_tolerance = kEpsilon<T> * 4 * (1 + weight_sum) + kEpsilon<A> * 64 * scale / tau;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t start = r * classes;
    if (with_target) {
      const int64_t y = int64_t(target.data()[r]);
      const double log_z = log_sum(teacher, start, classes, 1);
      double loss = 0, mass = 0;
      for (int64_t c = 0; c < classes; ++c) {
        const double label = y == kIgnored ? 0 : class_weight[c] * (share + (c == y ? 1 - smoothing : 0));
        loss += label * (log_z - teacher[start + c]);
        mass += label;
      }
      expect_near("cross-entropy", r, losses[r], loss, loss_tolerance);
      for (int64_t c = 0; c < classes; ++c) {
        const double label = y == kIgnored ? 0 : class_weight[c] * (share + (c == y ? 1 - smoothing : 0));
        const double gradient = 0.5 * (mass * std::exp(teacher[start + c] - log_z) - label);
        expect_near("teacher_grad", start + c, teacher_grad[start + c], gradient, grad_tolerance);
      }
    }
    const double log_z = log_sum(teacher, start, classes, tau);
    for (int64_t i = 0; i < students; ++i) {
      const int64_t base = i * size + start;
      const double log_q = log_sum(all_students, base, classes, tau);
      double loss = 0;
      for (int64_t c = 0; c < classes; ++c) {
        const double log_teacher = teacher[start + c] / tau - log_z, log_student = all_students[base + c] / tau - log_q;
        loss += std::exp(log_teacher) * (log_teacher - log_student);
        const double gradient = 0.25 * (std::exp(log_student) - std::exp(log_teacher)) / tau;
        expect_near("student_grad", base + c, student_grads[base + c], gradient, grad_tolerance);
      }
      expect_near("KL", r, losses[(1 + i) * rows + r], loss, loss_tolerance);
    }
  }
}

}  // namespace

void check_sandwich_loss(const char* dtype, std::istream& line) {
  int64_t rows = 0, classes = 0, students = 0;
  bool with_target = false, with_weight = false;
  double smoothing = 0, tau = 0, scale = 0;
  Random random{};
  line >> rows >> classes >> students >> with_target >> with_weight >> smoothing >> tau >> scale >> random.state;
  const SandwichLossTable& table = sandwich_loss_kernels();
  smoothing /= 100, tau /= 10;
  if (!std::strcmp(dtype, "bf16"))
    check<bfloat16>(rows, classes, students, with_target, with_weight, smoothing, tau, scale, random, table.bf16);
  else if (!std::strcmp(dtype, "f64"))
    check<double>(rows, classes, students, with_target, with_weight, smoothing, tau, scale, random, table.f64);
  else
    check<float>(rows, classes, students, with_target, with_weight, smoothing, tau, scale, random, table.f32);
}

}  // namespace fastslim
