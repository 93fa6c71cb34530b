// bfloat16 convolution, forward and gradient of the input, as products of AMX tiles.
#include "slim_conv2d_bf16_pack.h"

#ifdef FASTSLIM_AMX
namespace fastslim::FASTSLIM_ISA {
namespace {

constexpr int64_t kPanel = 2 * kTile;  // output channels computed together
constexpr int64_t kPairsOfTiles = 8;   // of an item: 256 positions, whose operands stay in the L2 cache
constexpr int64_t kItems = 8;          // fewer leave threads idle

// Copies a pixel's channels, or zeros where there is no pixel, and fills up with zeros.
inline void copy_pixel(const bfloat16* from, int64_t channels, bfloat16* to, int64_t width) {
  if (!from) {
    std::memset(to, 0, size_t(width) * 2);
    return;
  }
  int64_t c = 0;
  for (; c + 32 <= channels; c += 32) _mm512_storeu_si512(to + c, _mm512_loadu_si512(from + c));
  if (c < width) {  // channels < c + 32, and so is what fills up: at most 18 more
    for (; c < width; c += 32) {
      const int64_t real = channels - c < 0 ? 0 : channels - c, all = at_most(width - c, 32);
      const uint32_t read = uint32_t((uint64_t(1) << at_most(real, 32)) - 1);
      const uint32_t write = uint32_t((uint64_t(1) << all) - 1);
      _mm512_mask_storeu_epi16(to + c, write, _mm512_maskz_loadu_epi16(read, from + c));
    }
  }
}

void copy_padded_row(const bfloat16* x, const Correlation& g, const Form& f, int64_t row, bfloat16* left) {
  const int64_t n = row / f.rows, y = row % f.rows + f.top;
  bfloat16* to = left + row * f.columns * f.channels;
  if (y < 0 || y >= g.in_h) {
    std::memset(to, 0, size_t(f.columns * f.channels) * 2);
    return;
  }
  const bfloat16* from = x + (n * g.in_h + y) * g.in_w * g.pixel;
  if (g.pixel == f.channels && g.channels == f.channels) {  // pixels lie in the copy as they did
    const int64_t before = f.start < 0 ? at_most(-f.start, f.columns) : 0, skip = f.start > 0 ? f.start : 0;
    const int64_t room = f.columns - before, there = g.in_w - skip < 0 ? 0 : g.in_w - skip;
    const int64_t copied = at_most(room, there), pixel_bytes = f.channels * 2;
    std::memset(to, 0, size_t(before * pixel_bytes));
    std::memcpy(to + before * f.channels, from + skip * g.pixel, size_t(copied * pixel_bytes));
    std::memset(to + (before + copied) * f.channels, 0, size_t((room - copied) * pixel_bytes));
    return;
  }
  for (int64_t column = 0; column < f.columns; ++column, to += f.channels) {
    const int64_t at = column + f.start;
    copy_pixel(at >= 0 && at < g.in_w ? from + at * g.pixel : nullptr, g.channels, to, f.channels);
  }
}

void gather_row(const bfloat16* x, const Correlation& g, const Form& f, int64_t row, bfloat16* left) {
  const int64_t n = row / g.grid_h, y0 = row % g.grid_h * g.step_h;
  const int64_t fill = f.run_elements() - f.taps_per_run * f.channels;
  bfloat16* to = left + row * g.grid_w * f.run_elements();
  for (int64_t position = 0; position < g.grid_w; ++position) {
    for (const Tap& tap : g.taps) {
      const int64_t y = y0 + tap.dy, at = position * g.step_w + tap.dx;
      const bool inside = y >= 0 && y < g.in_h && at >= 0 && at < g.in_w;
      copy_pixel(inside ? x + ((n * g.in_h + y) * g.in_w + at) * g.pixel : nullptr, g.channels, to, f.channels);
      to += f.channels;
    }
    copy_pixel(nullptr, 0, to, fill);
    to += fill;
  }
}

// The first position of a tile of left rows: its line, and its place in the line. The last tile of a line overlaps the
// one before where the line is no whole number of tiles; `done` rows are that one's.
struct TileAt {
  int64_t line, position, done;
};
inline TileAt tile_at(const Form& f, int64_t tile) {
  const int64_t line = tile / f.tiles_per_line(), first = tile % f.tiles_per_line() * f.tile_rows;
  const int64_t position = at_most(first, f.width - f.tile_rows);
  return {line, position, first - position};
}

template <int kRight>
FASTSLIM_TARGET_AMX void multiply(const char* left0, const char* left1, int64_t left_row, const Tap* runs,
                                  const Form& f, const char* right0, const char* right1, float* sums) {
  _tile_zero(0);
  _tile_zero(2);
  if (kRight == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
  const int64_t right_step = f.pairs * 64, left_step = f.pairs * 4;
  for (int64_t run = 0; run < f.runs; ++run) {
    const char *a0 = left0 + runs[run].weight, *a1 = left1 + runs[run].weight;
    for (int64_t chunk = 0; chunk < f.chunks; ++chunk) {
      _tile_loadd(6, right0, 64);
      _tile_loadd(4, a0, left_row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a1, left_row);
      _tile_dpbf16ps(2, 5, 6);
      if (kRight == 2) {
        _tile_loadd(7, right1, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        right1 += right_step;
      }
      right0 += right_step, a0 += left_step, a1 += left_step;
    }
  }
  _tile_stored(0, sums, 64 * kRight);
  _tile_stored(2, sums + 16 * kRight * kTile, 64 * kRight);
  if (kRight == 2) {
    _tile_stored(1, sums + 16, 128);
    _tile_stored(3, sums + 16 * kRight * kTile + 16, 128);
  }
  memory_fence();
}

// Rounds tiles of sums and writes them.
struct Writer {
  bfloat16* out;
  const float* bias;
  bool add;  // to what `out` holds
  const Correlation* g;

  FASTSLIM_TARGET_AMX static __m512 held(const bfloat16* from, uint32_t mask) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(mask), from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }

  // 16 or 32 channels (rows of `sums` are as long) of `rows` positions that lie `step` elements apart.
  template <int kRight, bool kBias, bool kAdd>
  FASTSLIM_TARGET_AMX void write_run(const float* sums, int64_t rows, bfloat16* to, int64_t step,
                                     int64_t channel) const {
    const int64_t count = at_most(g->out_channels - channel, kRight * kTile);
    const uint32_t mask = uint32_t((uint64_t(1) << count) - 1);
    __m512 low = _mm512_setzero_ps(), high = low;
    if (kBias) {
      low = _mm512_maskz_loadu_ps(__mmask16(mask), bias + channel);
      if (kRight == 2) high = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), bias + channel + 16);
    }
    for (int64_t r = 0; r < rows; ++r, sums += kRight * kTile, to += step) {
      __m512 a = _mm512_load_ps(sums), b = low;
      if (kBias) a = _mm512_add_ps(a, low);
      if (kAdd) a = _mm512_add_ps(a, held(to, mask));
      if (kRight == 2) {
        b = _mm512_load_ps(sums + 16);
        if (kBias) b = _mm512_add_ps(b, high);
        if (kAdd) b = _mm512_add_ps(b, held(to + kTile, mask >> kTile));
        _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh(b, a));
      } else {
        _mm256_mask_storeu_epi16(to, __mmask16(mask), (__m256i)_mm512_cvtneps_pbh(a));
      }
    }
  }

