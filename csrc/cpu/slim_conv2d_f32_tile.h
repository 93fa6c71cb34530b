// Register tiles of products: P positions, each with an offset of its own, by V vectors of channels.
#pragma once
#include "slim_conv2d_f32.h"

namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32 {
namespace {

struct Tile {
  const float* image;
  const int64_t* from;  // offsets of the positions
  const Piece* pieces;
  int64_t num_pieces;
  const float* weight;  // (k, V * kL)
  const float* bias;    // null: none, or already added
  float* out;
  const int64_t* to;
  int count;  // positions, at most P
  bool add;   // to what a former chunk has left
  int tail;   // channels in the last vector
};

template <int V> constexpr int kTilePositions = kMaxVectors == 4 ? (V == 4 ? 6 : V == 3 ? 8 : 12) : (V == 2 ? 6 : 8);

template <int V> void compute_tile(const Tile& t) {
  constexpr int P = kTilePositions<V>;
  Vec<float> sum[P][V];
  const float* x[P];
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i) {
    x[i] = t.image + t.from[i < t.count ? i : t.count - 1];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = Vec<float>{};
  }
  const float* w = t.weight;
  for (const Piece *piece = t.pieces, *end = piece + t.num_pieces; piece < end; ++piece) {
    const int64_t last = piece->offset + piece->length;
    for (int64_t k = piece->offset; k < last; ++k, w += V * kL) {
      Vec<float> b[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) b[v] = load(w + v * kL);
#pragma GCC unroll 16
      for (int i = 0; i < P; ++i) {
        const Vec<float> a = splat(x[i][k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[i][v] += a * b[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i) {
    if (i >= t.count) break;
    float* to = t.out + t.to[i];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const bool part = v == V - 1 && t.tail < kL;
      Vec<float> value = sum[i][v];
      if (t.add) value += part ? load_n(to + v * kL, t.tail) : load(to + v * kL);
      if (t.bias) value += part ? load_n(t.bias + v * kL, t.tail) : load(t.bias + v * kL);
      if (part)
        store_n(to + v * kL, value, t.tail);
      else
        store(to + v * kL, value);
    }
  }
}

using ComputeTile = void (*)(const Tile&);
struct Kernel {
  ComputeTile run;
  int positions;
};
Kernel kernel_of(int vectors) {
  switch (vectors) {
    case 1: return {compute_tile<1>, kTilePositions<1>};
    case 2: return {compute_tile<2>, kTilePositions<2>};
#if FASTSLIM_VECTOR_BYTES == 64
    case 3: return {compute_tile<3>, kTilePositions<3>};
    default: return {compute_tile<4>, kTilePositions<4>};
#else
    default: return {};
#endif
  }
}

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32
