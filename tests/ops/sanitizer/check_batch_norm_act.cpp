// batch_norm_act: outer channels inner activation training residual seed.
#include <cstring>

#include "driver.h"
#include "fastslim/batch_norm_act.h"
#include "fastslim/isa.h"

FASTSLIM_DEFINE_DISPATCH(BatchNormTable<BatchNormRows>, batch_norm_act_rows)
FASTSLIM_DEFINE_DISPATCH(BatchNormTable<BatchNormPlanes>, batch_norm_act_planes)

namespace fastslim {
namespace {

double activate(Activation f, double z) {
  switch (f) {
    case Activation::relu: return z > 0 ? z : 0;
    case Activation::relu6: return z <= 0 ? 0 : z >= 6 ? 6 : z;
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::hardswish: return z <= -3 ? 0 : z >= 3 ? z : z * (z + 3) / 6;
    default: return z;
  }
}

double slope(Activation f, double z) {
  const double sigmoid = 1 / (1 + std::exp(-z));
  switch (f) {
    case Activation::relu: return z > 0;
    case Activation::relu6: return z > 0 && z < 6;
    case Activation::silu: return sigmoid * (1 + z * (1 - sigmoid));
    case Activation::hardswish: return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5;
    default: return 1;
  }
}

template <class T>
void check(const BatchNormShape& shape, Activation activation, bool training, bool with_residual, Random random,
           const BatchNormRows& rows, const BatchNormPlanes& planes) {
  const int64_t size = shape.outer * shape.channels * shape.inner, channels = shape.channels;
  const double n = double(shape.values());
  Input<T> x(size, random), residual(with_residual ? size : 0, random), dy(size, random);
  Output<T> y(size), dx(size), dresidual(with_residual ? size : 0);
  Input<double> weight(channels, random), bias(channels, random);
  Output<double> mean(channels), variance(channels), invstd(channels), dweight(channels), dbias(channels);
  BatchNormArgs args{};
  args.shape = shape, args.activation = activation, args.training = training, args.sums = true;
  args.eps = 0.1;  // few values may happen to be equal: keeps 1 / sqrt(variance + eps) small
  args.weight = weight.data(), args.bias = bias.data(), args.mean = mean.data(), args.variance = variance.data();
  args.invstd = invstd.data(), args.dweight = dweight.data(), args.dbias = dbias.data();
  args.x = x.data(), args.y = y.data(), args.dy = dy.data(), args.dx = dx.data();
  args.residual = with_residual ? residual.data() : nullptr;
  args.dresidual = with_residual ? dresidual.data() : nullptr;
  for (int64_t c = 0; c < channels; ++c) {
    mean.set(c, random.next());
    variance.set(c, random.next() + 1.5);
    invstd.set(c, 1 / std::sqrt(variance[c] + args.eps));
  }
  const bool as_rows = shape.inner < planes.smallest_inner;
  Buffer<char> scratch(as_rows ? rows.scratch_bytes(shape) : 0);
  args.scratch = scratch.data();
  const auto run = [&](void (*kernel)(const BatchNormArgs&, int64_t, int64_t), int64_t items) {
    in_two_pieces(items, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  };
  const int64_t chunks = as_rows ? rows.chunks(shape) : 0;
  if (as_rows) {
    if (training) run(rows.fwd_sums, chunks), rows.fwd_finish(args);
    rows.prepare(args);
    run(rows.fwd_apply, chunks);
  } else {
    run(planes.fwd, channels);
  }
  const bool from_output = activation == Activation::relu || activation == Activation::relu6;
  args.extra = !with_residual ? nullptr : from_output ? y.data() : residual.data();
  if (as_rows) {
    rows.prepare(args);
    run(rows.bwd_sums, chunks);
    rows.bwd_finish(args);
    run(rows.bwd_apply, chunks);
  } else {
    run(planes.bwd, channels);
  }

  const double tolerance = kEpsilon<T> * 16, sum_tolerance = kEpsilon<Accumulate<T>> * 16 * (n + 16);
  for (int64_t c = 0; c < channels; ++c) {
    const auto each = [&](const auto& body) {
      for (int64_t o = 0; o < shape.outer; ++o)
        for (int64_t i = 0; i < shape.inner; ++i) body((o * channels + c) * shape.inner + i);
    };
    double center = mean[c], scale = invstd[c];
    if (training) {
      double sum = 0, square = 0;
      each([&](int64_t i) { sum += x[i]; });
      center = sum / n;
      each([&](int64_t i) { square += (x[i] - center) * (x[i] - center); });
      scale = 1 / std::sqrt(square / n + args.eps);
      expect_near("mean", c, mean[c], center, sum_tolerance / n);
      expect_near("invstd", c, invstd[c], scale, sum_tolerance / n * 16);
    }
    const auto z_of = [&](int64_t i) {
      return (x[i] - center) * scale * weight[c] + bias[c] + (with_residual ? residual[i] : 0);
    };
    double dz_sum = 0, dz_x = 0;
    each([&](int64_t i) {
      expect_near("y", i, y[i], activate(activation, z_of(i)), tolerance);
      const double dz = dy[i] * slope(activation, z_of(i));
      if (with_residual) expect_near("dresidual", i, dresidual[i], dz, tolerance);
      dz_sum += dz;
      dz_x += dz * (x[i] - center) * scale;
    });
    expect_near("dbias", c, dbias[c], dz_sum, sum_tolerance);
    expect_near("dweight", c, dweight[c], dz_x, sum_tolerance * 4);
    each([&](int64_t i) {
      double gradient = dy[i] * slope(activation, z_of(i));
      if (training) gradient -= dz_sum / n + (x[i] - center) * scale * dz_x / n;
      expect_near("dx", i, dx[i], gradient * scale * weight[c], tolerance * 4);
    });
  }
}

}  // namespace

void check_batch_norm_act(const char* dtype, std::istream& line) {
  BatchNormShape shape{};
  int activation = 0;
  bool training = false, residual = false;
  Random random{};
  line >> shape.outer >> shape.channels >> shape.inner >> activation >> training >> residual >> random.state;
  const auto& rows = batch_norm_act_rows();
  const auto& planes = batch_norm_act_planes();
  const auto f = Activation(activation);
  if (!std::strcmp(dtype, "bf16"))
    check<bfloat16>(shape, f, training, residual, random, rows.bf16, planes.bf16);
  else if (!std::strcmp(dtype, "f64"))
    check<double>(shape, f, training, residual, random, rows.f64, planes.f64);
  else
    check<float>(shape, f, training, residual, random, rows.f32, planes.f32);
}

}  // namespace fastslim
