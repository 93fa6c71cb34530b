// What happens to one vector: activations, and the four passes over a tensor as small objects that
// hold a column's or channel's parameters and take one vector after the other.
#pragma once
#include "fastslim/batch_norm_act.h"
#include "vec.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

// Which lanes of a vector count: all; the first n (the others must not be touched); or those from
// `first` on, where the lanes before were taken already and may be stored again.
struct Full {};
struct Part {
  int n;
};
struct Overlap {
  int first;
};

template <class T> inline Vec<Accumulate<T>> get(const T* p, Full) { return load(p); }
template <class T> inline Vec<Accumulate<T>> get(const T* p, Part part) { return load_n(p, part.n); }
template <class T> inline Vec<Accumulate<T>> get(const T* p, Overlap) { return load(p); }
template <class T> inline void put(T* p, Vec<Accumulate<T>> v, Full) { store(p, v); }
template <class T> inline void put(T* p, Vec<Accumulate<T>> v, Part part) { store_n(p, v, part.n); }
template <class T> inline void put(T* p, Vec<Accumulate<T>> v, Overlap) { store(p, v); }

template <class A> inline Vec<A> counted(Vec<A> v, Full) { return v; }
template <class A> inline Vec<A> counted(Vec<A> v, Part) { return v; }
template <class A> inline Vec<A> counted(Vec<A> v, Overlap overlap) {
  Mask<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return select(lane >= overlap.first, v, Vec<A>{});
}

// exp(x) for x <= 88, relative error below 2e-7: x = n ln 2 + r, Taylor series in r, times 2^n.
inline Vec<float> exp_vec(Vec<float> x) {
  x = select(x < -87.0f, splat<float>(-87.0f), x);
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds n into the low bits
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat<float>(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  U32 bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  Vec<float> power;
  std::memcpy(&power, &bits, sizeof bits);
  return p * power;
}
inline Vec<double> exp_vec(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class A> inline Vec<A> sigmoid(Vec<A> z) {
  return A(1) / (A(1) + exp_vec(select(z < A(-88), splat<A>(88), -z)));
}

// Comparisons are written so that NaN comes through, as in torch.
template <class A, Activation F> inline Vec<A> activate(Vec<A> z) {
  const Vec<A> zero{};
  if constexpr (F == Activation::relu) return select(z <= A(0), zero, z);
  if constexpr (F == Activation::relu6) return select(z <= A(0), zero, select(z >= A(6), splat<A>(6), z));
  if constexpr (F == Activation::silu) return z * sigmoid<A>(z);
  if constexpr (F == Activation::hardswish)
    return select(z <= A(-3), zero * z, select(z >= A(3), z, z * (z + A(3)) / A(6)));
  return z;
}

// dy * act'(z); for relu and relu6 act(z) does as well as z.
template <class A, Activation F> inline Vec<A> activate_backward(Vec<A> dy, Vec<A> z) {
  const Vec<A> zero{};
  if constexpr (F == Activation::relu) return select(z <= A(0), zero, dy);
  if constexpr (F == Activation::relu6) return select(z <= A(0), zero, select(z >= A(6), zero, dy));
  if constexpr (F == Activation::silu) {
    const Vec<A> s = sigmoid<A>(z);
    return dy * s * (A(1) + z * (A(1) - s));
  }
  if constexpr (F == Activation::hardswish)
    return select(z <= A(-3), zero, select(z >= A(3), dy, dy * (z / A(3) + A(0.5))));
  return dy;
}

// Calls f(constant of the activation), so that the loops are compiled for each.
template <Activation F> struct ActivationConstant {
  static constexpr Activation value = F;
};
template <class Function> inline void with_activation(Activation activation, Function f) {
  switch (activation) {
    case Activation::relu: return f(ActivationConstant<Activation::relu>{});
    case Activation::relu6: return f(ActivationConstant<Activation::relu6>{});
    case Activation::silu: return f(ActivationConstant<Activation::silu>{});
    case Activation::hardswish: return f(ActivationConstant<Activation::hardswish>{});
    default: return f(ActivationConstant<Activation::none>{});
  }
}

// z = (x - center) * scale + shift. The center is the mean, rounded; the shift holds what was lost.
struct Coefficients {
  double center, scale, shift;
};

template <class A> inline Coefficients coefficients(const BatchNormArgs& args, int64_t c) {
  Coefficients k;
  k.center = A(args.mean[c]);
  k.scale = args.weight[c] * args.invstd[c];
  k.shift = args.bias[c] + (k.center - args.mean[c]) * k.scale;
  return k;
}

// dx = dz * scale + (x - center) * slope + offset
struct Slopes {
  double slope, offset;
};

inline Slopes slopes(const BatchNormArgs& args, const Coefficients& k, int64_t c) {
  if (!args.training) return {0, 0};
  const double n = double(args.shape.values());
  const double slope = -k.scale * args.invstd[c] * args.dweight[c] / n;
  return {slope, -k.scale * args.dbias[c] / n + (k.center - args.mean[c]) * slope};
}

// Sums of x - shift and of its square: exact whatever the mean, if the shift is near it.
template <class T> struct Moments {
  using A = Accumulate<T>;
  const T* x;
  Vec<A> shift, sum{}, square{};

  template <class M> void operator()(int64_t offset, M m) {
    const Vec<A> d = counted<A>(get(x + offset, m) - shift, m);
    sum += d;
    square += d * d;
  }
};

template <class T, Activation F, bool Residual> struct Apply {
  using A = Accumulate<T>;
  const T *x, *residual;
  T* y;
  Vec<A> center, scale, shift;

  template <class M> void operator()(int64_t offset, M m) {
    Vec<A> z = (get(x + offset, m) - center) * scale + shift;
    if constexpr (Residual) z += get(residual + offset, m);
    put(y + offset, activate<A, F>(z), m);
  }
};

// dz of one vector, from dy, x - center and, with a residual, `extra` (see BatchNormArgs).
template <class T, Activation F, bool Residual> struct PreActivation {
  using A = Accumulate<T>;
  const T *dy, *extra;
  Vec<A> scale, shift;

  template <class M> Vec<A> gradient(int64_t offset, Vec<A> centered, M m) const {
    const Vec<A> g = get(dy + offset, m);
    if constexpr (F == Activation::none) return g;
    if constexpr (Residual && (F == Activation::relu || F == Activation::relu6))
      return activate_backward<A, F>(g, get(extra + offset, m));
    Vec<A> z = centered * scale + shift;
    if constexpr (Residual) z += get(extra + offset, m);
    return activate_backward<A, F>(g, z);
  }
};

template <class T, Activation F, bool Residual> struct GradientSums {
  using A = Accumulate<T>;
  PreActivation<T, F, Residual> pre;
  const T* x;
  Vec<A> center, dz{}, dz_x{};

  template <class M> void operator()(int64_t offset, M m) {
    const Vec<A> centered = get(x + offset, m) - center;
    const Vec<A> g = counted<A>(pre.gradient(offset, centered, m), m);
    dz += g;
    dz_x += g * centered;
  }
};

template <class T, Activation F, bool Residual> struct GradientApply {
  using A = Accumulate<T>;
  PreActivation<T, F, Residual> pre;
  const T* x;
  T *dx, *dresidual;
  Vec<A> center, slope, offset0;

  template <class M> void operator()(int64_t offset, M m) {
    const Vec<A> centered = get(x + offset, m) - center;
    const Vec<A> g = pre.gradient(offset, centered, m);
    put(dx + offset, g * pre.scale + (centered * slope + offset0), m);
    if constexpr (Residual)
      if (dresidual) put(dresidual + offset, g, m);
  }
};

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA
