// batch_norm_act where channels are the fastest dimension (channels_last, (N, C)), or where images
// are smaller than a vector. Rows are joined until a row is a whole number of vectors, so that 8 or
// 17 channels run at the speed of 64; parameters are repeated along it. Chunks of rows have partial
// sums in float; `finish` merges them in double.
#include "batch_norm_act_rows.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

template <class A, class M> inline void add_to(A* p, Vec<A> value, M m) { put(p, get(p, m) + value, m); }

template <class T> void fwd_sums(const BatchNormArgs& args, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const Plan plan = plan_of<T>(args.shape);
  const Scratch<T> scratch(args, plan);
  const T* x = static_cast<const T*>(args.x);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A *shift = scratch.partial_of(chunk, 0), *sum = scratch.partial_of(chunk, 1),
      *square = scratch.partial_of(chunk, 2);
    const int64_t first = plan.first_row(chunk), n = plan.rows_of(chunk), tail = plan.tail_of(chunk);
    // The shift is the mean of the chunk's first rows: then sums of squares exceed the spread of
    // the chunk by n / 8 at most, whatever the data.
    const int64_t sample = n < kGroup ? n : kGroup;
    for (int64_t v = 0; v < plan.width; v += L) {
      Vec<A> total{};
      for (int64_t r = 0; r < sample; ++r) total += load(x + (first + r) * plan.width + v);
      store(shift + v, sample ? total / A(sample) : total);
      store(sum + v, Vec<A>{});
      store(square + v, Vec<A>{});
    }
    if (!n)
      for (int64_t v = 0; v < tail; ++v) shift[v] = to_accumulate(x[first * plan.width + v]);
    walk<A, kGroup>(
        plan, first, n, tail, [=](int64_t v, auto m) { return Moments<T>{x, get(shift + v, m)}; },
        [=](const Moments<T>& object, int64_t v, auto m) {
          add_to(sum + v, object.sum, m);
          add_to(square + v, object.square, m);
        });
  }
}

// Calls f(chunk, rows, column): `rows` rows of the chunk hold the period that starts at `column`.
template <class F> inline void for_each_partial(const BatchNormShape& shape, const Plan& plan, F f) {
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
    for (int64_t r = 0; r < plan.repeat; ++r) {
      const int64_t extra = chunk == plan.chunks - 1 && r < shape.outer % plan.repeat;
      if (plan.rows_of(chunk) + extra) f(chunk, plan.rows_of(chunk) + extra, r * plan.period);
    }
}

// All partial sums about one shift per channel, in double.
template <class T> void fwd_finish(const BatchNormArgs& args) {
  const Plan plan = plan_of<T>(args.shape);
  const Scratch<T> scratch(args, plan);
  const int64_t channels = args.shape.channels, inner = args.shape.inner;
  double *sum = args.mean, *square = args.variance;
  const auto* center = scratch.partial_of(0, 0);
  for (int64_t c = 0; c < channels; ++c) sum[c] = square[c] = 0;
  for_each_partial(args.shape, plan, [&](int64_t chunk, int64_t rows, int64_t column) {
    const auto *k = scratch.partial_of(chunk, 0) + column, *s = scratch.partial_of(chunk, 1) + column,
               *q = scratch.partial_of(chunk, 2) + column;
    const double n = double(rows);
    if (inner == 1)  // the same as below, in a form that compilers vectorise
      for (int64_t c = 0; c < channels; ++c) {
        const double d = double(k[c]) - double(center[c]);
        sum[c] += double(s[c]) + n * d;
        square[c] += double(q[c]) + d * (2 * double(s[c]) + n * d);
      }
    else
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = c * inner; i < (c + 1) * inner; ++i) {
          const double d = double(k[i]) - double(center[c * inner]);
          sum[c] += double(s[i]) + n * d;
          square[c] += double(q[i]) + d * (2 * double(s[i]) + n * d);
        }
  });
  const double n = double(args.shape.values());
  for (int64_t c = 0; c < channels; ++c) {
    const double about = sum[c] / n, variance = square[c] / n - about * about;
    args.mean[c] = double(center[c * inner]) + about;
    args.variance[c] = variance < 0 ? 0 : variance;  // keeps NaN
    args.invstd[c] = 1 / __builtin_sqrt(args.variance[c] + args.eps);
  }
}

template <class A> inline void repeat_columns(A* p, const Plan& plan) {
  for (int64_t v = plan.period; v < plan.width; ++v) p[v] = p[v - plan.period];
}

template <class T> void prepare(const BatchNormArgs& args) {
  using A = Accumulate<T>;
  const Plan plan = plan_of<T>(args.shape);
  const Scratch<T> scratch(args, plan);
  for (int64_t c = 0; c < args.shape.channels; ++c) {
    const Coefficients k = coefficients<A>(args, c);
    for (int64_t v = c * args.shape.inner; v < (c + 1) * args.shape.inner; ++v) {
      scratch.center[v] = A(k.center);
      scratch.scale[v] = A(k.scale);
      scratch.shift[v] = A(k.shift);
    }
  }
  repeat_columns(scratch.center, plan);
  repeat_columns(scratch.scale, plan);
  repeat_columns(scratch.shift, plan);
}

// Calls f(first row, rows, tail) for the chunks [begin, end), last first: the sums read it last, so
// its data is still in the cache.
template <class F> inline void backwards(const Plan& plan, int64_t begin, int64_t end, F f) {
  for (int64_t chunk = end - 1; chunk >= begin; --chunk)
    f(plan.first_row(chunk), plan.rows_of(chunk), plan.tail_of(chunk));
}

