// The right operand of a bfloat16 convolution's tiles: the active weights, rounded, as rows of 16 pairs.
#pragma once
#include "slim_conv2d_bf16_plan.h"

#ifdef FASTSLIM_AMX
namespace fastslim::FASTSLIM_ISA {
namespace {

constexpr int64_t kStepsTogether = 8;
constexpr int64_t kPackedTogether = 4;  // blocks of 16: what lies side by side in the weight is read together

// Which weights the right operand takes.
struct Right {
  const SlimConv2dWeight<const float>* weight;
  bool lanes_are_outputs;  // forward: a lane is an output channel of the layer, else one of its input channels
};

// How 16 elements of K are read: lanes whose weights follow each other, from up to two places.
struct Lanes {
  int64_t offset[2];  // from the weight's start to lane 0, were it there
  uint16_t mask[2];   // the lanes that are read from there; the others are zero
  bool scattered;     // more than two places
};

// Where the weights of the elements of one tile's K start; negative: an element that only fills the tile.
struct Elements {
  int64_t offsets[2 * kTile];
  Lanes halves[2];
};

inline Lanes lanes_of(const int64_t* offsets, int64_t count) {
  Lanes lanes{};
  int places = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (offsets[i] < 0) continue;
    int place = 0;
    while (place < places && lanes.offset[place] != offsets[i] - i) ++place;
    if (place == 2) return {{0, 0}, {0, 0}, true};
    if (place == places) lanes.offset[places++] = offsets[i] - i;
    lanes.mask[place] = uint16_t(lanes.mask[place] | 1u << i);
  }
  return lanes;
}

inline Elements elements_of(const Right& right, const Correlation& g, const Form& f, int64_t step) {
  const SlimConv2dWeight<const float>& w = *right.weight;
  const int64_t count = 2 * f.pairs, start = step % f.chunks * count, first = step / f.chunks * f.taps_per_run;
  int64_t tap = start / f.channels, c = start % f.channels;
  Elements e;
  for (int64_t i = 0; i < count; ++i) {
    e.offsets[i] = -1;
    if (tap < f.taps_per_run && c < g.channels)
      e.offsets[i] = g.taps[first + tap].weight + (right.lanes_are_outputs ? input_offset(w, c) : c * w.stride_out);
    if (++c == f.channels) c = 0, ++tap;
  }
  e.halves[0] = lanes_of(e.offsets, at_most(count, kTile));
  e.halves[1] = lanes_of(e.offsets + kTile, count - at_most(count, kTile));
  return e;
}

FASTSLIM_TARGET_AMX inline __m512 read(const float* base, const Lanes& lanes, const int64_t* offsets, int64_t count) {
  if (!lanes.scattered) {
    const __m512 v = _mm512_maskz_loadu_ps(lanes.mask[0], base + lanes.offset[0]);
    return lanes.mask[1] ? _mm512_mask_loadu_ps(v, lanes.mask[1], base + lanes.offset[1]) : v;
  }
  float values[16] = {};
  for (int64_t i = 0; i < count; ++i)
    if (offsets[i] >= 0) values[i] = base[offsets[i]];
  return _mm512_loadu_ps(values);
}

// A tile whose lanes are output channels: rows of one channel each, transposed to rows of one pair each.
FASTSLIM_TARGET_AMX void pack_outputs(const SlimConv2dWeight<const float>& w, const Elements& e, int64_t pairs,
                                      int64_t first, int64_t lanes, char* packed) {
  const int64_t low_count = at_most(2 * pairs, kTile), high_count = 2 * pairs - low_count;
  __m512i rows[16];
  for (int64_t n = 0; n < 16; ++n) {
    __m512 low = _mm512_setzero_ps(), high = low;
    if (n < lanes) {
      const float* base = w.data + (first + n) * w.stride_out;
      low = read(base, e.halves[0], e.offsets, low_count);
      high = read(base, e.halves[1], e.offsets + kTile, high_count);
    }
    rows[n] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
  transpose(rows);
  for (int64_t pair = 0; pair < pairs; ++pair) _mm512_storeu_si512(packed + pair * 64, rows[pair]);
}

// Packs the item's part: some steps of some blocks of 16 output channels, `pairs` rows of 16 pairs each.
FASTSLIM_TARGET_AMX void pack_right(const Right& right, const Correlation& g, const Form& f, int64_t item,
                                    char* packed) {
  const SlimConv2dWeight<const float>& w = *right.weight;
  const int64_t step_bytes = f.pairs * 64, block_bytes = f.steps() * step_bytes;
  const int64_t parts = ceil_div(f.steps(), kStepsTogether);
  const int64_t begin = item / parts * kPackedTogether;
  const int64_t end = at_most(begin + kPackedTogether, ceil_div(g.out_channels, kTile));
  const int64_t first_step = item % parts * kStepsTogether, last_step = at_most(first_step + kStepsTogether, f.steps());
  int64_t offsets[kPackedTogether][kTile], counts[kPackedTogether];
  Lanes lanes[kPackedTogether];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t i = block - begin;
    counts[i] = at_most(g.out_channels - block * kTile, kTile);
    if (right.lanes_are_outputs) continue;
    for (int64_t n = 0; n < counts[i]; ++n) offsets[i][n] = input_offset(w, block * kTile + n);
    lanes[i] = lanes_of(offsets[i], counts[i]);
  }
  for (int64_t step = first_step; step < last_step; ++step) {
    const Elements e = elements_of(right, g, f, step);
    char* to = packed + step * step_bytes;
    if (right.lanes_are_outputs) {
      for (int64_t block = begin; block < end; ++block)
        pack_outputs(w, e, f.pairs, block * kTile, counts[block - begin], to + block * block_bytes);
      continue;
    }
    for (int64_t pair = 0; pair < f.pairs; ++pair)
      for (int64_t block = begin; block < end; ++block) {
        const int64_t i = block - begin;
        __m512 row[2];
        for (int half = 0; half < 2; ++half) {
          const int64_t k = e.offsets[2 * pair + half];
          row[half] = k < 0 ? _mm512_setzero_ps() : read(w.data + k, lanes[i], offsets[i], counts[i]);
        }
        _mm512_storeu_si512(to + block * block_bytes + pair * 64, interleave(row[0], row[1]));
      }
  }
}

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA
#endif
