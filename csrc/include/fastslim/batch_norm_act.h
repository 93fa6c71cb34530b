// Batch normalisation, residual add and activation in one op: y = act(bn(x) + residual).
//
//   forward    z = (x - mean) * invstd * weight + bias (+ residual)      y = act(z)
//   backward   dz = dy * act'(z)                                         dresidual = dz
//              dweight = invstd * sum(dz * (x - mean))                   dbias = sum(dz)
//              dx = weight * invstd * (dz - dbias / n - (x - mean) * invstd * dweight / n)
//
// In evaluation mean and variance are constants and the two last terms of dx vanish. z is computed
// again in backward: nothing of the activation's size is kept but x (and y or the residual).
#pragma once
#include <cstdint>

namespace fastslim {

enum class Activation : int { none, relu, relu6, silu, hardswish };
constexpr int kActivations = 5;

// Memory of every activation tensor: [outer, channels, inner], dense.
// channels_last and (N, C): outer = N * H * W, inner = 1. NCHW: outer = N, inner = H * W.
struct BatchNormShape {
  int64_t outer, channels, inner;
  int64_t values() const { return outer * inner; }  // per channel
};

struct BatchNormArgs {
  BatchNormShape shape;
  Activation activation;
  bool training;  // statistics of the batch
  bool sums;      // backward: dbias and dweight are wanted (always in training)
  double eps;
  const double* weight;  // [channels], of the active channels
  const double* bias;    // [channels]
  double* mean;          // [channels]; forward in training writes it
  double* variance;      // [channels]; biased; forward in training writes it, nothing else needs it
  double* invstd;        // [channels]; forward in training writes it
  double* dweight;       // [channels]; backward writes it
  double* dbias;         // [channels]; backward writes it
  const void* x;         // [outer, channels, inner], as all below
  const void* residual;  // or null
  void* y;               // forward only
  const void* dy;        // backward only, as all below
  const void* extra;     // with a residual: y (relu, relu6) or the residual (silu, hardswish)
  void* dx;
  void* dresidual;  // or null
  void* scratch;    // rows only: scratch_bytes(shape)
};

// inner == 1 (or too small for a vector): the tensor is a matrix whose columns have parameters.
// Chunks [begin, end) of rows are independent and their number depends on the shape only.
//   forward    training: fwd_sums in parallel, fwd_finish       prepare   fwd_apply in parallel
//   backward   prepare   args.sums: bwd_sums in parallel        bwd_finish   bwd_apply in parallel
struct BatchNormRows {
  int64_t (*chunks)(const BatchNormShape&);
  int64_t (*scratch_bytes)(const BatchNormShape&);
  void (*prepare)(const BatchNormArgs&);
  void (*fwd_sums)(const BatchNormArgs&, int64_t begin, int64_t end);
  void (*fwd_finish)(const BatchNormArgs&);
  void (*fwd_apply)(const BatchNormArgs&, int64_t begin, int64_t end);
  void (*bwd_sums)(const BatchNormArgs&, int64_t begin, int64_t end);
  void (*bwd_finish)(const BatchNormArgs&);
  void (*bwd_apply)(const BatchNormArgs&, int64_t begin, int64_t end);
};

// inner >= smallest_inner: channels are independent and each is done at once, out of the cache.
struct BatchNormPlanes {
  int64_t smallest_inner;
  void (*fwd)(const BatchNormArgs&, int64_t begin, int64_t end);
  void (*bwd)(const BatchNormArgs&, int64_t begin, int64_t end);
};

template <class Kernels> struct BatchNormTable {
  Kernels f32, bf16, f64;
};

const BatchNormTable<BatchNormRows>& batch_norm_act_rows();
const BatchNormTable<BatchNormPlanes>& batch_norm_act_planes();

}  // namespace fastslim
