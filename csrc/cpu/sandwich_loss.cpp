// For one row of logits t (teacher) and s (student), with m the row maximum:
//   e_c = exp((t_c - m_t) / tau),  Z = sum e,  p = e / Z         (q, f and Y likewise from s)
//   KL(p || q) = (1 / Z) sum_c e_c (dt_c - ds_c) + log Y - log Z,   dt_c = (t_c - m_t) / tau
//   d KL / d s = (q - p) / tau
//   CE = (1 - a) w_y (log Z - dt_y) + a / C sum_c w_c (log Z - dt_c)   (tau = 1, a = label smoothing)
//   d CE / d t_c = W p_c - a / C w_c - (1 - a) w_y [c = y],  W = (1 - a) w_y + a / C sum w
// Differences to the maximum are taken first, so logits of any finite size keep their digits.
#include "fastslim/sandwich_loss.h"

#include <math.h>

#include "vec.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

// Sums run in the accumulation type over a block and in double over the blocks: the error does not
// grow with the number of classes.
constexpr int64_t kBlock = 1024;

// exp(x) for x <= 0 to 1 ulp: x = n log 2 + r, exp(r) = 1 + r + r^2 P(r), P a minimax fit of degree
// 4 on |r| <= log(2) / 2 (relative error 3e-9). Results below the smallest normal number are 0.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  // Adding 1.5 * 2^23 rounds to an integer that lies in the low bits; 127 is the exponent's bias.
  const float shift = 12582912.0f + 127.0f;
  const Vec<float> shifted = x * 1.44269504088896341f + shift;
  const Vec<float> n = shifted - shift;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = r * 1.3814467e-3f + 8.3687808e-3f;
  p = p * r + 4.1668393e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 4.99999940e-1f;
  p = (p * r) * r + r + 1.0f;
  U32 bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  Vec<float> power;
  std::memcpy(&power, &bits, sizeof power);
  return select(x < -87.33f, Vec<float>{}, p * power);  // NaN compares false and stays NaN
}

inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

template <class A> inline A sum_first(Vec<A> v, int n) {
  A total = 0;
  for (int i = 0; i < n; ++i) total += v[i];
  return total;
}

// Calls body(first class, number of classes <= lanes) over [begin, end).
template <class A, class Body> inline void for_vectors(int64_t begin, int64_t end, Body body) {
  int64_t c = begin;
  for (; c + kLanes<A> <= end; c += kLanes<A>) body(c, kLanes<A>);
  if (c < end) body(c, int(end - c));
}

template <class T> inline Vec<Accumulate<T>> load_up_to(const T* p, int n) {
  return n == kLanes<Accumulate<T>> ? load(p) : load_n(p, n);
}

template <class T> inline void store_up_to(T* p, Vec<Accumulate<T>> v, int n) {
  if (n == kLanes<Accumulate<T>>)
    store(p, v);
  else
    store_n(p, v, n);
}

// Sum over the classes of term(first class, number of classes).
template <class A, class Term> inline double sum_classes(int64_t classes, Term term) {
  double total = 0;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
    Vec<A> sum{};
    A tail = 0;
    for_vectors<A>(begin, end, [&](int64_t c, int n) {
      const Vec<A> v = term(c, n);
      if (n == kLanes<A>)
        sum += v;
      else
        tail = sum_first<A>(v, n);
    });
    total += double(sum_lanes<A>(sum)) + double(tail);
  }
  return total;
}

template <class T> Accumulate<T> max_of_row(const T* x, int64_t classes) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  A max = to_accumulate(x[0]);
  int64_t c = 0;
  if (classes >= lanes) {
    Vec<A> best = load(x);
    for (c = lanes; c + lanes <= classes; c += lanes) {
      const Vec<A> v = load(x + c);
      best = select(v > best, v, best);
    }
    for (int i = 0; i < lanes; ++i) max = best[i] > max ? best[i] : max;
  }
  for (; c < classes; ++c) max = to_accumulate(x[c]) > max ? to_accumulate(x[c]) : max;
  return max;
}

// e = exp((x - max) * inverse_tau); returns its sum.
template <class T, class A> double exp_of_row(const T* x, A max, A inverse_tau, int64_t classes, A* e) {
  return sum_classes<A>(classes, [&](int64_t c, int n) {
    const Vec<A> v = exp_nonpositive((load_up_to(x + c, n) - max) * inverse_tau);
    store_up_to(e + c, v, n);
    return v;
  });
}