  template <int kRight> void write(const float* sums, const Form& f, TileAt at, int64_t channel) const {
    const int64_t grid = g->grid_h * g->grid_w, flat = at.line * f.width + at.position + at.done;
    sums += at.done * kRight * kTile;
    int64_t image = flat / grid, row = flat % grid / g->grid_w, column = flat % g->grid_w;
    const bool dense = g->out_row == g->grid_w * g->out_pixel && g->out_image == g->grid_h * g->out_row;
    for (int64_t left = f.tile_rows - at.done;
         left > 0;) {  // a run ends with its row of the grid, unless rows are dense
      const int64_t rows = dense ? left : at_most(left, g->grid_w - column);
      bfloat16* to = out + g->out_start + image * g->out_image + row * g->out_row + column * g->out_pixel + channel;
      if (bias)
        write_run<kRight, true, false>(sums, rows, to, g->out_pixel, channel);
      else if (add)
        write_run<kRight, false, true>(sums, rows, to, g->out_pixel, channel);
      else
        write_run<kRight, false, false>(sums, rows, to, g->out_pixel, channel);
      sums += rows * kRight * kTile, left -= rows, column = 0;
      if (++row == g->grid_h) row = 0, ++image;
    }
  }
};

int64_t layout(const Correlation& g, const Form& f, void* scratch, bfloat16** left, char** right) {
  Arena arena(scratch);
  *left = arena.take<bfloat16>(left_elements(g, f));
  *right = arena.take<char>(right_bytes(g, f));
  return arena.used();
}

