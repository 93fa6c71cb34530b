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

// exp(x) for x <= 0 to 1 ulp: x = n log 2 + r, exp(r) = 1 + r (1 + r P(r)), P a minimax fit of degree
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
  p = p * r + 1.0f;
  p = p * r + 1.0f;
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

// Lanes from n on as zero.
template <class A> inline Vec<A> first_lanes(Vec<A> v, int n) {
  Mask<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return select(lane < n, v, Vec<A>{});
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

// Adds over the classes: body(first class, number of classes, sums) adds to its Count sums, lanes from the number on
// nothing. Two sets of sums run side by side.
template <class A, int Count, class Body> inline void sum_classes(int64_t classes, double (&totals)[Count], Body body) {
  constexpr int L = kLanes<A>;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
    Vec<A> even[Count] = {}, odd[Count] = {};
    int64_t c = begin;
    for (; c + 2 * L <= end; c += 2 * L) {
      body(c, L, even);
      body(c + L, L, odd);
    }
    for_vectors<A>(c, end, [&](int64_t at, int n) { body(at, n, even); });
    for (int i = 0; i < Count; ++i) totals[i] += double(sum_lanes<A>(even[i] + odd[i]));
  }
}

template <class T> Accumulate<T> max_of_row(const T* x, int64_t classes) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>, kChains = 4;
  A max = to_accumulate(x[0]);
  int64_t c = 0;
  if (classes >= L) {
    Vec<A> best[kChains];
    for (int i = 0; i < kChains; ++i) best[i] = load(x);
    for (; c + kChains * L <= classes; c += kChains * L)
      for (int i = 0; i < kChains; ++i) {
        const Vec<A> v = load(x + c + i * L);
        best[i] = select(v > best[i], v, best[i]);
      }
    for (; c < classes; c += L) {
      const Vec<A> v = load(x + (c + L <= classes ? c : classes - L));
      best[0] = select(v > best[0], v, best[0]);
    }
    for (int i = 1; i < kChains; ++i) best[0] = select(best[i] > best[0], best[i], best[0]);
    for (int i = 0; i < L; ++i) max = best[0][i] > max ? best[0][i] : max;
  }
  for (; c < classes; ++c) max = to_accumulate(x[c]) > max ? to_accumulate(x[c]) : max;
  return max;
}

// e = exp((x - max) * inverse_tau), d = x - max; returns the sum of e.
template <class T, class A> double exp_of_row(const T* x, A max, A inverse_tau, int64_t classes, A* e, A* d) {
  double sum[1] = {};
  sum_classes<A>(classes, sum, [&](int64_t c, int n, Vec<A>* sums) {
    const Vec<A> shifted = load_up_to(x + c, n) - max, v = exp_nonpositive(shifted * inverse_tau);
    store_up_to(d + c, shifted, n);
    store_up_to(e + c, v, n);
    sums[0] += n == kLanes<A> ? v : first_lanes<A>(v, n);
  });
  return sum[0];
}

// Cross-entropy of a row times the sum of target weights; its gradient, if wanted, times ce_scale. d, e: of
// exp_of_row.
template <class T, class A>
double cross_entropy_row(const SandwichLossArgs& args, const A* d, const A* e, double sum, int64_t y, T* grad) {
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

  double loss = hard * (log_sum - double(d[y]));
  if (smooth != 0) {
    double shifted[1] = {};
    sum_classes<A>(classes, shifted, [&](int64_t c, int n, Vec<A>* sums) {
      const Vec<A> v = load_up_to(d + c, n);
      sums[0] += weight ? v * load_up_to(weight + c, n) : v;
    });
    loss += smooth * (args.class_weight_sum * log_sum - shifted[0]);
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

// KL of a row; its gradient, if wanted, times kl_scale. d, e, sum: the teacher's; f: scratch.
template <class T, class A>
double kl_row(const SandwichLossArgs& args, const A* d, const A* e, double sum, const T* s, A* f, T* grad) {
  const int64_t classes = args.classes;
  const A inverse_tau = A(1 / args.tau), max = max_of_row(s, classes);
  double sums[2] = {};  // of f, and of e times the difference of teacher and student
  sum_classes<A>(classes, sums, [&](int64_t c, int n, Vec<A>* sums) {
    const Vec<A> shifted = load_up_to(s + c, n) - max, v = exp_nonpositive(shifted * inverse_tau);
    store_up_to(f + c, v, n);
    sums[0] += n == kLanes<A> ? v : first_lanes<A>(v, n);
    sums[1] += load_up_to(e + c, n) * (load_up_to(d + c, n) - shifted);
  });
  const double student_sum = sums[0];
  if (sums[1] - sums[1] != 0) {  // 0 log 0 = 0, also where both logits are -inf: rare, so looked for afterwards
    double again[1] = {};
    sum_classes<A>(classes, again, [&](int64_t c, int n, Vec<A>* sums) {
      const Vec<A> weight = load_up_to(e + c, n), shifted = load_up_to(s + c, n) - max;
      sums[0] += select(weight == Vec<A>{}, Vec<A>{}, weight * (load_up_to(d + c, n) - shifted));
    });
    sums[1] = again[0];
  }
  if (grad) {
    // f - e (Y / Z) is exactly 0 where student and teacher agree.
    const A scale = A(args.kl_scale / args.tau / student_sum), ratio = A(student_sum / sum);
    for_vectors<A>(0, classes, [&](int64_t c, int n) {
      store_up_to(grad + c, (load_up_to(f + c, n) - load_up_to(e + c, n) * ratio) * scale, n);
    });
  }
  return sums[1] / args.tau / sum + (::log(student_sum) - ::log(sum));
}

template <class T> void sandwich_loss_rows(const SandwichLossArgs& args, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t classes = args.classes;
  A* e = static_cast<A*>(scratch);
  const int64_t stride = args.scratch_stride();
  A *d = e + stride, *f = d + stride;
  for (int64_t row = begin; row < end; ++row) {
    const T* t = static_cast<const T*>(args.teacher) + row * classes;
    T* teacher_grad = args.teacher_grad ? static_cast<T*>(args.teacher_grad) + row * classes : nullptr;
    const A max = max_of_row(t, classes);
    double sum = 0;
    args.row_losses[row] = 0;
    if (args.target) {
      sum = exp_of_row(t, max, A(1), classes, e, d);
      args.row_losses[row] = cross_entropy_row(args, d, e, sum, args.target[row], teacher_grad);
    }
    if (args.num_students && (args.tau != 1 || !args.target)) sum = exp_of_row(t, max, A(1 / args.tau), classes, e, d);
    for (int64_t i = 0; i < args.num_students; ++i) {
      const T* s = static_cast<const T*>(args.students[i]) + row * classes;
      T* grads = static_cast<T*>(args.student_grads);
      T* grad = grads ? grads + (i * args.rows + row) * classes : nullptr;
      args.row_losses[(1 + i) * args.rows + row] = kl_row(args, d, e, sum, s, f, grad);
    }
  }
}

}  // namespace

extern const SandwichLossTable sandwich_loss_kernels_table;
const SandwichLossTable sandwich_loss_kernels_table = {sandwich_loss_rows<float>, sandwich_loss_rows<bfloat16>,
                                                       sandwich_loss_rows<double>};

}  // namespace fastslim::FASTSLIM_ISA