// Cross-entropy of a row times the sum of target weights; its gradient, if wanted, times ce_scale.
template <class T, class A>
double cross_entropy_row(const SandwichLossArgs& args, const T* x, A max, const A* e, double sum, int64_t y, T* grad) {
  const int64_t classes = args.classes;
  if (y == args.ignore_index) {
    if (grad) for_vectors<A>(0, classes, [&](int64_t c, int n) { store_up_to(grad + c, Vec<A>{}, n); });
    return 0;
  }
  const A* weight = static_cast<const A*>(args.class_weight);
  const double smooth = args.label_smoothing / double(classes);
  const double hard = (1 - args.label_smoothing) * (weight ? double(weight[y]) : 1.0);
  const double log_sum = ::log(sum);
  const double total_weight = hard + smooth * args.class_weight_sum;

  double loss = hard * (log_sum - double(to_accumulate(x[y]) - max));
  if (smooth != 0) {
    const double shifted = sum_classes<A>(classes, [&](int64_t c, int n) {
      const Vec<A> d = load_up_to(x + c, n) - max;
      return weight ? d * load_up_to(weight + c, n) : d;
    });
    loss += smooth * (args.class_weight_sum * log_sum - shifted);
  }
  if (grad) {
    const A scale = A(args.ce_scale * total_weight / sum), uniform = A(args.ce_scale * smooth);
    if (weight && smooth != 0) {
      for_vectors<A>(0, classes, [&](int64_t c, int n) {
        store_up_to(grad + c, load_up_to(e + c, n) * scale - load_up_to(weight + c, n) * uniform, n);
      });
    } else {
      for_vectors<A>(0, classes,
                     [&](int64_t c, int n) { store_up_to(grad + c, load_up_to(e + c, n) * scale - uniform, n); });
    }
    const double label = hard + smooth * (weight ? double(weight[y]) : 1.0);
    from_accumulate(A(args.ce_scale * (total_weight * (double(e[y]) / sum) - label)), grad + y);
  }
  return loss;
}

// KL of a row; its gradient, if wanted, times kl_scale. e, sum: the teacher's; f: scratch.
template <class T, class A>
double kl_row(const SandwichLossArgs& args, const T* t, A t_max, const A* e, double sum, const T* s, A* f, T* grad) {
  const int64_t classes = args.classes;
  const A inverse_tau = A(1 / args.tau), s_max = max_of_row(s, classes);
  const double student_sum = exp_of_row(s, s_max, inverse_tau, classes, f);
  const double cross = sum_classes<A>(classes, [&](int64_t c, int n) {
    const Vec<A> weight = load_up_to(e + c, n);
    const Vec<A> difference = ((load_up_to(t + c, n) - t_max) - (load_up_to(s + c, n) - s_max)) * inverse_tau;
    return select(weight == Vec<A>{}, Vec<A>{}, weight * difference);  // 0 log 0 = 0, also where both logits are -inf
  });
  if (grad) {
    // f - e (Y / Z) is exactly 0 where student and teacher agree.
    const A scale = A(args.kl_scale / args.tau / student_sum), ratio = A(student_sum / sum);
    for_vectors<A>(0, classes, [&](int64_t c, int n) {
      store_up_to(grad + c, (load_up_to(f + c, n) - load_up_to(e + c, n) * ratio) * scale, n);
    });
  }
  return cross / sum + (::log(student_sum) - ::log(sum));
}

template <class T> void sandwich_loss_rows(const SandwichLossArgs& args, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t classes = args.classes;
  A* e = static_cast<A*>(scratch);
  A* f = e + classes;
  for (int64_t row = begin; row < end; ++row) {
    const T* t = static_cast<const T*>(args.teacher) + row * classes;
    T* teacher_grad = args.teacher_grad ? static_cast<T*>(args.teacher_grad) + row * classes : nullptr;
    const A max = max_of_row(t, classes);
    double sum = 0;
    args.row_losses[row] = 0;
    if (args.target) {
      sum = exp_of_row(t, max, A(1), classes, e);
      args.row_losses[row] = cross_entropy_row(args, t, max, e, sum, args.target[row], teacher_grad);
    }
    if (args.num_students && (args.tau != 1 || !args.target)) sum = exp_of_row(t, max, A(1 / args.tau), classes, e);
    for (int64_t i = 0; i < args.num_students; ++i) {
      const T* s = static_cast<const T*>(args.students[i]) + row * classes;
      T* grads = static_cast<T*>(args.student_grads);
      T* grad = grads ? grads + (i * args.rows + row) * classes : nullptr;
      args.row_losses[(1 + i) * args.rows + row] = kl_row(args, t, max, e, sum, s, f, grad);
    }
  }
}

}  // namespace

extern const SandwichLossTable sandwich_loss_kernels_table;
const SandwichLossTable sandwich_loss_kernels_table = {sandwich_loss_rows<float>, sandwich_loss_rows<bfloat16>,
                                                       sandwich_loss_rows<double>};

}  // namespace fastslim::FASTSLIM_ISA