FASTSLIM_TARGET_AMX void correlate(const bfloat16* x, const Right& weights, const float* bias, bfloat16* out, bool add,
                                   const Correlation& g, void* scratch, const SlimConv2dParallel& parallel) {
  const Form f = make_form(g);
  bfloat16* copy;
  char* right;
  layout(g, f, scratch, &copy, &right);
  const int64_t blocks = ceil_div(g.out_channels, kTile), block_bytes = f.steps() * f.pairs * 64;
  const int64_t copied = f.left == Left::direct ? 0 : f.left == Left::padded ? g.batch * f.rows : g.batch * g.grid_h;
  const int64_t packings = ceil_div(blocks, kPackedTogether) * ceil_div(f.steps(), kStepsTogether);
  for_items(parallel, packings, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) pack_right(weights, g, f, item, right);
  });
  // A loop of its own: threads take halves of the items, which must weigh the same.
  for_items(parallel, copied, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      f.left == Left::padded ? copy_padded_row(x, g, f, row, copy) : gather_row(x, g, f, row, copy);
  });

  std::vector<Tap> runs;  // `weight` holds the bytes from a position to the run
  for (int64_t run = 0; run < f.runs; ++run) {
    const Tap& tap = g.taps[run * f.taps_per_run];
    const int64_t pixels = f.left == Left::padded ? (tap.dy - f.top) * f.columns + tap.dx - f.start : 0;
    runs.push_back({0, 0, pixels * f.channels * 2});
  }
  const bfloat16* left = f.left == Left::direct ? x : copy;
  const int64_t element = f.left == Left::direct     ? g.pixel
                          : f.left == Left::gathered ? f.run_elements()
                                                     : f.channels * g.step_w;
  const auto left_of = [&](TileAt at) {
    if (f.left != Left::padded) return reinterpret_cast<const char*>(left + at.position * element);
    const int64_t n = at.line / g.grid_h, y = at.line % g.grid_h * g.step_h;
    return reinterpret_cast<const char*>(left + ((n * f.rows + y) * f.columns) * f.channels + at.position * element);
  };
  const int64_t pairs = ceil_div(f.tiles(), 2), panels = ceil_div(g.out_channels, kPanel);
  const int64_t pixel_items = ceil_div(pairs, kPairsOfTiles);
  const int64_t groups = at_most(panels, ceil_div(kItems, pixel_items ? pixel_items : 1));
  const Writer writer{out, bias, add, &g};
  const TileConfig config(int(f.tile_rows), int(f.pairs));
  for_items(parallel, pixel_items * groups, [&](int64_t begin, int64_t end) {
    load_config(config);
    alignas(64) float sums[4 * kTile * kTile];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item % groups, first = item / groups * kPairsOfTiles;
      const int64_t last = at_most(first + kPairsOfTiles, pairs);
      for (int64_t panel = group * panels / groups; panel < (group + 1) * panels / groups; ++panel) {
        const int64_t channel = panel * kPanel;
        const char *right0 = right + 2 * panel * block_bytes, *right1 = right0 + block_bytes;
        const bool two = channel + kTile < g.out_channels;
        for (int64_t pair = first; pair < last; ++pair) {
          const TileAt at0 = tile_at(f, 2 * pair);
          const bool single = 2 * pair + 1 == f.tiles();
          const TileAt at1 = single ? at0 : tile_at(f, 2 * pair + 1);
          const char *left0 = left_of(at0), *left1 = left_of(at1);
          if (two) {
            multiply<2>(left0, left1, element * 2, runs.data(), f, right0, right1, sums);
            writer.write<2>(sums, f, at0, channel);
            if (!single) writer.write<2>(sums + 2 * kTile * kTile, f, at1, channel);
          } else {
            multiply<1>(left0, left1, element * 2, runs.data(), f, right0, nullptr, sums);
            writer.write<1>(sums, f, at0, channel);
            if (!single) writer.write<1>(sums + kTile * kTile, f, at1, channel);
          }
        }
      }
    }
    release_tiles();
  });
}

