// The matrix form of batch_norm_act: how rows are joined and cut into chunks, and the walk over them.
#pragma once
#include "batch_norm_act_math.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

constexpr int64_t kChunkValues = 32768;  // 128 KiB of float: 20 to 100 chunks in a usual activation
constexpr int64_t kLeastRows = 32;       // fewer: partial sums would cost as much as data
constexpr int64_t kMostRows = 1024;      // more: float sums would lose a digit
constexpr int kGroup = 8;                // rows added up in registers before memory is touched

// The tensor as a matrix [rows, width] and the `tail` first values of one row more.
struct Plan {
  int64_t period, repeat, width, rows, tail, chunk_rows, chunks;

  Plan(const BatchNormShape& shape, int64_t lanes) {
    period = shape.channels * shape.inner;
    int64_t common = lanes;  // lanes is a power of two
    while (period % common) common /= 2;
    repeat = lanes / common;
    width = period * repeat;
    rows = shape.outer / repeat;
    tail = shape.outer % repeat * period;
    chunk_rows = kChunkValues / width;
    if (chunk_rows < kLeastRows) chunk_rows = kLeastRows;
    if (chunk_rows > kMostRows) chunk_rows = kMostRows;
    chunks = rows ? (rows + chunk_rows - 1) / chunk_rows : 1;
  }
  int64_t first_row(int64_t chunk) const { return chunk * chunk_rows; }
  int64_t rows_of(int64_t chunk) const {
    const int64_t left = rows - first_row(chunk);
    return left < chunk_rows ? left : chunk_rows;
  }
  int64_t tail_of(int64_t chunk) const { return chunk == chunks - 1 ? tail : 0; }
};

template <class T> Plan plan_of(const BatchNormShape& shape) { return Plan(shape, kLanes<Accumulate<T>>); }

// Scratch: five vectors of parameters, then three of partial sums for every chunk, all [width].
template <class T> struct Scratch {
  using A = Accumulate<T>;
  A *center, *scale, *shift, *slope, *offset, *partial;
  int64_t width;

  Scratch(const BatchNormArgs& args, const Plan& plan) : width(plan.width) {
    center = static_cast<A*>(args.scratch);
    scale = center + width;
    shift = scale + width;
    slope = shift + width;
    offset = slope + width;
    partial = offset + width;
  }
  A* partial_of(int64_t chunk, int which) const { return partial + (chunk * 3 + which) * width; }
};

template <class T> int64_t chunks(const BatchNormShape& shape) { return plan_of<T>(shape).chunks; }
template <class T> int64_t scratch_bytes(const BatchNormShape& shape) {
  const Plan plan = plan_of<T>(shape);
  return (5 + 3 * plan.chunks) * plan.width * int64_t(sizeof(Accumulate<T>));
}

// Walks over n rows and `tail` values of the next. begin(column, m) makes the object that takes the
// vectors of one column, end(object, column, m) ends it after every group of rows.
template <class A, int Group, class Begin, class End>
inline void walk(const Plan& plan, int64_t first, int64_t n, int64_t tail, Begin begin, End end) {
  constexpr int L = kLanes<A>;
  const int64_t width = plan.width;
  int64_t row = 0;
  for (; row + Group <= n; row += Group)
    for (int64_t v = 0; v < width; v += L) {
      auto object = begin(v, Full{});
      const int64_t at = (first + row) * width + v;
      for (int r = 0; r < Group; ++r) object(at + r * width, Full{});
      end(object, v, Full{});
    }
  for (; row < n; ++row)
    for (int64_t v = 0; v < width; v += L) {
      auto object = begin(v, Full{});
      object((first + row) * width + v, Full{});
      end(object, v, Full{});
    }
  const int64_t base = (first + n) * width;
  int64_t v = 0;
  for (; v + L <= tail; v += L) {
    auto object = begin(v, Full{});
    object(base + v, Full{});
    end(object, v, Full{});
  }
  if (v < tail) {
    const Part part{int(tail - v)};
    auto object = begin(v, part);
    object(base + v, part);
    end(object, v, part);
  }
}

}  // namespace
}  // namespace fastslim::FASTSLIM_ISA
