// How a bfloat16 convolution becomes products of tiles: pixels of a grid x (taps x channels) x output channels.
#pragma once
#include <vector>

#include "slim_conv2d_bf16.h"

#ifdef FASTSLIM_AMX
namespace fastslim::FASTSLIM_ISA {
namespace {

// One element of the kernel: where its pixel lies, counted from grid position * step, and where its weights start.
struct Tap {
  int64_t dy, dx, weight;
};

// A correlation over a grid of positions. Forward: the grid is the output. Input gradient: the positions of one
// remainder of the stride, where only some taps meet.
struct Correlation {
  int64_t batch, in_h, in_w, channels, pixel;  // what is read; `pixel`: elements from one pixel to the next
  int64_t grid_h, grid_w, step_h, step_w;
  int64_t out_channels, out_start, out_image, out_row, out_pixel;  // where the grid is written, in elements
  std::vector<Tap> taps;
};

enum class Left {
  direct,    // the pixels as they lie in memory
  padded,    // a copy with zeros around
  gathered,  // a copy of every position's taps side by side
};

// The left operand's form. K runs over `runs` pieces of memory, each `chunks` tiles of `pairs` pairs.
struct Form {
  Left left;
  int64_t channels;            // of a pixel in the copy: more than there are where tiles want it
  int64_t runs, taps_per_run;  // taps that lie side by side
  int64_t chunks, pairs;
  int64_t top, start, rows, columns;  // of the padded copy: first row and column (negative: zeros), and size
  int64_t lines, width, tile_rows;    // pixels in a line follow each other in memory
  int64_t run_elements() const { return chunks * pairs * 2; }
  int64_t steps() const { return runs * chunks; }
  int64_t tiles_per_line() const { return ceil_div(width, kTile); }
  int64_t tiles() const { return lines * tiles_per_line(); }
};

// Tiles of one run of `elements`; the last pair may be half empty.
inline void cut_run(Form& f, int64_t elements) {
  const int64_t pairs = ceil_div(elements, 2);
  f.chunks = ceil_div(pairs, kTile), f.pairs = ceil_div(pairs, f.chunks);
}

// Channels of a pixel in the padded copy, such that tiles end where a run ends: fewest tiles, then fewest channels.
inline bool choose_channels(Form& f, int64_t channels) {
  f.chunks = 0;
  for (int64_t c = round_up(channels, 2); c <= round_up(channels, 2) + kTile; c += 2) {
    const int64_t pairs = f.taps_per_run * c / 2, chunks = ceil_div(pairs, kTile);
    if (pairs % chunks == 0 && (!f.chunks || chunks < f.chunks))
      f.channels = c, f.chunks = chunks, f.pairs = pairs / chunks;
  }
  return f.chunks != 0;
}

// How many taps lie side by side in every row of the kernel.
inline int64_t side_by_side(const std::vector<Tap>& taps) {
  int64_t count = 1;
  const int64_t all = int64_t(taps.size());
  while (count < all && taps[count].dy == taps[0].dy && taps[count].dx == taps[0].dx + count) ++count;
  for (int64_t t = 0; t < all; ++t) {
    const Tap& first = taps[t - t % count];
    if (taps[t].dy != first.dy || taps[t].dx != first.dx + t % count) return 1;
  }
  return all % count ? 1 : count;
}

inline Form make_form(const Correlation& g) {
  Form f{};
  const int64_t taps = int64_t(g.taps.size());
  const bool unit = g.step_h == 1 && g.step_w == 1;
  const bool one_to_one =
      taps == 1 && unit && g.taps[0].dy == 0 && g.taps[0].dx == 0 && g.grid_h == g.in_h && g.grid_w == g.in_w;
  f.runs = 1, f.taps_per_run = 1;
  f.channels = g.channels;
  cut_run(f, g.channels);
  // A few more tiles that end with the pixel cost less than a copy of the pixels.
  for (int64_t chunks = f.chunks; one_to_one && g.channels % 2 == 0 && chunks <= f.chunks + 2; ++chunks)
    if (g.channels / 2 % chunks == 0) {
      f.chunks = chunks, f.pairs = g.channels / 2 / chunks;
      break;
    }
  constexpr int64_t kNarrow = 8;  // positions in a row: below, tiles of one row would be too empty
  if (one_to_one && f.run_elements() == g.channels) {
    f.left = Left::direct;
  } else if (taps == 1 || g.grid_w < kNarrow) {
    f.left = Left::gathered;
    f.taps_per_run = taps;
    cut_run(f, taps * g.channels);
  } else {
    f.left = Left::padded;
    f.taps_per_run = side_by_side(g.taps);
    if (!choose_channels(f, g.channels)) {
      f.taps_per_run = 1;
      cut_run(f, g.channels);
      f.channels = f.run_elements();
    }
    f.runs = taps / f.taps_per_run;
    int64_t bottom = g.taps[0].dy, end = g.taps[0].dx;
    f.top = bottom, f.start = end;
    for (const Tap& tap : g.taps) {
      f.top = at_most(f.top, tap.dy), f.start = at_most(f.start, tap.dx);
      bottom = bottom > tap.dy ? bottom : tap.dy, end = end > tap.dx ? end : tap.dx;
    }
    f.rows = (g.grid_h - 1) * g.step_h + bottom - f.top + 1;
    f.columns = (g.grid_w - 1) * g.step_w + end - f.start + 1;
  }
  const bool flat = f.left != Left::padded;
  f.lines = flat ? 1 : g.batch * g.grid_h;
  f.width = flat ? g.batch * g.grid_h * g.grid_w : g.grid_w;
  f.tile_rows = f.width ? ceil_div(f.width, ceil_div(f.width, kTile)) : 0;
  return f;
}

inline int64_t left_elements(const Correlation& g, const Form& f) {
  if (f.left == Left::direct) return 0;
  if (f.left == Left::gathered) return f.width * f.run_elements();
  return g.batch * f.rows * f.columns * f.channels;
}

inline int64_t right_bytes(const Correlation& g, const Form& f) {
  return ceil_div(g.out_channels, kTile) * f.steps() * f.pairs * 64;
}

// Elements from the weight's start to input channel `c` of the active ones.
inline int64_t input_offset(const SlimConv2dWeight<const float>& w, int64_t c) {
  for (int64_t s = 0; s < w.num_segments; c -= w.segments[2 * s++ + 1])
    if (c < w.segments[2 * s + 1]) return (w.segments[2 * s] + c) * w.stride_in;
  return 0;
}

// A remainder's correlation of the input gradient: rows first_y, first_y + stride, ...
inline Correlation gradient_of_input(const SlimConv2dShape& s, int64_t stride_tap_h, int64_t stride_tap_w,
                                     int64_t first_y, int64_t first_x) {
  Correlation g{};
  g.batch = s.batch, g.in_h = s.out_h, g.in_w = s.out_w, g.channels = s.c_out, g.pixel = s.c_out;
  g.grid_h = ceil_div(s.in_h - first_y, s.stride_h), g.grid_w = ceil_div(s.in_w - first_x, s.stride_w);
  g.step_h = g.step_w = 1;
  g.out_channels = s.c_in, g.out_pixel = s.stride_w * s.c_in, g.out_row = s.stride_h * s.in_w * s.c_in;
  g.out_image = s.in_h * s.in_w * s.c_in, g.out_start = (first_y * s.in_w + first_x) * s.c_in;
  // Backwards, so that the pixels of neighbouring taps follow each other.
  for (int64_t kh = s.kernel_h - 1; kh >= 0; --kh)
    for (int64_t kw = s.kernel_w - 1; kw >= 0; --kw) {
      const int64_t y = first_y + s.pad_h - kh * s.dilation_h, x = first_x + s.pad_w - kw * s.dilation_w;
      if (y % s.stride_h == 0 && x % s.stride_w == 0)
        g.taps.push_back({y / s.stride_h, x / s.stride_w, kh * stride_tap_h + kw * stride_tap_w});
    }
  return g;
}

inline Correlation forward_of(const SlimConv2dShape& s, int64_t stride_tap_h, int64_t stride_tap_w) {
  Correlation g{};
  g.batch = s.batch, g.in_h = s.in_h, g.in_w = s.in_w, g.channels = s.c_in, g.pixel = s.x_pixel;
  g.grid_h = s.out_h, g.grid_w = s.out_w, g.step_h = s.stride_h, g.step_w = s.stride_w;
  g.out_channels = s.c_out, g.out_pixel = s.c_out, g.out_row = s.out_w * s.c_out;
  g.out_image = s.out_h * s.out_w * s.c_out;
  for (int64_t kh = 0; kh < s.kernel_h; ++kh)
    for (int64_t kw = 0; kw < s.kernel_w; ++kw)
      g.taps.push_back(
          {kh * s.dilation_h - s.pad_h, kw * s.dilation_w - s.pad_w, kh * stride_tap_h + kw * stride_tap_w});
  return g;
}

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA
#endif
