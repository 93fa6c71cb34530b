// Cuts slim_conv2d's float32 products into bands, panels and chunks that stay in the caches.
#include "slim_conv2d_f32_product.h"

#include "slim_conv2d_f32_tile.h"

namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32 {
namespace {

// k's of one pass over the positions: their weights (32 KiB with 64-byte vectors) stay in the L1 cache.
constexpr int64_t kChunk = 512;
constexpr int64_t kPositions = 1024;          // of a band, at most (at least a row)
constexpr int64_t kBandElements = 1 << 17;    // of its copy: a quarter of a 2 MiB L2 cache
constexpr int64_t kPackedElements = 1 << 19;  // more weights than that are packed chunk by chunk, where they are used

// The vectors of the output's channels in panels of nearly equal width.
struct Panel {
  int64_t first;  // vector
  int vectors;
};
int64_t panels_of(int64_t n) { return ceil_div(ceil_div(n, kL), kMaxVectors); }
Panel panel_of(int64_t n, int64_t i) {
  const int64_t vectors = ceil_div(n, kL), panels = panels_of(n), base = vectors / panels, wider = vectors % panels;
  return {i * base + min_of(i, wider), int(base + (i < wider))};
}

struct Class {
  Taps h, w;
  int64_t row0, column0, rows, columns;  // first pixel of the output, positions
};

int64_t greatest_divisor(int64_t a, int64_t b) { return b ? greatest_divisor(b, a % b) : a; }

// The taps that positions r, r + stride, ... of the input meet, nearest pixel of grad_y first.
Taps taps_of_remainder(int64_t r, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  int64_t first = 0;
  while (first < kernel && (r + pad - first * dilation) % stride != 0) ++first;
  if (first == kernel) return {};
  const int64_t divisor = greatest_divisor(stride, dilation), step = stride / divisor;
  const int64_t count = (kernel - 1 - first) / step + 1, last = first + (count - 1) * step;
  return {last, -step, count, (r + pad - last * dilation) / stride, dilation / divisor};
}

Class class_of(const Product& p, int64_t index) {
  const Shape& s = p.shape;
  if (!p.transposed)
    return {
        {0, 1, s.kernel_h, -s.pad_h, s.dilation_h}, {0, 1, s.kernel_w, -s.pad_w, s.dilation_w}, 0, 0, s.out_h, s.out_w};
  const int64_t h = index / s.stride_w, w = index % s.stride_w;
  return {taps_of_remainder(h, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h),
          taps_of_remainder(w, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w),
          h,
          w,
          max_of(0, ceil_div(s.in_h - h, s.stride_h)),
          max_of(0, ceil_div(s.in_w - w, s.stride_w))};
}
int64_t depth_of(const Product& p, const Class& c) { return c.h.count * c.w.count * p.grid.channels; }

// How the work is cut. Few weights: packed first, then bands of positions, each with its own copy of its pixels.
// Many: one copy of all pixels, then blocks of positions by panels of channels, each packing its weights.
struct Cut {
  bool packed_first, copied;
  int64_t packed, band_rows, bands, panels;
  int64_t depth;  // of all classes

  explicit Cut(const Product& p) : depth(0) {
    const Grid& g = p.grid;
    for (int64_t i = 0; i < p.classes(); ++i) depth += depth_of(p, class_of(p, i));
    packed = depth * round_up(p.n, kL);
    copied = g.padded();
    const int64_t rows = g.all_rows();
    packed_first = packed <= kPackedElements || rows * g.columns > 4 * kPositions;
    panels = panels_of(p.n);
    if (packed_first) {
      const int64_t row = max_of(1, g.step_h * g.width() * g.channels);
      const int64_t most = max_of(1, min_of(kPositions / g.columns, kBandElements / row));
      // At least 8 items, unless they had to be smaller than 192 positions; even, for two threads.
      const int64_t wanted = max_of(ceil_div(rows, most), min_of(8, rows * g.columns / 192));
      band_rows = ceil_div(rows, wanted > 1 ? round_up(wanted, 2) : 1);
    } else {
      const int64_t wanted = ceil_div(rows * g.columns, kPositions);
      band_rows = ceil_div(rows, panels % 2 ? round_up(wanted, 2) : wanted);
    }
    bands = ceil_div(rows, band_rows);
  }
};

// Memory of a thread: weights of a chunk, offsets of positions, a copy of pixels.
struct Lent {
  float* weight;
  int64_t *from, *to;
  float* copy;
  Lent(const Product& p, const Cut& cut) {
    const int64_t positions = round_up(cut.band_rows * p.grid.columns, 8);
    const int64_t copy_elements = cut.packed_first && cut.copied ? p.grid.copy_elements(cut.band_rows) : 0;
    char* at =
        static_cast<char*>(thread_memory((kChunk * kL + copy_elements) * int64_t(sizeof(float)) + 16 * positions));
    weight = reinterpret_cast<float*>(at);
    from = reinterpret_cast<int64_t*>(weight + kChunk * kL);
    to = from + positions;
    copy = reinterpret_cast<float*>(to + positions);
  }
};

// The pieces of k0 <= k < k1.
int64_t pieces_of(const Product& p, const Class& c, bool copied, int64_t k0, int64_t k1, Piece* pieces) {
  const Grid& g = p.grid;
  const int64_t pixel = copied ? g.channels : g.pixel;
  const bool joined = c.w.offset_step == 1 && pixel == g.channels;  // a row of taps is one stretch
  const int64_t length = joined ? c.w.count * g.channels : g.channels, in_row = joined ? 1 : c.w.count;
  int64_t count = 0;
  for (int64_t k = k0; k < k1;) {
    const int64_t run = k / length, skipped = k % length, part = min_of(length - skipped, k1 - k);
    pieces[count++] = {
        g.tap(c.h.offset + run / in_row * c.h.offset_step, c.w.offset + run % in_row * c.w.offset_step, copied) +
            skipped,
        part};
    k += part;
  }
  return count;
}

// Rows [begin, end) of positions of one class, for some panels. packed: (panel, k, channels), or null.
void compute_band(const Product& p, const Class& c, const Cut& cut, const Lent& lent, const float* image, int64_t base,
                  int64_t begin, int64_t end, const float* packed, int64_t first_panel, int64_t last_panel) {
  const Grid& g = p.grid;
  const Shape& s = p.shape;
  const int64_t out_h = p.transposed ? s.in_h : s.out_h, out_w = p.transposed ? s.in_w : s.out_w;
  const int64_t spread_h = p.transposed ? s.stride_h : 1, spread_w = p.transposed ? s.stride_w : 1;
  int64_t positions = 0;
  const int64_t step = g.step_w * (cut.copied ? g.channels : g.pixel);
  for_each_row(g, base, begin, end, cut.copied, [&](int64_t n, int64_t i, int64_t offset) {
    if (i >= c.rows) return;
    const int64_t to = ((n * out_h + c.row0 + i * spread_h) * out_w + c.column0) * p.n;
    for (int64_t j = 0; j < c.columns; ++j, ++positions) {
      lent.from[positions] = offset + j * step;
      lent.to[positions] = to + j * spread_w * p.n;
    }
  });
  const int64_t depth = depth_of(p, c);
  for (int64_t i = first_panel; i < last_panel; ++i) {
    const Panel panel = panel_of(p.n, i);
    const Kernel kernel = kernel_of(panel.vectors);
    const int64_t n0 = panel.first * kL;
    const int64_t chunks = max_of(1, ceil_div(depth, kChunk / panel.vectors)),
                  chunk = max_of(1, ceil_div(depth, chunks));
    Piece pieces[kChunk];
    Tile tile;
    tile.image = image;
    tile.pieces = pieces;
    tile.out = p.out + n0;
    tile.tail = int(min_of(kL, p.n - n0 - (panel.vectors - 1) * kL));
    for (int64_t k0 = 0; k0 < max_of(1, depth); k0 += chunk) {
      const int64_t k1 = min_of(depth, k0 + chunk);
      tile.num_pieces = pieces_of(p, c, cut.copied, k0, k1, pieces);
      tile.add = k0 > 0 || p.add;
      tile.bias = k0 == 0 && p.bias ? p.bias + n0 : nullptr;
      tile.weight = packed ? packed + panel.first * kL * depth + k0 * panel.vectors * kL : lent.weight;
      if (!packed) pack_product_weight(p, c.h, c.w, k0, k1, n0, panel.vectors * kL, lent.weight);
      for (int64_t at = 0; at < positions; at += kernel.positions) {
        tile.from = lent.from + at;
        tile.to = lent.to + at;
        tile.count = int(min_of(kernel.positions, positions - at));
        kernel.run(tile);
      }
    }
  }
}

}  // namespace

Product::Product(const Shape& s, bool is_transposed) : shape(s), transposed(is_transposed) {
  grid.batch = s.batch;
  if (!transposed) {
    n = s.c_out;
    grid.in_h = s.in_h, grid.in_w = s.in_w, grid.pixel = s.x_pixel, grid.channels = s.c_in;
    grid.rows = s.out_h, grid.columns = s.out_w, grid.step_h = s.stride_h, grid.step_w = s.stride_w;
  } else {
    n = s.c_in;
    grid.in_h = s.out_h, grid.in_w = s.out_w, grid.pixel = grid.channels = s.c_out;
    grid.rows = ceil_div(s.in_h, s.stride_h), grid.columns = ceil_div(s.in_w, s.stride_w);
    grid.step_h = grid.step_w = 1;
  }
  grid.row = grid.in_w * grid.pixel, grid.image_size = grid.in_h * grid.row;
  if (!transposed && s.kernel_h * s.kernel_w == 1 && s.pad_h + s.pad_w == 0) {
    // Of the image, only the pixels that are read, so that copies hold no others.
    grid.pixel *= s.stride_w, grid.row *= s.stride_h;
    grid.in_h = s.out_h, grid.in_w = s.out_w, grid.step_h = grid.step_w = 1;
  }
  bool any = false;
  for (int64_t i = 0; i < classes(); ++i) {
    const Class c = class_of(*this, i);
    if (depth_of(*this, c) == 0 || c.rows == 0 || c.columns == 0) continue;
    grid.low_h = any ? min_of(grid.low_h, c.h.offset) : c.h.offset;
    grid.low_w = any ? min_of(grid.low_w, c.w.offset) : c.w.offset;
    grid.high_h = any ? max_of(grid.high_h, c.h.last_offset()) : c.h.last_offset();
    grid.high_w = any ? max_of(grid.high_w, c.w.last_offset()) : c.w.last_offset();
    any = true;
  }
  grid.copy_pixel = grid.channels;
  if (!any) grid.low_h = grid.low_w = grid.high_h = grid.high_w = 0;
}

int64_t product_scratch_bytes(const Product& p) {
  const Cut cut(p);
  const int64_t copy = cut.packed_first || !cut.copied ? 0 : p.grid.copy_elements(p.grid.all_rows());
  return ((cut.packed_first ? cut.packed : 0) + copy) * int64_t(sizeof(float));
}

void run_product(const Product& p, void* scratch, const SlimConv2dParallel& parallel) {
  const Grid& g = p.grid;
  const Cut cut(p);
  const int64_t image_elements = g.height(g.rows) * g.width() * g.channels;
  float* const memory = static_cast<float*>(scratch);
  if (cut.packed_first) {
    // Items: the chunks of every panel of every class would be uneven; the taps' channels are even enough.
    parallel_items(parallel, p.classes() * cut.panels, [&](int64_t item) {
      int64_t before = 0;
      for (int64_t i = 0; i < item / cut.panels; ++i) before += depth_of(p, class_of(p, i));
      const Class c = class_of(p, item / cut.panels);
      const Panel panel = panel_of(p.n, item % cut.panels);
      const int64_t depth = depth_of(p, c);
      pack_product_weight(p, c.h, c.w, 0, depth, panel.first * kL, panel.vectors * kL,
                          memory + before * round_up(p.n, kL) + panel.first * kL * depth);
    });
    parallel_items(parallel, cut.bands, [&](int64_t item) {
      const Lent lent(p, cut);
      const int64_t begin = item * cut.band_rows, end = min_of(begin + cut.band_rows, g.all_rows());
      if (cut.copied) copy_band(g, begin, end, lent.copy);
      const float* packed = memory;
      for (int64_t i = 0; i < p.classes(); ++i) {
        const Class c = class_of(p, i);
        compute_band(p, c, cut, lent, cut.copied ? lent.copy : g.image, begin, begin, end, packed, 0, cut.panels);
        packed += depth_of(p, c) * round_up(p.n, kL);
      }
    });
    return;
  }
  if (cut.copied)
    parallel_items(parallel, g.batch,
                   [&](int64_t n) { copy_rows(g, n, g.low_h, g.height(g.rows), memory + n * image_elements); });
  parallel_items(parallel, cut.panels * cut.bands, [&](int64_t item) {
    const Lent lent(p, cut);
    const int64_t panel = item / cut.bands, begin = item % cut.bands * cut.band_rows;
    for (int64_t i = 0; i < p.classes(); ++i)
      compute_band(p, class_of(p, i), cut, lent, cut.copied ? memory : g.image, 0, begin,
                   min_of(begin + cut.band_rows, g.all_rows()), nullptr, panel, panel + 1);
  });
}

}  // namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32
