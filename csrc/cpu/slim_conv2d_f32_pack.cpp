// Packs the weight of slim_conv2d's float32 products.
#include "slim_conv2d_f32_product.h"

namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32 {
namespace {

typedef int32_t Lanes __attribute__((vector_size(FASTSLIM_VECTOR_BYTES)));

// Rows of a square of vectors become columns: at each stage lanes whose bit differs change places.
template <int Bit> FASTSLIM_ALWAYS_INLINE void transpose_stage(Vec<float> (&v)[kL]) {
  if constexpr (Bit < kL) {
    Lanes low, high;
    for (int i = 0; i < kL; ++i) {
      low[i] = i & Bit ? kL + (i ^ Bit) : i;
      high[i] = i & Bit ? kL + i : i | Bit;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i)
      if (!(i & Bit)) {
        const Vec<float> a = v[i], b = v[i | Bit];
#if defined(__clang__)
        Vec<float> x, y;
        for (int j = 0; j < kL; ++j) x[j] = j & Bit ? b[j ^ Bit] : a[j], y[j] = j & Bit ? b[j] : a[j | Bit];
        v[i] = x, v[i | Bit] = y;
#else
        v[i] = __builtin_shuffle(a, b, low), v[i | Bit] = __builtin_shuffle(a, b, high);
#endif
      }
    transpose_stage<Bit * 2>(v);
  }
}

// to[k][n] = from[n * stride_n + k], kL of both; rows of n beyond `rows` are zero.
inline void transpose_square(const float* from, int64_t stride_n, int64_t rows, float* to, int64_t pitch) {
  Vec<float> v[kL];
#pragma GCC unroll 16
  for (int i = 0; i < kL; ++i) v[i] = i < rows ? load(from + i * stride_n) : Vec<float>{};
  transpose_stage<1>(v);
#pragma GCC unroll 16
  for (int i = 0; i < kL; ++i) store(to + i * pitch, v[i]);
}

// to[k][n] = from[k * stride_k + n * stride_n] for k < count, n < width, zero from n = rows on.
void pack_block(const float* from, int64_t stride_k, int64_t stride_n, int64_t count, int64_t rows, int width,
                float* to) {
  if (stride_n == 1) {
    for (int64_t k = 0; k < count; ++k, from += stride_k, to += width)
      for (int n = 0; n < width; n += kL)
        store(to + n, n + kL <= rows ? load(from + n) : load_n(from + n, int(max_of(0, rows - n))));
    return;
  }
  int64_t k = 0;
  if (stride_k == 1)
    for (; k + kL <= count; k += kL)
      for (int n = 0; n < width; n += kL)
        transpose_square(from + n * stride_n + k, stride_n, rows - n, to + k * width + n, width);
  for (; k < count; ++k)
    for (int n = 0; n < width; ++n) to[k * width + n] = n < rows ? from[k * stride_k + n * stride_n] : 0;
}

}  // namespace

void pack_product_weight(const Product& p, const Taps& h, const Taps& w, int64_t k0, int64_t k1, int64_t n0, int width,
                         float* to) {
  const SlimConv2dWeight<const float>& weight = p.weight;
  const int64_t channels = p.grid.channels, rows = min_of(width, p.n - n0);
  for (int64_t k = k0; k < k1;) {
    const int64_t tap = k / channels, first = k % channels, last = min_of(channels, first + k1 - k);
    const float* from = weight.data + (h.first + tap / w.count * h.step) * weight.stride_h +
                        (w.first + tap % w.count * w.step) * weight.stride_w;
    // The segments cut either the k or the n.
    int64_t start = 0;
    for (int64_t i = 0; i < weight.num_segments; start += weight.segments[2 * i + 1], ++i) {
      const int64_t full = weight.segments[2 * i] - start;  // of the full weight's channel, less ours
      const int64_t end = start + weight.segments[2 * i + 1];
      if (!p.transposed) {
        const int64_t c0 = max_of(first, start), c1 = min_of(last, end);
        if (c0 < c1)
          pack_block(from + (c0 + full) * weight.stride_in + n0 * weight.stride_out, weight.stride_in,
                     weight.stride_out, c1 - c0, rows, width, to + (c0 - first) * width);
      } else if (weight.num_segments == 1) {
        pack_block(from + first * weight.stride_out + (n0 + full) * weight.stride_in, weight.stride_out,
                   weight.stride_in, last - first, rows, width, to);
      } else {
        for (int64_t c = first; c < last; ++c)
          for (int64_t n = max_of(n0, start); n < min_of(n0 + rows, end); ++n)
            to[(c - first) * width + n - n0] = from[c * weight.stride_out + (n + full) * weight.stride_in];
      }
    }
    if (p.transposed && weight.num_segments != 1)
      for (int64_t c = first; c < last; ++c)
        for (int64_t n = rows; n < width; ++n) to[(c - first) * width + n] = 0;
    to += (last - first) * width;
    k += last - first;
  }
}

}  // namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32