int64_t scratch_of(const Correlation& g) {
  bfloat16* left;
  char* right;
  return g.taps.empty() ? 0 : layout(g, make_form(g), nullptr, &left, &right);
}

}  // namespace

int64_t conv_bf16_forward_scratch(const SlimConv2dShape& s) { return scratch_of(forward_of(s, 0, 0)); }

void conv_bf16_forward(const bfloat16* x, const SlimConv2dWeight<const float>& weight, const float* bias, bfloat16* y,
                       const SlimConv2dShape& s, void* scratch, const SlimConv2dParallel& parallel) {
  correlate(x, {&weight, true}, bias, y, false, forward_of(s, weight.stride_h, weight.stride_w), scratch, parallel);
}

int64_t conv_bf16_backward_input_scratch(const SlimConv2dShape& s) {
  int64_t most = 0;
  for (int64_t y = 0; y < at_most(s.stride_h, s.in_h); ++y)
    for (int64_t x = 0; x < at_most(s.stride_w, s.in_w); ++x) {
      const int64_t bytes = scratch_of(gradient_of_input(s, 0, 0, y, x));
      most = bytes > most ? bytes : most;
    }
  return most;
}

void conv_bf16_backward_input(const bfloat16* grad_y, const SlimConv2dWeight<const float>& weight, bfloat16* grad_x,
                              bool add, const SlimConv2dShape& s, void* scratch, const SlimConv2dParallel& parallel) {
  bool zeroed = add;
  for (int64_t y = 0; y < at_most(s.stride_h, s.in_h); ++y)
    for (int64_t x = 0; x < at_most(s.stride_w, s.in_w); ++x)
      if (!zeroed && gradient_of_input(s, 0, 0, y, x).taps.empty()) {
        const int64_t row = s.in_w * s.c_in;
        for_items(parallel, s.batch * s.in_h, [&](int64_t begin, int64_t end) {
          std::memset(grad_x + begin * row, 0, size_t((end - begin) * row) * 2);
        });
        zeroed = true;
      }
  for (int64_t y = 0; y < at_most(s.stride_h, s.in_h); ++y)
    for (int64_t x = 0; x < at_most(s.stride_w, s.in_w); ++x) {
      const Correlation g = gradient_of_input(s, weight.stride_h, weight.stride_w, y, x);
      if (!g.taps.empty()) correlate(grad_y, {&weight, false}, nullptr, grad_x, add, g, scratch, parallel);
    }
}

}  // namespace fastslim::FASTSLIM_ISA
#endif
