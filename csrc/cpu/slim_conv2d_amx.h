// AMX building blocks of the bfloat16 convolution: tiles of 16 x 16 float32 sums over pairs of bfloat16.
#pragma once
#include "fastslim/slim_conv2d.h"

#if defined(__AVX512BF16__) && defined(__linux__)
#define FASTSLIM_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "vec.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of gcc's own intrinsics, gcc bug 105593
#endif

#define FASTSLIM_TARGET_AMX __attribute__((target("amx-tile,amx-bf16")))

namespace fastslim::FASTSLIM_ISA {
namespace {

constexpr int kTile = 16;             // rows of a tile, and float32 columns
constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// What `ldtilecfg` reads. Registers 0..3 hold sums, 4 and 5 the left operands, 6 and 7 the right ones.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {};  // bytes
  uint8_t rows[16] = {};

  // Left operands: `rows_left` x `pairs` pairs of bfloat16; right ones: `pairs` x 16 pairs.
  TileConfig(int rows_left, int pairs) {
    for (int tile = 0; tile < 8; ++tile) {
      columns[tile] = uint16_t(tile == 4 || tile == 5 ? 4 * pairs : 64);
      rows[tile] = uint8_t(tile >= 6 ? pairs : rows_left);
    }
  }
};

// Functions of their own: a lambda does not inherit the instruction set of the function it is in.
FASTSLIM_TARGET_AMX inline void load_config(const TileConfig& config) { _tile_loadconfig(&config); }
FASTSLIM_TARGET_AMX inline void release_tiles() { _tile_release(); }

// The tile intrinsics do not tell the compiler which memory they touch.
inline void memory_fence() { __asm__ volatile("" ::: "memory"); }

// 16 rows of 16 dwords, in place.
FASTSLIM_TARGET_AMX inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// (a0, b0, a1, b1, ...) of the first 16 bfloat16 of two rows.
FASTSLIM_TARGET_AMX inline __m512i interleave(__m256i a, __m256i b) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

// Two rows of 16 floats as pairs of bfloat16, rounded to nearest even.
FASTSLIM_TARGET_AMX inline __m512i interleave(__m512 a, __m512 b) {
  return interleave((__m256i)_mm512_cvtneps_pbh(a), (__m256i)_mm512_cvtneps_pbh(b));
}

// Runs body(begin, end) over the items of `parallel`.
template <class Body> void for_items(const SlimConv2dParallel& parallel, int64_t items, const Body& body) {
  if (items <= 0) return;
  parallel.run(items, const_cast<Body*>(&body),
               [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); });
}

// Gives out parts of the scratch memory, or measures it when there is none.
class Arena {
 public:
  explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {}
  template <class T> T* take(int64_t count) {
    char* part = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA
#endif
