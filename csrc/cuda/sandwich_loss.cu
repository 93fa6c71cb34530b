// The maths is written above csrc/cpu/sandwich_loss.cpp. A row is read by a warp or a block. Up to
// 8192 classes, read 16 bytes at a time, stay in its registers, so every logit is read once and its
// gradient written once; other rows are read twice (maximum and sum; loss and gradient), the teacher's
// once more per student.
// Sums run in the accumulation type over 32 logits of a thread and in double beyond, all in a fixed
// order: sums of weights, then the rows, then the sums of their losses are one launch each.
#include "fastslim/sandwich_loss_cuda.h"
#include "sandwich_loss_row.h"

namespace fastslim {
namespace {

constexpr int kThreads = 256;
constexpr int kParts = int(kSandwichLossParts);
constexpr int kStudentsPerLaunch = 16;

// What the kernels take of SandwichLossCuda, for up to kStudentsPerLaunch students.
template <class T> struct Rows {
  const T* teacher;                       // [rows, classes]
  const T* students[kStudentsPerLaunch];  // [rows, classes] each
  const int64_t* target;                  // [rows], or null
  const Accumulate<T>* class_weight;      // [classes], or null
  T* teacher_grad;                        // [rows, classes], or null
  T* student_grads;                       // [num_students, rows, classes], or null
  const double* weight_parts;             // [2, kParts]: of the sums of target weights and of class weights
  double* loss_parts;                     // [1 + num_students, groups]
  int64_t rows, ignore_index;
  int classes, num_students, parts, groups;
  double tau, label_smoothing, kl_scale;
};

// Sums of the targets' class weights and of all class weights; block b adds its share to parts[b]
// and parts[kParts + b].
template <class A>
__global__ void __launch_bounds__(kThreads)
    sandwich_loss_weights_kernel(const int64_t* target, const A* class_weight, int64_t rows, int64_t classes,
                                 int64_t ignore_index, double* parts) {
  double targets = 0, all = 0;
  const int64_t begin = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  for (int64_t row = begin; row < rows; row += step) {
    const int64_t y = target[row];
    if (y != ignore_index && y >= 0 && y < classes) targets += weight_of(class_weight, y);
  }
  for (int64_t c = begin; class_weight && c < classes; c += step) all += class_weight[c];
  targets = block_sum<kThreads>(targets);
  all = block_sum<kThreads>(all);
  if (threadIdx.x == 0) parts[blockIdx.x] = targets, parts[kParts + blockIdx.x] = all;
}

// Cross-entropy of a row, before ce_scale; its gradient, if wanted, times ce_scale.
template <bool Streams, class T, int V, int Group>
__device__ static inline double cross_entropy_row(const Rows<T>& args, int64_t row, const Softmax<Accumulate<T>>& p,
                                                  double ce_scale, double class_weight_sum, int lane,
                                                  Tile<T, V, Group>& tile) {
  using A = Accumulate<T>;
  const int classes = args.classes;
  const T* x = args.teacher + row * classes;
  T* grad = args.teacher_grad ? args.teacher_grad + row * classes : nullptr;
  const int64_t y = args.target[row];
  const bool ignored = y == args.ignore_index, broken = !ignored && (y < 0 || y >= classes);
  const bool has_label = !ignored && !broken;
  const double smooth = args.label_smoothing / classes;
  const double label_weight = has_label ? double(weight_of(args.class_weight, y)) : 0.0;
  const double hard = broken ? double(NAN) : (1 - args.label_smoothing) * label_weight;
  const double total_weight = hard + smooth * class_weight_sum, sum = p.sum_at_one;
  const A scale = A(ce_scale * total_weight / sum), uniform = A(ce_scale * smooth);
  double shifted = 0;
  for (int first = 0; (grad || smooth != 0) && first < classes; first += tile.kClasses) {
    if (Streams) tile.load(x, first, classes, lane);
    A part = 0;
#pragma unroll
    for (int i = 0; i < tile.kVectors; ++i) {
      if (tile.ends(first, i, classes)) break;
      const int c = tile.class_of(first, i, lane);
      if (c >= classes) continue;
      A g[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A d = tile.x[i][j] - p.max;
        A away = 0;
        if (smooth != 0) {
          const A weight = weight_of(args.class_weight, c + j);
          part += weight * d;
          away = weight * uniform;
        }
        g[j] = ignored ? A(0) : exp_of(d) * scale - away;
      }
      if (grad) store<V>(grad + c, g);
    }
    shifted += part;
    if (!Streams) break;
  }
  // The label's own gradient keeps its digits in double; the thread that has written it writes again.
  if (grad && has_label && lane == int(y / V % Group)) {
    const double probability = double(exp_of(to_accumulate(x[y]) - p.max)) / sum;
    const double label = hard + smooth * label_weight;
    from_accumulate(A(ce_scale * (total_weight * probability - label)), grad + y);
  }
  if (smooth != 0) shifted = group_sum<Group>(shifted);
  if (ignored || lane != 0) return 0;
  const double log_sum = log(sum);
  double loss = broken ? double(NAN) : hard * (log_sum - double(to_accumulate(x[y]) - p.max));
  if (smooth != 0) loss += smooth * (class_weight_sum * log_sum - shifted);
  return loss;
}

// KL of a row, before kl_scale; its gradient, if wanted, times kl_scale. p: the teacher's.
template <bool Streams, class T, int V, int Group>
__device__ static inline double kl_row(const Rows<T>& args, int64_t row, int student, const Softmax<Accumulate<T>>& p,
                                       int lane, Tile<T, V, Group>& t, Tile<T, V, Group>& s) {
  using A = Accumulate<T>;
  const int classes = args.classes;
  const A inverse_tau = A(1 / args.tau);
  const T *teacher_row = args.teacher + row * classes, *student_row = args.students[student] + row * classes;
  T* grad = args.student_grads ? args.student_grads + (student * args.rows + row) * classes : nullptr;
  const Softmax<A> q = softmax<Streams>(student_row, classes, lane, inverse_tau, false, s);
  // f - e (Y / Z) is exactly 0 where student and teacher agree.
  const A scale = A(args.kl_scale / args.tau / q.sum), ratio = A(q.sum / p.sum);
  double cross = 0;
  for (int first = 0; first < classes; first += s.kClasses) {
    if (Streams) t.load(teacher_row, first, classes, lane), s.load(student_row, first, classes, lane);
    A part = 0;
#pragma unroll
    for (int i = 0; i < s.kVectors; ++i) {
      if (s.ends(first, i, classes)) break;
      A g[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A dt = t.x[i][j] - p.max, ds = s.x[i][j] - q.max;
        const A e = exp_of(dt * inverse_tau), f = exp_of(ds * inverse_tau);
        part += e == A(0) ? A(0) : e * ((dt - ds) * inverse_tau);  // 0 log 0 = 0, also where both logits are -inf
        g[j] = (f - e * ratio) * scale;
      }
      const int c = s.class_of(first, i, lane);
      if (grad && c < classes) store<V>(grad + c, g);
    }
    cross += part;
    if (!Streams) break;
  }
  cross = group_sum<Group>(cross);
  return lane == 0 ? cross / p.sum + (log(q.sum) - log(p.sum)) : 0.0;
}

// Every group takes each `groups`-th row and writes the sums of its rows' losses.
template <class T, int V, int Group, bool Streams>
__global__ void __launch_bounds__(kThreads, sizeof(T) < sizeof(double) ? 2 : 1)
    sandwich_loss_rows_kernel(const Rows<T> args) {
  using A = Accumulate<T>;
  const int lane = int(threadIdx.x % Group), group = int(blockIdx.x * (kThreads / Group) + threadIdx.x / Group);
  if (group >= args.groups) return;  // a whole warp, or a whole block
  double ce_scale = 0, class_weight_sum = args.classes;
  if (args.target) {
    ce_scale = 1 / sum_of_parts(args.weight_parts, args.parts);
    if (args.class_weight) class_weight_sum = sum_of_parts(args.weight_parts + kParts, args.parts);
  }
  const A inverse_tau = args.num_students ? A(1 / args.tau) : A(1);
  const bool at_one = args.target && inverse_tau != A(1);
  Tile<T, V, Group> t, s;
  for (int64_t row = group; row < args.rows; row += args.groups) {
    const auto p = softmax<Streams>(args.teacher + row * args.classes, args.classes, lane, inverse_tau, at_one, t);
    const bool is_first = row == group;
    double* sum = args.loss_parts + group;
    if (args.target) {
      const double loss = cross_entropy_row<Streams>(args, row, p, ce_scale, class_weight_sum, lane, t);
      if (lane == 0) *sum = is_first ? loss : *sum + loss;
    }
    for (int student = 0; student < args.num_students; ++student) {
      const double loss = kl_row<Streams>(args, row, student, p, lane, t, s);
      sum += args.groups;
      if (lane == 0) *sum = is_first ? loss : *sum + loss;
    }
  }
}

// Block i finishes losses[i].
template <class A>
__global__ void __launch_bounds__(kThreads)
    sandwich_loss_sum_kernel(const double* loss_parts, const double* weight_parts, int parts, int groups,
                             bool has_cross_entropy, double kl_scale, A* losses) {
  double sum = 0;
  for (int i = int(threadIdx.x); i < groups; i += kThreads) sum += loss_parts[int64_t(blockIdx.x) * groups + i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x >= kWarpSize) return;
  const double target_weight = sum_of_parts(weight_parts, has_cross_entropy ? parts : 0);
  if (threadIdx.x != 0) return;
  losses[blockIdx.x] = A(blockIdx.x > 0 ? sum * kl_scale : has_cross_entropy ? sum / target_weight : 0.0);
}

// grads[i] *= scales[i * stride]; in the usual case, scale 1, nothing is read or written.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    scale_gradients_kernel(T* grads, int64_t size, const Accumulate<T>* scales, int64_t stride) {
  const Accumulate<T> scale = scales[blockIdx.y * stride];
  if (scale == Accumulate<T>(1)) return;
  T* grad = grads + blockIdx.y * size;
  const int64_t step = int64_t(gridDim.x) * kThreads * V;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V; i < size; i += step) {
    Accumulate<T> g[V];
    load<V>(grad + i, g);
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] *= scale;
    store<V>(grad + i, g);
  }
}

