// The launchers of csrc/cuda/batch_norm_act_*.cu, run by the host, for ctypes.
#include "../../csrc/cuda/batch_norm_act_backward.cu"
#include "../../csrc/cuda/batch_norm_act_forward.cu"
#include "../../csrc/cuda/batch_norm_act_statistics.cu"

namespace {

using namespace fastslim;

// A call as ctypes describes it (test_batch_norm_act_cuda.py: Call).
struct Call {
  int64_t dtype;  // an ElementType
  int64_t outer, inner, channels, multiple, activation, training, sums, segments;
  double momentum, eps;
  const int32_t* width;          // or null
  void* vectors[4];              // weight, bias, running_mean, running_var
  int64_t strides[4], types[4];  // of the vectors
  int32_t start[kBatchNormMaxSegments], count[kBatchNormMaxSegments];
  void *first, *second, *third;  // x, residual, - or dy, x, extra
  void *out, *out_residual;      // y, - or dx, dresidual
  void *dweight, *dbias, *stats, *workspace;
};

BatchNormCuda shape_of(const Call& c) {
  BatchNormCuda s{};
  s.outer = c.outer, s.inner = c.inner;
  s.channels = {int32_t(c.channels), c.width};
  s.multiple = int32_t(c.multiple);
  s.activation = Activation(c.activation), s.training = c.training != 0;
  s.momentum = c.momentum, s.eps = c.eps;
  ChannelVector* const vectors[] = {&s.parameters.weight, &s.parameters.bias, &s.parameters.running_mean,
                                    &s.parameters.running_var};
  for (int i = 0; i < 4; ++i) *vectors[i] = {c.vectors[i], c.strides[i], ElementType(c.types[i])};
  s.parameters.segments.number = int32_t(c.segments);
  std::memcpy(s.parameters.segments.start, c.start, sizeof c.start);
  std::memcpy(s.parameters.segments.count, c.count, sizeof c.count);
  s.stats = static_cast<double*>(c.stats), s.workspace = c.workspace;
  return s;
}

template <class Body> int64_t for_type(const Call& c, const Body& body) {
  switch (ElementType(c.dtype)) {
    case ElementType::f32: return body(float());
    case ElementType::bf16: return body(bfloat16());
    case ElementType::f16: return body(float16());
    default: return body(double());
  }
}

}  // namespace

extern "C" int64_t workspace_bytes(const Call* c) {
  return for_type(*c,
                  [&](auto type) { return BatchNormActCudaLaunchers<decltype(type)>::workspace_bytes(shape_of(*c)); });
}
extern "C" void forward(const Call* c) {
  for_type(*c, [&](auto type) {
    using T = decltype(type);
    return BatchNormActCudaLaunchers<T>::forward(static_cast<const T*>(c->first), static_cast<const T*>(c->second),
                                                 static_cast<T*>(c->out), shape_of(*c), nullptr);
  });
}
extern "C" void backward(const Call* c) {
  for_type(*c, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    return BatchNormActCudaLaunchers<T>::backward(static_cast<const T*>(c->first), static_cast<const T*>(c->second),
                                                  static_cast<const T*>(c->third), static_cast<T*>(c->out),
                                                  static_cast<T*>(c->out_residual), static_cast<A*>(c->dweight),
                                                  static_cast<A*>(c->dbias), c->sums != 0, shape_of(*c), nullptr);
  });
}
// first: partials [chunks][3][C] of `outer` rows; out: coefficients.
extern "C" void finalize(const Call* c, int64_t rows_per_chunk) {
  batch_norm_finalize(static_cast<const float*>(c->first), chunks_of_rows(c->outer, rows_per_chunk),
                      static_cast<float*>(c->out), shape_of(*c), nullptr);
}
