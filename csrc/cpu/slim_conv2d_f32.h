// What the float32 convolutions share: how image pixels are read, memory of a thread, work on threads.
#pragma once
#include "fastslim/slim_conv2d.h"
#include "vec.h"

#define FASTSLIM_ALWAYS_INLINE inline __attribute__((always_inline))

namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32 {

// At least `bytes` bytes aligned to 64, kept until the thread asks for more or ends.
void* thread_memory(int64_t bytes);

using Shape = SlimConv2dShape;

int64_t backward_weight_scratch_bytes(const Shape&);
void backward_weight(const float* grad_y, const float* x, const SlimConv2dWeight<float>& grad_weight, bool add,
                     const Shape&, void* scratch, const SlimConv2dParallel&);

namespace {

constexpr int kL = kLanes<float>;
#if FASTSLIM_VECTOR_BYTES == 64
constexpr int kMaxVectors = 4;  // of the channels in one tile: 32 registers
#else
constexpr int kMaxVectors = 2;  // 16 registers
#endif

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

template <class Body> void parallel_items(const SlimConv2dParallel& parallel, int64_t items, const Body& body) {
  parallel.run(items, const_cast<Body*>(&body), [](void* context, int64_t begin, int64_t end) {
    const Body& run = *static_cast<const Body*>(context);
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

}  // namespace

// The kernel's taps along one dimension that meet a row (or column) of positions: taps first, first + step, ...;
// position i meets pixel i * stride + offset, + offset_step for every further tap.
struct Taps {
  int64_t first, step, count, offset, offset_step;
  int64_t last_offset() const { return offset + (count - 1) * offset_step; }
};

// A grid of positions in every image, and the pixels that taps with offsets low..high read from there:
// (i * step_h + dh, j * step_w + dw). Pixels beyond the image are zero.
struct Grid {
  const float* image;
  int64_t batch, in_h, in_w, channels;
  int64_t pixel, row, image_size;  // elements from one pixel, row and image to the next
  int64_t rows, columns, step_h, step_w;
  int64_t low_h, low_w, high_h, high_w;
  int64_t copy_pixel;  // elements from one pixel of a copy to the next

  int64_t all_rows() const { return batch * rows; }
  // Whether a copy with zeros around is needed.
  bool padded() const {
    return low_h < 0 || low_w < 0 || (rows - 1) * step_h + high_h >= in_h || (columns - 1) * step_w + high_w >= in_w;
  }
  int64_t width() const { return (columns - 1) * step_w + high_w - low_w + 1; }
  int64_t height(int64_t n) const { return (n - 1) * step_h + high_h - low_h + 1; }
  // Of a tap, to be added to a position's offset in the image, or in a copy.
  int64_t tap(int64_t dh, int64_t dw, bool copied) const {
    return copied ? ((dh - low_h) * width() + dw - low_w) * copy_pixel : dh * row + dw * pixel;
  }
  // Elements of a copy for `n` rows of positions, a vector too many that may be read among them.
  int64_t copy_elements(int64_t n) const {
    const int64_t parts = n <= 1 ? n : min_of(n, (n - 2) / rows + 2);  // images they may lie in
    return ((n - parts) * step_h + parts * max_of(step_h, height(1))) * width() * copy_pixel + kL * kMaxVectors;
  }
};

// A stretch of consecutive floats from a position's offset on.
struct Piece {
  int64_t offset, length;
};

namespace {

// Copies `count` floats; memcpy's call costs more than a short copy.
FASTSLIM_ALWAYS_INLINE void copy_floats(float* to, const float* from, int64_t count) {
  if (count >= 256) {
    std::memcpy(to, from, size_t(count) * sizeof(float));
    return;
  }
  int64_t i = 0;
  for (; i + kL <= count; i += kL) store(to + i, load(from + i));
  if (i < count) store_n(to + i, load_n(from + i, int(count - i)), int(count - i));
}

// Rows first_row.. of an image with zeros around, `height` of them.
inline void copy_rows(const Grid& g, int64_t n, int64_t first_row, int64_t height, float* to) {
  const int64_t width = g.width(), pixel = g.copy_pixel;
  const int64_t left = min_of(width, max_of(0, -g.low_w)), first = max_of(0, g.low_w);
  const int64_t inside = max_of(0, min_of(width - left, g.in_w - first));
  for (int64_t r = 0; r < height; ++r, to += width * pixel) {
    const int64_t ih = first_row + r;
    if (ih < 0 || ih >= g.in_h) {
      std::memset(to, 0, size_t(width * pixel) * sizeof(float));
      continue;
    }
    const float* from = g.image + n * g.image_size + ih * g.row + first * g.pixel;
    std::memset(to, 0, size_t(left * pixel) * sizeof(float));
    if (g.pixel == pixel && g.channels == pixel)
      copy_floats(to + left * pixel, from, inside * pixel);
    else
      for (int64_t j = 0; j < inside; ++j) copy_floats(to + (left + j) * pixel, from + j * g.pixel, g.channels);
    std::memset(to + (left + inside) * pixel, 0, size_t((width - left - inside) * pixel) * sizeof(float));
  }
}

// Copies what rows [begin, end) of positions read (rows of all images counted on) to `to`.
inline void copy_band(const Grid& g, int64_t begin, int64_t end, float* to) {
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / g.rows, first = row % g.rows, count = min_of(end - row, g.rows - first);
    copy_rows(g, n, first * g.step_h + g.low_h, g.height(count), to);
    to += g.height(count) * g.width() * g.copy_pixel;
    row += count;
  }
}

// Calls body(image, row in the image, offset of the row's first position) for rows [begin, end); copied: as
// copy_band laid them out from row `base` on.
template <class Body>
void for_each_row(const Grid& g, int64_t base, int64_t begin, int64_t end, bool copied, const Body& body) {
  int64_t start = 0;
  for (int64_t row = base; row < end;) {
    const int64_t n = row / g.rows, first = row % g.rows;
    // A copy of a whole batch holds whole images.
    const int64_t count = min_of(end - row, g.rows - first);
    for (int64_t i = max_of(0, begin - row); i < count; ++i)
      body(
          n, first + i,
          copied ? start + i * g.step_h * g.width() * g.copy_pixel : n * g.image_size + (first + i) * g.step_h * g.row);
    start += g.height(count) * g.width() * g.copy_pixel;
    row += count;
  }
}

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32
