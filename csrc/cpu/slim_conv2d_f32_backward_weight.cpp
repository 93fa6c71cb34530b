// slim_conv2d's gradient of the weight in float32:
//   grad_weight[o, kh, kw, i] = sum over positions of grad_y[position, o] * x[position + tap, i].
// One side's channels fill vectors, the other's are broadcast; a block of 64 broadcast by up to 4 vectors of sums stays
// in the L1 cache while the positions pass.
#include "slim_conv2d_f32_product.h"
#include "slim_conv2d_f32_sums.h"

namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32 {
namespace {

constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockElements = kBlockRows * kMaxVectors * kL;
constexpr int64_t kPass = 64;                  // positions between loads and stores of the sums
constexpr int64_t kChunkPositions = 512;       // summed apart from others
constexpr int64_t kPartialElements = 1 << 22;  // of all chunks' sums: 16 MiB

// Channels that lie side by side, in panels of up to kMaxVectors vectors of nearly equal width.
struct Side {
  int64_t runs, length;  // stretches, floats in each
  int64_t panels() const { return runs * panels_of_run(); }
  int64_t vectors_of_run() const { return ceil_div(length, kL); }
  int64_t panels_of_run() const { return ceil_div(vectors_of_run(), kMaxVectors); }
  int64_t blocks_of_run() const { return ceil_div(length, kBlockRows); }
  int64_t blocks() const { return runs * blocks_of_run(); }
};
struct Stretch {
  int64_t run, first, count;  // floats of a run
  int64_t start(const Side& side) const { return run * side.length + first; }
};
Stretch panel_of(const Side& side, int64_t i) {
  const int64_t panels = side.panels_of_run(), run = i / panels, k = i % panels;
  const int64_t base = side.vectors_of_run() / panels, wider = side.vectors_of_run() % panels;
  const int64_t first = (k * base + min_of(k, wider)) * kL;
  return {run, first, min_of(side.length - first, (base + (k < wider)) * kL)};
}
Stretch block_of(const Side& side, int64_t i) {
  const int64_t blocks = side.blocks_of_run(), size = ceil_div(side.length, blocks), first = i % blocks * size;
  return {i / blocks, first, min_of(size, side.length - first)};
}

// How the work is cut. Many positions: chunks of them, each with its sums, which are added in order.
// Few: one copy of x, then blocks of the gradient.
struct Plan {
  Grid grid;
  bool copied, swapped;  // swapped: grad_y fills the vectors
  Side x, y;
  int64_t y_pixel;  // elements from one position of grad_y, or its copy, to the next
  int64_t positions, chunks, chunk_rows;

  explicit Plan(const Shape& s) : grid(Product(s, false).grid), copied(grid.padded()) {
    // Pixels at powers of two would share a few sets of the caches.
    copied = copied || (spread(grid.pixel) && grid.step_w == 1);
    if (spread(s.c_in)) grid.copy_pixel = s.c_in + kL;
    y_pixel = spread(s.c_out) ? s.c_out + kL : s.c_out;
    const bool joined = s.dilation_w == 1 && (copied ? grid.copy_pixel : grid.pixel) == grid.channels;
    x = joined ? Side{s.kernel_h, s.kernel_w * s.c_in} : Side{s.kernel_h * s.kernel_w, s.c_in};
    y = {1, s.c_out};
    swapped = cost(x, y) < cost(y, x);
    positions = grid.all_rows() * grid.columns;
    chunks = min_of(64, min_of(positions / kChunkPositions, kPartialElements / (blocks() * kBlockElements)));
    if (chunks > 8)
      chunks -= chunks % 8;
    else if (chunks > 1)
      chunks += chunks % 2;
    if (chunks < 2) chunks = 1;
    chunk_rows = ceil_div(grid.all_rows(), chunks);
    chunks = ceil_div(grid.all_rows(), chunk_rows);
  }
  static bool spread(int64_t channels) { return channels % 128 == 0; }
  bool y_copied(const Shape& s) const { return y_pixel != s.c_out; }
  const Side& rows() const { return swapped ? x : y; }
  const Side& vectors() const { return swapped ? y : x; }
  int64_t blocks() const { return rows().blocks() * vectors().panels(); }

  static int64_t cost(const Side& rows, const Side& vectors) {
    int64_t total = 0;
    for (int64_t i = 0; i < vectors.panels_of_run(); ++i) {
      const int width = int(ceil_div(panel_of(vectors, i).count, kL));
      for (int64_t k = 0; k < rows.blocks_of_run(); ++k) total += choose(block_of(rows, k).count, width).cost;
    }
    return total * vectors.runs * rows.runs;
  }

  // Of a run of x, to be added to a position's offset.
  int64_t run_offset(const Shape& s, int64_t run) const {
    const int64_t in_row = x.runs / s.kernel_h;
    return grid.tap(grid.low_h + run / in_row * s.dilation_h, grid.low_w + run % in_row * s.dilation_w, copied);
  }
};

struct Operands {
  const float *x, *y;
  const int64_t *x_at, *y_at;  // offsets of the positions
  int64_t positions;
};

// The sums of one block: rows of one side by a panel of the other.
void compute_block(const Plan& plan, const Shape& s, const Operands& in, Stretch rows, Stretch panel, float* sums) {
  const int vectors = int(ceil_div(panel.count, kL)), tail = int(panel.count - (vectors - 1) * kL);
  const Choice choice = choose(rows.count, vectors);
  const Stretch &of_x = plan.swapped ? rows : panel, &of_y = plan.swapped ? panel : rows;
  const float* x = in.x + plan.run_offset(s, of_x.run) + of_x.first;
  const float* y = in.y + of_y.first;
  for (int64_t p = 0; p < in.positions; p += kPass) {
    Tile tile;
    tile.broadcast_at = (plan.swapped ? in.x_at : in.y_at) + p;
    tile.vectors_at = (plan.swapped ? in.y_at : in.x_at) + p;
    tile.vectors = plan.swapped ? y : x;
    tile.positions = min_of(kPass, in.positions - p);
    tile.add = p > 0;
    tile.tail = tail;
    for (int64_t r = 0; r < rows.count; r += choice.most.rows) {
      const Kernel& kernel = r < choice.whole ? choice.most : choice.rest;
      // The last tile may compute rows of the one before again, into a place of its own.
      tile.broadcast = (plan.swapped ? x : y) + min_of(r, rows.count - kernel.rows);
      tile.sums = sums + r * vectors * kL;
      (tail < kL ? kernel.part : kernel.whole)(tile);
    }
  }
}

// Adds, or writes, a block of sums to the full-size gradient.
void scatter_block(const Plan& plan, const Shape& s, const SlimConv2dWeight<float>& grad, bool add, Stretch rows,
                   Stretch panel, const float* sums) {
  const int64_t width = round_up(panel.count, kL);
  const Choice choice = choose(rows.count, int(width / kL));
  const auto row_of = [&](int64_t r) {  // rows of the last tile come after those it has computed again
    return sums + (r < choice.whole ? r : choice.whole + choice.rest.rows - (rows.count - r)) * width;
  };
  const Stretch &of_x = plan.swapped ? rows : panel, &of_y = plan.swapped ? panel : rows;
  const int64_t start = of_x.start(plan.x), end = start + of_x.count;
  // Channels of x from `start` on by taps and segments; each part lies side by side in the gradient.
  for (int64_t k = start; k < end;) {
    const int64_t tap = k / s.c_in, channel = k % s.c_in;
    int64_t segment = 0, before = 0;
    while (channel >= before + grad.segments[2 * segment + 1]) before += grad.segments[2 * segment++ + 1];
    const int64_t count = min_of(end - k, before + grad.segments[2 * segment + 1] - channel);
    float* to = grad.data + (grad.segments[2 * segment] + channel - before) * grad.stride_in +
                tap / s.kernel_w * grad.stride_h + tap % s.kernel_w * grad.stride_w + of_y.first * grad.stride_out;
    for (int64_t r = 0; r < of_y.count; ++r, to += grad.stride_out) {
      if (plan.swapped) {
        for (int64_t i = 0; i < count; ++i) {
          const float value = row_of(k - start + i)[r];
          to[i * grad.stride_in] = add ? to[i * grad.stride_in] + value : value;
        }
        continue;
      }
      const float* from = row_of(r) + k - start;
      if (grad.stride_in != 1) {
        for (int64_t i = 0; i < count; ++i) to[i * grad.stride_in] = add ? to[i * grad.stride_in] + from[i] : from[i];
        continue;
      }
      for (int64_t i = 0; i < count; i += kL) {
        const int64_t n = count - i;
        if (n >= kL)
          store(to + i, add ? load(to + i) + load(from + i) : load(from + i));
        else
          store_n(to + i, add ? load_n(to + i, int(n)) + load_n(from + i, int(n)) : load_n(from + i, int(n)), int(n));
      }
    }
    k += count;
  }
}

// Offsets of the positions of rows [begin, end), copied from row `base` on; returns how many.
int64_t offsets_of(const Plan& plan, int64_t base, int64_t begin, int64_t end, int64_t* x_at, int64_t* y_at) {
  const Grid& g = plan.grid;
  const int64_t step = g.step_w * (plan.copied ? g.copy_pixel : g.pixel);
  int64_t count = 0;
  for_each_row(g, base, begin, end, plan.copied, [&](int64_t n, int64_t i, int64_t offset) {
    const int64_t y = (n * g.rows + i - base) * g.columns * plan.y_pixel;
    for (int64_t j = 0; j < g.columns; ++j, ++count)
      x_at[count] = offset + j * step, y_at[count] = y + j * plan.y_pixel;
  });
  return count;
}

// Copies grad_y of some positions, if its copy is laid out otherwise.
const float* copy_y(const Plan& plan, const Shape& s, const float* y, int64_t positions, float* to) {
  if (!plan.y_copied(s)) return y;
  for (int64_t p = 0; p < positions; ++p) copy_floats(to + p * plan.y_pixel, y + p * s.c_out, s.c_out);
  return to;
}

int64_t image_elements(const Grid& g) { return g.height(g.rows) * g.width() * g.copy_pixel; }
// A vector too many may be read.
int64_t x_elements(const Plan& plan) {
  return plan.copied ? plan.grid.batch * image_elements(plan.grid) + kL * kMaxVectors : 0;
}
int64_t y_elements(const Plan& plan, const Shape& s, int64_t positions) {
  return plan.y_copied(s) ? positions * plan.y_pixel : 0;
}

// Sums of a block; tiles overlap, so its rows are rounded up.
constexpr int64_t kSums = kBlockElements + 12 * kMaxVectors * kL;

}  // namespace

int64_t backward_weight_scratch_bytes(const Shape& s) {
  const Plan plan(s);
  if (plan.chunks > 1) return plan.chunks * plan.blocks() * kSums * int64_t(sizeof(float));
  return 2 * plan.positions * int64_t(sizeof(int64_t)) +
         (x_elements(plan) + y_elements(plan, s, plan.positions)) * int64_t(sizeof(float));
}

void backward_weight(const float* grad_y, const float* x, const SlimConv2dWeight<float>& grad, bool add, const Shape& s,
                     void* scratch, const SlimConv2dParallel& parallel) {
  Plan plan(s);
  Grid& g = plan.grid;
  g.image = x;
  const int64_t panels = plan.vectors().panels(), blocks = plan.rows().blocks();
  if (plan.chunks == 1) {
    int64_t* const x_at = static_cast<int64_t*>(scratch);
    int64_t* const y_at = x_at + plan.positions;
    float* const x_copy = reinterpret_cast<float*>(y_at + plan.positions);
    float* const y_copy = x_copy + x_elements(plan);
    parallel_items(parallel, g.batch, [&](int64_t n) {
      const int64_t count = g.rows * g.columns, at = n * count;
      offsets_of(plan, 0, n * g.rows, (n + 1) * g.rows, x_at + at, y_at + at);
      if (plan.copied) copy_rows(g, n, g.low_h, g.height(g.rows), x_copy + n * image_elements(g));
      copy_y(plan, s, grad_y + at * s.c_out, count, y_copy + at * plan.y_pixel);
    });
    const Operands in = {plan.copied ? x_copy : x, plan.y_copied(s) ? y_copy : grad_y, x_at, y_at, plan.positions};
    parallel_items(parallel, panels * blocks, [&](int64_t item) {
      float* const sums = static_cast<float*>(thread_memory(kSums * int64_t(sizeof(float))));
      const Stretch rows = block_of(plan.rows(), item % blocks), panel = panel_of(plan.vectors(), item / blocks);
      compute_block(plan, s, in, rows, panel, sums);
      scatter_block(plan, s, grad, add, rows, panel, sums);
    });
    return;
  }
  float* const partial = static_cast<float*>(scratch);
  parallel_items(parallel, plan.chunks, [&](int64_t chunk) {
    const int64_t begin = chunk * plan.chunk_rows, end = min_of(begin + plan.chunk_rows, g.all_rows());
    const int64_t most = round_up(plan.chunk_rows * g.columns, 8);
    const int64_t elements = plan.copied ? round_up(g.copy_elements(plan.chunk_rows), kL) : 0;
    int64_t* const x_at = static_cast<int64_t*>(thread_memory(
        2 * most * int64_t(sizeof(int64_t)) + (elements + y_elements(plan, s, most)) * int64_t(sizeof(float))));
    int64_t* const y_at = x_at + most;
    float* const x_copy = reinterpret_cast<float*>(y_at + most);
    if (plan.copied) copy_band(g, begin, end, x_copy);
    const int64_t positions = offsets_of(plan, begin, begin, end, x_at, y_at);
    const float* y = copy_y(plan, s, grad_y + begin * g.columns * s.c_out, positions, x_copy + elements);
    const Operands in = {plan.copied ? x_copy : x, y, x_at, y_at, positions};
    for (int64_t i = 0; i < panels * blocks; ++i)
      compute_block(plan, s, in, block_of(plan.rows(), i % blocks), panel_of(plan.vectors(), i / blocks),
                    partial + (chunk * panels * blocks + i) * kSums);
  });
  parallel_items(parallel, panels * blocks, [&](int64_t i) {
    const Stretch rows = block_of(plan.rows(), i % blocks), panel = panel_of(plan.vectors(), i / blocks);
    const int64_t width = round_up(panel.count, kL);
    const Choice choice = choose(rows.count, int(width / kL));
    const int64_t height = choice.whole + (choice.whole < rows.count ? choice.rest.rows : 0);
    float* const sums = partial + i * kSums;
    for (int64_t k = 0; k < height * width; k += kL) {
      Vec<float> sum = load(sums + k);
      for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) sum += load(sums + chunk * panels * blocks * kSums + k);
      store(sums + k, sum);
    }
    scatter_block(plan, s, grad, add, rows, panel, sums);
  });
}

}  // namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32