unsigned blocks_for(int64_t work, int64_t of_a_block, int64_t most) {
  const int64_t blocks = (work + of_a_block - 1) / of_a_block;
  return unsigned(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

// Whether rows of `size` numbers that start at p can be accessed 16 bytes at a time.
template <class T> bool in_vectors(const void* p, int64_t size) {
  return size % kVector<T> == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class T, int V> void launch_rows(const Rows<T>& args, cudaStream_t stream) {
  const dim3 blocks(unsigned(args.groups)), threads(kThreads);
  // A warp per row where rows are short or many, else a block: then more of the GPU takes part.
  if constexpr (sizeof(T) < sizeof(double)) {
    if (args.classes <= 128 || (args.classes <= Tile<T, V, kWarpSize>::kClasses && args.rows >= 2048)) {
      const dim3 fewer(blocks_for(args.groups, kThreads / kWarpSize, args.groups));
      FASTSLIM_LAUNCH((sandwich_loss_rows_kernel<T, V, kWarpSize, false>), fewer, threads, stream, args);
      return;
    }
    if constexpr (V > 1) {  // else streamed: what is read again lies in the cache
      if (args.classes <= Tile<T, V, kThreads>::kClasses) {
        FASTSLIM_LAUNCH((sandwich_loss_rows_kernel<T, V, kThreads, false>), blocks, threads, stream, args);
        return;
      }
    }
  }
  FASTSLIM_LAUNCH((sandwich_loss_rows_kernel<T, V, kThreads, true>), blocks, threads, stream, args);
}

template <class T> Rows<T> rows_of(const SandwichLossCuda& s, int64_t groups) {
  using A = Accumulate<T>;
  Rows<T> rows{};
  rows.teacher = static_cast<const T*>(s.teacher);
  rows.target = s.target, rows.class_weight = static_cast<const A*>(s.class_weight);
  rows.teacher_grad = static_cast<T*>(s.teacher_grad);
  rows.weight_parts = s.workspace, rows.loss_parts = s.workspace + 2 * kParts;
  rows.rows = s.rows, rows.ignore_index = s.ignore_index, rows.classes = int(s.classes), rows.groups = int(groups);
  rows.tau = s.tau, rows.label_smoothing = s.label_smoothing, rows.kl_scale = s.kl_scale;
  const int64_t weights = rows.class_weight && s.classes > s.rows ? s.classes : s.rows;
  rows.parts = int(blocks_for(weights, 16 * kThreads, kParts));
  return rows;
}

template <class T> void launch_all(const SandwichLossCuda& s, cudaStream_t stream) {
  using A = Accumulate<T>;
  const int64_t groups = s.rows < kSandwichLossGroups ? s.rows : kSandwichLossGroups;
  Rows<T> rows = rows_of<T>(s, groups);
  if (s.has_target)
    FASTSLIM_LAUNCH(sandwich_loss_weights_kernel<A>, dim3(unsigned(rows.parts)), dim3(kThreads), stream, s.target,
                    rows.class_weight, s.rows, s.classes, s.ignore_index, s.workspace);
  bool vectors = in_vectors<T>(s.teacher, s.classes) && in_vectors<T>(s.teacher_grad, s.classes) &&
                 in_vectors<T>(s.student_grads, s.classes);
  for (int64_t i = 0; i < s.num_students; ++i) vectors = vectors && in_vectors<T>(s.students[i], s.classes);
  for (int64_t first = 0; groups > 0 && (first == 0 || first < s.num_students); first += kStudentsPerLaunch) {
    const int64_t left = s.num_students - first;
    rows.num_students = int(left < kStudentsPerLaunch ? left : kStudentsPerLaunch);
    for (int i = 0; i < rows.num_students; ++i) rows.students[i] = static_cast<const T*>(s.students[first + i]);
    rows.student_grads = s.student_grads ? static_cast<T*>(s.student_grads) + first * s.rows * s.classes : nullptr;
    rows.loss_parts = s.workspace + 2 * kParts + first * groups;
    // float64 is for tests: one kernel of it is enough.
    constexpr int kWide = sizeof(T) < sizeof(double) ? kVector<T> : 1;
    vectors ? launch_rows<T, kWide>(rows, stream) : launch_rows<T, 1>(rows, stream);
    rows.target = nullptr;  // the first launch has computed the cross-entropy
  }
  FASTSLIM_LAUNCH(sandwich_loss_sum_kernel<A>, dim3(unsigned(1 + s.num_students)), dim3(kThreads), stream,
                  s.workspace + 2 * kParts, s.workspace, rows.parts, int(groups), s.has_target, s.kl_scale,
                  static_cast<A*>(s.losses));
}

}  // namespace

template <class T> cudaError_t SandwichLossCudaLaunchers<T>::run(const SandwichLossCuda& s, cudaStream_t stream) {
  launch_all<T>(s, stream);
  return cudaGetLastError();
}

template <class T>
cudaError_t SandwichLossCudaLaunchers<T>::scale_gradients(T* grads, int64_t count, int64_t size, const A* scales,
                                                          int64_t stride, cudaStream_t stream) {
  if (count == 0 || size == 0) return cudaSuccess;
  const dim3 grid(blocks_for(size, kThreads * kVector<T>, 1024), unsigned(count)), threads(kThreads);
  if (in_vectors<T>(grads, size))
    FASTSLIM_LAUNCH((scale_gradients_kernel<T, kVector<T>>), grid, threads, stream, grads, size, scales, stride);
  else
    FASTSLIM_LAUNCH((scale_gradients_kernel<T, 1>), grid, threads, stream, grads, size, scales, stride);
  return cudaGetLastError();
}

template struct SandwichLossCudaLaunchers<float>;
template struct SandwichLossCudaLaunchers<bfloat16>;
template struct SandwichLossCudaLaunchers<float16>;
template struct SandwichLossCudaLaunchers<double>;

}  // namespace fastslim