template <class T, Activation F, bool Residual> void apply(const BatchNormArgs& args, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const Plan plan = plan_of<T>(args.shape);
  const Scratch<T> s(args, plan);
  const T *x = static_cast<const T*>(args.x), *residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.y);
  backwards(plan, begin, end, [&](int64_t first, int64_t n, int64_t tail) {
    walk<A, 4>(
        plan, first, n, tail,
        [=](int64_t v, auto m) {
          return Apply<T, F, Residual>{x, residual, y, get(s.center + v, m), get(s.scale + v, m), get(s.shift + v, m)};
        },
        [](const auto&, int64_t, auto) {});
  });
}

template <class T> void fwd_apply(const BatchNormArgs& args, int64_t begin, int64_t end) {
  with_activation(args.activation, [&](auto activation) {
    constexpr Activation F = decltype(activation)::value;
    args.residual ? apply<T, F, true>(args, begin, end) : apply<T, F, false>(args, begin, end);
  });
}

template <class T, Activation F, bool Residual>
void gradient_sums(const BatchNormArgs& args, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const Plan plan = plan_of<T>(args.shape);
  const Scratch<T> s(args, plan);
  const T *x = static_cast<const T*>(args.x), *dy = static_cast<const T*>(args.dy),
          *extra = static_cast<const T*>(args.extra);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A *dz = s.partial_of(chunk, 0), *dz_x = s.partial_of(chunk, 1);
    for (int64_t v = 0; v < plan.width; ++v) dz[v] = dz_x[v] = 0;
    walk<A, kGroup>(
        plan, plan.first_row(chunk), plan.rows_of(chunk), plan.tail_of(chunk),
        [=](int64_t v, auto m) {
          return GradientSums<T, F, Residual>{
              {dy, extra, get(s.scale + v, m), get(s.shift + v, m)}, x, get(s.center + v, m)};
        },
        [=](const GradientSums<T, F, Residual>& object, int64_t v, auto m) {
          add_to(dz + v, object.dz, m);
          add_to(dz_x + v, object.dz_x, m);
        });
  }
}

template <class T> void bwd_sums(const BatchNormArgs& args, int64_t begin, int64_t end) {
  with_activation(args.activation, [&](auto activation) {
    constexpr Activation F = decltype(activation)::value;
    args.extra ? gradient_sums<T, F, true>(args, begin, end) : gradient_sums<T, F, false>(args, begin, end);
  });
}

template <class T> void bwd_finish(const BatchNormArgs& args) {
  using A = Accumulate<T>;
  const Plan plan = plan_of<T>(args.shape);
  const Scratch<T> scratch(args, plan);
  const int64_t channels = args.shape.channels, inner = args.shape.inner;
  if (args.sums) {
    for (int64_t c = 0; c < channels; ++c) args.dbias[c] = args.dweight[c] = 0;
    for_each_partial(args.shape, plan, [&](int64_t chunk, int64_t, int64_t column) {
      const A *dz = scratch.partial_of(chunk, 0) + column, *dz_x = scratch.partial_of(chunk, 1) + column;
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t v = c * inner; v < (c + 1) * inner; ++v) {
          args.dbias[c] += double(dz[v]);
          args.dweight[c] += double(dz_x[v]);
        }
    });
  }
  for (int64_t c = 0; c < channels; ++c) {
    if (args.sums) {
      const double center = double(scratch.center[c * inner]);
      args.dweight[c] = (args.dweight[c] + (center - args.mean[c]) * args.dbias[c]) * args.invstd[c];
    }
    const Slopes k = slopes(args, coefficients<A>(args, c), c);
    for (int64_t v = c * inner; v < (c + 1) * inner; ++v) {
      scratch.slope[v] = A(k.slope);
      scratch.offset[v] = A(k.offset);
    }
  }
  repeat_columns(scratch.slope, plan);
  repeat_columns(scratch.offset, plan);
}

template <class T, Activation F, bool Residual>
void gradient_apply(const BatchNormArgs& args, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const Plan plan = plan_of<T>(args.shape);
  const Scratch<T> s(args, plan);
  const T *x = static_cast<const T*>(args.x), *dy = static_cast<const T*>(args.dy),
          *extra = static_cast<const T*>(args.extra);
  T *dx = static_cast<T*>(args.dx), *dresidual = static_cast<T*>(args.dresidual);
  backwards(plan, begin, end, [&](int64_t first, int64_t n, int64_t tail) {
    walk<A, 4>(
        plan, first, n, tail,
        [=](int64_t v, auto m) {
          return GradientApply<T, F, Residual>{{dy, extra, get(s.scale + v, m), get(s.shift + v, m)},
                                               x,
                                               dx,
                                               dresidual,
                                               get(s.center + v, m),
                                               get(s.slope + v, m),
                                               get(s.offset + v, m)};
        },
        [](const auto&, int64_t, auto) {});
  });
}

template <class T> void bwd_apply(const BatchNormArgs& args, int64_t begin, int64_t end) {
  with_activation(args.activation, [&](auto activation) {
    constexpr Activation F = decltype(activation)::value;
    args.extra ? gradient_apply<T, F, true>(args, begin, end) : gradient_apply<T, F, false>(args, begin, end);
  });
}

template <class T> constexpr BatchNormRows kernels() {
  return {chunks<T>,    scratch_bytes<T>, prepare<T>,    fwd_sums<T>, fwd_finish<T>,
          fwd_apply<T>, bwd_sums<T>,      bwd_finish<T>, bwd_apply<T>};
}

}  // namespace

extern const BatchNormTable<BatchNormRows> batch_norm_act_rows_table;
const BatchNormTable<BatchNormRows> batch_norm_act_rows_table = {kernels<float>(), kernels<bfloat16>(),
                                                                 kernels<double>()};

}  // namespace fastslim::FASTSLIM_ISA
