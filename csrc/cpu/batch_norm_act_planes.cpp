// batch_norm_act in NCHW: a channel's images ("planes") are contiguous, channels are independent.
// Each channel is read once from memory: sums, then the result out of the cache.
#include "batch_norm_act_math.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

constexpr int64_t kGroupValues = 2048;  // summed in float, then merged in double

// Takes the values [begin, end) of a plane that starts at `plane` and holds at least one vector. Four
// objects, so that four sums run side by side; they may be one where nothing is summed.
template <class A, class Object>
inline void take(Object& a, Object& b, Object& c, Object& d, int64_t plane, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  int64_t i = begin;
  for (; i + 4 * L <= end; i += 4 * L) {
    a(plane + i, Full{});
    b(plane + i + L, Full{});
    c(plane + i + 2 * L, Full{});
    d(plane + i + 3 * L, Full{});
  }
  if (i + L <= end) a(plane + i, Full{}), i += L;
  if (i + L <= end) b(plane + i, Full{}), i += L;
  if (i + L <= end) c(plane + i, Full{}), i += L;
  if (i < end) d(plane + end - L, Overlap{int(L - (end - i))});
}

// Calls f(first image, last image, begin, end): groups of at most kGroupValues values of a channel,
// either a part of one plane or several whole ones.
template <class F> inline void for_each_group(const BatchNormShape& shape, F f) {
  const int64_t images = shape.inner < kGroupValues ? kGroupValues / shape.inner : 1;
  const int64_t length = shape.inner < kGroupValues ? shape.inner : kGroupValues;
  for (int64_t n = 0; n < shape.outer; n += images)
    for (int64_t begin = 0; begin < shape.inner; begin += length)
      f(n, n + images < shape.outer ? n + images : shape.outer, begin,
        begin + length < shape.inner ? begin + length : shape.inner);
}

inline int64_t plane_at(const BatchNormShape& shape, int64_t image, int64_t channel) {
  return (image * shape.channels + channel) * shape.inner;
}

template <class T> void moments(const BatchNormArgs& args, int64_t c) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const BatchNormShape& shape = args.shape;
  const T* x = static_cast<const T*>(args.x);
  double center = 0, sum = 0, square = 0;
  for_each_group(shape, [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
    // The shift is the mean of one vector: sums of squares stay near the spread of the group.
    const int64_t sample = begin + L <= shape.inner ? begin : shape.inner - L;
    const A shift = sum_lanes<A>(load(x + plane_at(shape, first, c) + sample)) / A(L);
    Moments<T> m0{x, splat<A>(shift)}, m1 = m0, m2 = m0, m3 = m0;
    for (int64_t n = first; n < last; ++n) take<A>(m0, m1, m2, m3, plane_at(shape, n, c), begin, end);
    const double s = double(sum_lanes<A>((m0.sum + m1.sum) + (m2.sum + m3.sum)));
    const double q = double(sum_lanes<A>((m0.square + m1.square) + (m2.square + m3.square)));
    if (!first && !begin) center = double(shift);
    const double d = double(shift) - center, count = double((last - first) * (end - begin));
    sum += s + count * d;
    square += q + d * (2 * s + count * d);
  });
  const double n = double(shape.values()), about = sum / n, variance = square / n - about * about;
  args.mean[c] = center + about;
  args.variance[c] = variance < 0 ? 0 : variance;  // keeps NaN
  args.invstd[c] = 1 / __builtin_sqrt(args.variance[c] + args.eps);
}

template <class T, Activation F, bool Residual> void forward(const BatchNormArgs& args, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  for (int64_t c = begin; c < end; ++c) {
    if (args.training) moments<T>(args, c);
    const Coefficients k = coefficients<A>(args, c);
    Apply<T, F, Residual> a{static_cast<const T*>(args.x), static_cast<const T*>(args.residual),
                            static_cast<T*>(args.y),       splat<A>(A(k.center)),
                            splat<A>(A(k.scale)),          splat<A>(A(k.shift))};
    for (int64_t n = 0; n < args.shape.outer; ++n) take<A>(a, a, a, a, plane_at(args.shape, n, c), 0, args.shape.inner);
  }
}

template <class T> void fwd(const BatchNormArgs& args, int64_t begin, int64_t end) {
  with_activation(args.activation, [&](auto activation) {
    constexpr Activation F = decltype(activation)::value;
    args.residual ? forward<T, F, true>(args, begin, end) : forward<T, F, false>(args, begin, end);
  });
}

template <class T, Activation F, bool Residual>
void gradient_sums(const BatchNormArgs& args, int64_t c, const PreActivation<T, F, Residual>& pre,
                   Accumulate<T> center) {
  using A = Accumulate<T>;
  double dz = 0, dz_x = 0;
  for_each_group(args.shape, [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
    GradientSums<T, F, Residual> g0{pre, static_cast<const T*>(args.x), splat<A>(center)}, g1 = g0, g2 = g0, g3 = g0;
    for (int64_t n = first; n < last; ++n) take<A>(g0, g1, g2, g3, plane_at(args.shape, n, c), begin, end);
    dz += double(sum_lanes<A>((g0.dz + g1.dz) + (g2.dz + g3.dz)));
    dz_x += double(sum_lanes<A>((g0.dz_x + g1.dz_x) + (g2.dz_x + g3.dz_x)));
  });
  args.dbias[c] = dz;
  args.dweight[c] = (dz_x + (double(center) - args.mean[c]) * dz) * args.invstd[c];
}

template <class T, Activation F, bool Residual> void backward(const BatchNormArgs& args, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  for (int64_t c = begin; c < end; ++c) {
    const Coefficients k = coefficients<A>(args, c);
    const PreActivation<T, F, Residual> pre{static_cast<const T*>(args.dy), static_cast<const T*>(args.extra),
                                            splat<A>(A(k.scale)), splat<A>(A(k.shift))};
    if (args.sums) gradient_sums<T, F, Residual>(args, c, pre, A(k.center));
    const Slopes s = slopes(args, k, c);
    GradientApply<T, F, Residual> a{pre,
                                    static_cast<const T*>(args.x),
                                    static_cast<T*>(args.dx),
                                    static_cast<T*>(args.dresidual),
                                    splat<A>(A(k.center)),
                                    splat<A>(A(s.slope)),
                                    splat<A>(A(s.offset))};
    for (int64_t n = 0; n < args.shape.outer; ++n) take<A>(a, a, a, a, plane_at(args.shape, n, c), 0, args.shape.inner);
  }
}

template <class T> void bwd(const BatchNormArgs& args, int64_t begin, int64_t end) {
  with_activation(args.activation, [&](auto activation) {
    constexpr Activation F = decltype(activation)::value;
    args.extra ? backward<T, F, true>(args, begin, end) : backward<T, F, false>(args, begin, end);
  });
}

template <class T> constexpr BatchNormPlanes kernels() { return {kLanes<Accumulate<T>>, fwd<T>, bwd<T>}; }

}  // namespace

extern const BatchNormTable<BatchNormPlanes> batch_norm_act_planes_table;
const BatchNormTable<BatchNormPlanes> batch_norm_act_planes_table = {kernels<float>(), kernels<bfloat16>(),
                                                                     kernels<double>()};

}  // namespace fastslim::FASTSLIM_ISA
