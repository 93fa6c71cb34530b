// Activations of batch_norm_act and their derivatives, for the vectors of one thread.
#pragma once
#include <cmath>

#include "fastslim/batch_norm_act.h"
#include "fastslim/cuda_launch.h"

namespace fastslim {
namespace {

// none, relu and relu6 differ in their bounds (NaN: none), silu and hardswish in the factor of z;
// `any` stands for both families, told at run time.
enum class Family : int { clamp, smooth, any };

template <class A> struct ActivationArgs {
  Family family;
  bool silu;
  A lower, upper;
};

// 16-bit types do not see the few last bits that these approximations lose.
template <class T> __device__ static inline Accumulate<T> sigmoid(Accumulate<T> z) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
    float e, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
    return s;
  }
#endif
  return Accumulate<T>(1) / (Accumulate<T>(1) + std::exp(-z));
}

// Comparisons are written so that NaN comes through, as in torch.
template <class T, Family F, int V>
__device__ static inline void activate(Accumulate<T> (&z)[V], const ActivationArgs<Accumulate<T>>& args) {
  using A = Accumulate<T>;
  if (F == Family::any ? args.family == Family::clamp : F == Family::clamp) {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = z[i] <= args.lower ? A(0) : z[i] >= args.upper ? args.upper : z[i];
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A hard = z[i] <= A(-3) ? A(0) : z[i] >= A(3) ? A(1) : z[i] * A(1.0 / 6) + A(0.5);
      z[i] *= args.silu ? sigmoid<T>(z[i]) : hard;
    }
  }
}

// gradient *= act'(z); for the bounds act(z) does as well as z.
template <class T, Family F, int V>
__device__ static inline void activate_backward(Accumulate<T> (&gradient)[V], const Accumulate<T> (&z)[V],
                                                const ActivationArgs<Accumulate<T>>& args) {
  using A = Accumulate<T>;
  if (F == Family::any ? args.family == Family::clamp : F == Family::clamp) {
#pragma unroll
    for (int i = 0; i < V; ++i) gradient[i] = z[i] <= args.lower || z[i] >= args.upper ? A(0) : gradient[i];
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A s = sigmoid<T>(z[i]), soft = s * (A(1) + z[i] * (A(1) - s));
      const A hard = z[i] <= A(-3) ? A(0) : z[i] >= A(3) ? A(1) : z[i] * A(1.0 / 3) + A(0.5);
      gradient[i] *= args.silu ? soft : hard;
    }
  }
}

template <class A> ActivationArgs<A> activation_args(Activation activation) {
  const A none = A(NAN);
  switch (activation) {
    case Activation::relu: return {Family::clamp, false, 0, none};
    case Activation::relu6: return {Family::clamp, false, 0, 6};
    case Activation::silu: return {Family::smooth, true, none, none};
    case Activation::hardswish: return {Family::smooth, false, none, none};
    default: return {Family::clamp, false, none, none};
  }
}

}  // namespace
}  // namespace fastslim
