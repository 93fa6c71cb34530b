// bfloat16 convolution, gradient of the weight, as products of AMX tiles: the sum runs over pairs of output positions.
//   left:  grad_y transposed, rows of output channels;  right: pairs of x's pixels, as every column of the kernel sees
//   them;  sums: 16 output channels x 16 input channels, held in registers over a group of images.
#include "slim_conv2d_bf16.h"

#ifdef FASTSLIM_AMX
namespace fastslim::FASTSLIM_ISA {
namespace {

constexpr int64_t kFewChannels = 16;      // below, a kernel's columns share a tile
constexpr int64_t kMostColumns = 64;      // of such a kernel
constexpr int64_t kFlatPixels = 512;      // of a 1x1 kernel's "image", at most
constexpr int64_t kGroupBytes = 3 << 19;  // packed operands that stay in the L2 cache

struct WeightForm {
  SlimConv2dShape s;                  // a 1x1 kernel that takes every pixel once sees images of one row
  int64_t all_pixels;                 // of x and grad_y, if flat; else 0
  bool merged;                        // a lane is (column of the kernel, channel) rather than a channel
  int64_t lanes;                      // of a right operand
  int64_t variants;                   // right operands: columns of the kernel, or 1
  int64_t taps;                       // variants x rows of the kernel
  int64_t row_pairs;                  // pairs of positions in a row, filled up with zeros
  int64_t pairs, chunks;              // of a tile, and tiles of an image
  int64_t x_rows;                     // rows of a packed image of one remainder of the stride
  int64_t remainders;                 // of the rows, by the stride
  int64_t images, groups;             // of a group, and groups
  int64_t left_blocks, right_blocks;  // of 16 channels or lanes
  int64_t left_elements() const { return left_blocks * kTile * images * row_pairs * s.out_h * 2; }
  int64_t right_image() const { return remainders * x_rows * row_pairs; }  // in rows of 64 bytes, of one block
  int64_t right_rows() const { return variants * right_blocks * images * right_image(); }
  int64_t units() const { return ceil_div(left_blocks, 2) * ceil_div(right_blocks, 2) * taps; }
};

inline WeightForm make_weight_form(const SlimConv2dShape& shape) {
  WeightForm f{};
  f.s = shape;
  SlimConv2dShape& s = f.s;
  if (s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && !s.pad_h && !s.pad_w) {
    f.all_pixels = s.batch * s.in_h * s.in_w;
    s.in_h = s.out_h = 1, s.in_w = s.out_w = at_most(kFlatPixels, round_up(f.all_pixels, 2 * kTile));
    s.batch = s.out_w ? ceil_div(f.all_pixels, s.out_w) : 0;
  }
  f.merged = s.c_in < kFewChannels && s.kernel_w > 1 && s.kernel_w <= kMostColumns;
  f.lanes = f.merged ? s.kernel_w * s.c_in : s.c_in;
  f.variants = f.merged ? 1 : s.kernel_w;
  f.taps = f.variants * s.kernel_h;
  f.left_blocks = ceil_div(s.c_out, kTile), f.right_blocks = ceil_div(f.lanes, kTile);
  // Tiles must end where an image ends; rows may be filled up for that.
  const int64_t least = ceil_div(s.out_w, 2);
  for (int64_t row = least; row <= least + 8; ++row)
    for (int64_t pairs = kTile; pairs > 0; --pairs)
      if (row * s.out_h % pairs == 0 && (!f.pairs || pairs * f.row_pairs > f.pairs * row))
        f.pairs = pairs, f.row_pairs = row;
  f.chunks = f.row_pairs * s.out_h / f.pairs;
  f.remainders = at_most(s.stride_h, (s.kernel_h - 1) * s.dilation_h + 1);
  f.x_rows = s.out_h + (s.kernel_h - 1) * s.dilation_h / s.stride_h + 1;
  const int64_t image_bytes =
      (f.left_blocks * s.out_h + f.variants * f.right_blocks * f.remainders * f.x_rows) * f.row_pairs * 64;
  f.images = at_most(s.batch, 1 + kGroupBytes / (image_bytes + 1));
  f.groups = f.images ? ceil_div(s.batch, f.images) : 0;
  return f;
}

struct WeightMemory {
  bfloat16* left;
  char* right;
  float* sums;  // of every unit, where they outlive a group
  int64_t bytes;
};

inline WeightMemory weight_memory(const WeightForm& f, void* scratch) {
  Arena arena(scratch);
  WeightMemory m{};
  m.left = arena.take<bfloat16>(f.left_elements());
  m.right = arena.take<char>(f.right_rows() * 64);
  m.sums = arena.take<float>(f.groups > 1 ? f.units() * 4 * kTile * kTile : 0);
  m.bytes = arena.used();
  return m;
}

// Transposes a row of positions of one block of 16 output channels.
FASTSLIM_TARGET_AMX void pack_left_row(const bfloat16* grad, const WeightForm& f, int64_t image, int64_t n,
                                       int64_t block, int64_t row, bfloat16* left) {
  const SlimConv2dShape& s = f.s;
  const int64_t first = (n * s.out_h + row) * s.out_w, count = at_most(s.c_out - block * kTile, kTile);
  const int64_t real = f.all_pixels ? at_most(f.all_pixels - first, s.out_w) : s.out_w;
  const __mmask16 mask = __mmask16((1u << count) - 1);
  const int64_t stride = f.images * f.row_pairs * s.out_h * 2;  // from a channel to the next
  bfloat16* to = left + block * kTile * stride + (image * s.out_h + row) * f.row_pairs * 2;
  const bfloat16* from = grad + first * s.c_out + block * kTile;
  for (int64_t pair = 0; pair < f.row_pairs; pair += kTile) {
    __m512i rows[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t p = 2 * (pair + i);
      const __m256i zero = _mm256_setzero_si256();
      const __m256i a = p < real ? _mm256_maskz_loadu_epi16(mask, from + p * s.c_out) : zero;
      const __m256i b = p + 1 < real ? _mm256_maskz_loadu_epi16(mask, from + (p + 1) * s.c_out) : zero;
      rows[i] = interleave(a, b);
    }
    transpose(rows);
    const __mmask16 write = __mmask16((1u << at_most(f.row_pairs - pair, kTile)) - 1);
    for (int64_t c = 0; c < kTile; ++c) _mm512_mask_storeu_epi32(to + c * stride + 2 * pair, write, rows[c]);
  }
}

// One row of x as a column `variant` of the kernel sees it, every block of lanes.
FASTSLIM_TARGET_AMX void pack_right_row(const bfloat16* x, const WeightForm& f, int64_t image, int64_t n,
                                        int64_t variant, int64_t row, char* right) {
  const SlimConv2dShape& s = f.s;
  // Rows of one remainder follow each other, so that the rows a kernel row meets do.
  const int64_t y = row / f.x_rows + row % f.x_rows * s.stride_h - s.pad_h;
  const bool inside = y >= 0 && y < s.in_h;
  const int64_t first = (n * s.in_h + y) * s.in_w;
  const int64_t block_rows = f.images * f.right_image();
  char* to = right + ((variant * f.right_blocks * f.images + image) * f.right_image() + row * f.row_pairs) * 64;
  const auto pixel = [&](int64_t position, int64_t column) -> const bfloat16* {
    const int64_t at = position * s.stride_w + column * s.dilation_w - s.pad_w;
    if (!inside || position >= s.out_w || at < 0 || at >= s.in_w) return nullptr;
    if (f.all_pixels && first + at >= f.all_pixels) return nullptr;
    return x + (first + at) * s.x_pixel;
  };
  for (int64_t pair = 0; pair < f.row_pairs; ++pair, to += 64) {
    if (f.merged) {
      bfloat16 lanes[2][(kFewChannels - 1) * kMostColumns + 2 * kTile];
      for (int64_t half = 0; half < 2; ++half) {
        std::memset(lanes[half], 0, size_t(f.right_blocks * kTile) * 2);
        for (int64_t column = 0; column < s.kernel_w; ++column)
          if (const bfloat16* from = pixel(2 * pair + half, column))
            std::memcpy(lanes[half] + column * s.c_in, from, size_t(s.c_in) * 2);
      }
      for (int64_t block = 0; block < f.right_blocks; ++block)
        _mm512_storeu_si512(to + block * block_rows * 64,
                            interleave(_mm256_loadu_si256((const __m256i*)(lanes[0] + block * kTile)),
                                       _mm256_loadu_si256((const __m256i*)(lanes[1] + block * kTile))));
      continue;
    }
    const bfloat16 *a = pixel(2 * pair, variant), *b = pixel(2 * pair + 1, variant);
    for (int64_t block = 0; block < f.right_blocks; ++block) {
      const __mmask16 mask = __mmask16((1u << at_most(s.c_in - block * kTile, kTile)) - 1);
      const __m256i zero = _mm256_setzero_si256();
      _mm512_storeu_si512(to + block * block_rows * 64,
                          interleave(a ? _mm256_maskz_loadu_epi16(mask, a + block * kTile) : zero,
                                     b ? _mm256_maskz_loadu_epi16(mask, b + block * kTile) : zero));
    }
  }
}

// The sums of a unit over a group's images: up to 2 x 2 tiles, of `lefts` and `rights` blocks.
template <int kLefts, int kRights>
FASTSLIM_TARGET_AMX void sum_unit(const char* left, int64_t left_block, int64_t left_row, const char* right,
                                  int64_t right_block, int64_t left_image, int64_t right_image, int64_t images,
                                  int64_t chunks, int64_t pairs, float* sums, bool first) {
  if (first) {
    _tile_zero(0);
    if (kRights == 2) _tile_zero(1);
    if (kLefts == 2) _tile_zero(2);
    if (kLefts == 2 && kRights == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    if (kRights == 2) _tile_loadd(1, sums + 256, 64);
    if (kLefts == 2) _tile_loadd(2, sums + 512, 64);
    if (kLefts == 2 && kRights == 2) _tile_loadd(3, sums + 768, 64);
  }
  for (int64_t image = 0; image < images; ++image) {
    const char *a = left + image * left_image, *b = right + image * right_image;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, a += pairs * 4, b += pairs * 64) {
      _tile_loadd(4, a, left_row);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (kRights == 2) {
        _tile_loadd(7, b + right_block, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (kLefts == 2) {
        _tile_loadd(5, a + left_block, left_row);
        _tile_dpbf16ps(2, 5, 6);
        if (kRights == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 64);
  if (kRights == 2) _tile_stored(1, sums + 256, 64);
  if (kLefts == 2) _tile_stored(2, sums + 512, 64);
  if (kLefts == 2 && kRights == 2) _tile_stored(3, sums + 768, 64);
  memory_fence();
}

struct GradientWriter {
  const SlimConv2dWeight<float>* grad;
  bool add;
  const WeightForm* f;

  // Elements from the gradient's start to a lane, for a row of the kernel.
  int64_t lane_offset(int64_t lane, int64_t variant, int64_t kernel_row) const {
    int64_t c = f->merged ? lane % f->s.c_in : lane;
    const int64_t column = f->merged ? lane / f->s.c_in : variant;
    const int64_t tap = kernel_row * grad->stride_h + column * grad->stride_w;
    for (int64_t i = 0; i < grad->num_segments; c -= grad->segments[2 * i++ + 1])
      if (c < grad->segments[2 * i + 1]) return tap + (grad->segments[2 * i] + c) * grad->stride_in;
    return tap;
  }

  FASTSLIM_TARGET_AMX void write(const float* sums, int64_t left_block, int64_t right_block, int64_t variant,
                                 int64_t kernel_row) const {
    const int64_t rows = at_most(f->s.c_out - left_block * kTile, kTile);
    const int64_t lanes = at_most(f->lanes - right_block * kTile, kTile);
    int64_t offsets[16];
    offsets[0] = lane_offset(right_block * kTile, variant, kernel_row);
    bool together = !f->merged && grad->num_segments == 1 && grad->stride_in == 1;
    if (!together) {
      together = true;
      for (int64_t i = 1; i < lanes; ++i) {
        offsets[i] = lane_offset(right_block * kTile + i, variant, kernel_row);
        together &= offsets[i] == offsets[0] + i;
      }
    }
    const __mmask16 mask = __mmask16((1u << lanes) - 1);
    for (int64_t r = 0; r < rows; ++r, sums += 16) {
      float* to = grad->data + (left_block * kTile + r) * grad->stride_out;
      if (together) {
        __m512 v = _mm512_loadu_ps(sums);
        if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, to + offsets[0]));
        _mm512_mask_storeu_ps(to + offsets[0], mask, v);
      } else {
        for (int64_t i = 0; i < lanes; ++i) to[offsets[i]] = add ? to[offsets[i]] + sums[i] : sums[i];
      }
    }
  }
};

void clear(const WeightForm& f, const GradientWriter& writer) {  // an empty batch
  const float zeros[256] = {};
  if (writer.add) return;
  for (int64_t left = 0; left < f.left_blocks; ++left)
    for (int64_t right = 0; right < f.right_blocks; ++right)
      for (int64_t tap = 0; tap < f.taps; ++tap) writer.write(zeros, left, right, tap % f.variants, tap / f.variants);
}

}  // namespace

int64_t conv_bf16_backward_weight_scratch(const SlimConv2dShape& s) {
  return weight_memory(make_weight_form(s), nullptr).bytes;
}

void conv_bf16_backward_weight(const bfloat16* grad_y, const bfloat16* x, const SlimConv2dWeight<float>& grad_weight,
                               bool add, const SlimConv2dShape& shape, void* scratch,
                               const SlimConv2dParallel& parallel) {
  const WeightForm f = make_weight_form(shape);
  const SlimConv2dShape& s = f.s;
  const GradientWriter writer{&grad_weight, add, &f};
  if (!s.batch) return clear(f, writer);
  const WeightMemory m = weight_memory(f, scratch);
  const int64_t left_rows = f.left_blocks * s.out_h, right_rows = f.variants * f.remainders * f.x_rows;
  const int64_t left_row = f.images * f.row_pairs * s.out_h * 4, right_pairs = ceil_div(f.right_blocks, 2);
  const int64_t right_block = f.images * f.right_image() * 64;
  const TileConfig config(kTile, int(f.pairs));
  for (int64_t group = 0; group < f.groups; ++group) {
    const int64_t first = group * f.images, images = at_most(s.batch - first, f.images);
    // Two loops: threads take halves of the items, which must weigh the same.
    for_items(parallel, images * left_rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / left_rows, part = i % left_rows;
        pack_left_row(grad_y, f, image, first + image, part % f.left_blocks, part / f.left_blocks, m.left);
      }
    });
    for_items(parallel, images * right_rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / right_rows, part = i % right_rows, rows = f.remainders * f.x_rows;
        pack_right_row(x, f, image, first + image, part / rows, part % rows, m.right);
      }
    });
    for_items(parallel, f.units(), [&](int64_t begin, int64_t end) {
      load_config(config);
      alignas(64) float own[4 * kTile * kTile];
      for (int64_t unit = begin; unit < end; ++unit) {
        // In the order in which the gradient lies in memory.
        const int64_t r = unit % right_pairs * 2, tap = unit / right_pairs % f.taps,
                      l = unit / right_pairs / f.taps * 2;
        const int64_t variant = tap % f.variants, kernel_row = tap / f.variants, offset = kernel_row * s.dilation_h;
        const int64_t lefts = at_most(f.left_blocks - l, 2), rights = at_most(f.right_blocks - r, 2);
        const int64_t row = offset % s.stride_h * f.x_rows + offset / s.stride_h;
        float* sums = f.groups > 1 ? m.sums + unit * 4 * kTile * kTile : own;
        const char* left = reinterpret_cast<const char*>(m.left) + l * kTile * left_row;
        const char* right = m.right + (variant * f.right_blocks + r) * right_block + row * f.row_pairs * 64;
        auto* sum = lefts == 2    ? rights == 2 ? sum_unit<2, 2> : sum_unit<2, 1>
                    : rights == 2 ? sum_unit<1, 2>
                                  : sum_unit<1, 1>;
        sum(left, kTile * left_row, left_row, right, right_block, f.row_pairs * s.out_h * 4, f.right_image() * 64,
            images, f.chunks, f.pairs, sums, group == 0);
        if (group + 1 < f.groups) continue;
        for (int64_t i = 0; i < lefts; ++i)
          for (int64_t j = 0; j < rights; ++j)
            writer.write(sums + (2 * i + j) * 256, l + i, r + j, variant, kernel_row);
      }
      release_tiles();
    });
  }
}

}  // namespace fastslim::FASTSLIM_ISA
#endif
