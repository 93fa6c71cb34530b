// prefix_pack: one entry of the descriptor table per block of memory to move. Torch-free, for host and device.
#pragma once
#include <algorithm>
#include <climits>
#include <cstdint>
#include <utility>

#include "fastslim/scalar.h"

namespace fastslim {

enum Element : int8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum Dense : int8_t { kNotDense = 0, kDenseSource = 1, kDenseTarget = 2 };
enum Channels : int8_t { kOut = 0, kIn = 1, kFixed = 2 };

constexpr int kTransferDims = 4;
constexpr int64_t kTransferTile = 4096;  // elements that one block moves
constexpr int kTransferVector = 4;       // elements of a wide access: 16 bytes of float32

// target[...] = or += source[...]. Dimensions run from the innermost of the target outwards, those that
// lie behind one another in both are merged; missing ones have size 1. Strides are in elements.
struct Transfer {
  const void* source;
  void* target;
  int32_t source_stride[kTransferDims], target_stride[kTransferDims];
  int32_t size[kTransferDims];
  int32_t unit[kTransferDims];     // elements that one channel brings to a dimension of channels
  int8_t channels[kTransferDims];  // which width a dimension follows (Channels)
  int8_t rank[kTransferDims];      // position of a dimension on the dense side, 0 the innermost
  int8_t source_type, target_type, add, dense;
  int32_t first_tile;  // tiles of all entries before this one
};
static_assert(sizeof(Transfer) == 96, "the Triton kernel reads the same table, by word");

// A tensor as the table's builder needs it.
struct TransferSide {
  void* data;
  int8_t type;
  const int64_t* stride;
};

namespace transfer {

struct Dim {
  int64_t size, source, target, unit;
  int8_t channels;
};

// Position of each dimension on the dense side; false if that side has gaps or overlaps.
inline bool rank_dense(const Dim* dim, int dims, Dense dense, int8_t* rank) {
  const auto stride = [&](int d) { return dense == kDenseSource ? dim[d].source : dim[d].target; };
  for (int d = 0; d < dims; ++d)
    for (int e = rank[d] = 0; e < dims; ++e)
      rank[d] += dim[e].size == 1 || dim[d].size == 1
                     ? dim[e].size == 1 && (dim[d].size != 1 || e < d)  // wherever it lies, one element deep
                     : stride(e) < stride(d) || (stride(e) == stride(d) && e < d);
  for (int d = 0; d < dims; ++d) {
    int64_t expected = 1;
    for (int e = 0; e < dims; ++e) expected *= rank[e] < rank[d] ? dim[e].size : 1;
    if (dim[d].size > 1 && stride(d) != expected) return false;
  }
  return true;
}

// Whether a side can be read two elements at a time: strides of all but the innermost dimension are even.
inline bool in_pairs(const void* data, const Dim* dim, int dims, int64_t Dim::* stride) {
  bool all = dims > 0 && dim[0].size % 2 == 0 && dim[0].*stride == 1 && reinterpret_cast<uintptr_t>(data) % 4 == 0;
  for (int d = 1; d < dims; ++d) all = all && dim[d].*stride % 2 == 0;
  return all;
}

}  // namespace transfer

// Fills an entry; returns why that cannot be, or null. With `widths`, dimensions 0 and 1 follow the widths.
inline const char* make_transfer(const TransferSide& source, const TransferSide& target, int dims, const int64_t* size,
                                 bool add, bool widths, Dense dense, Transfer* out) {
  constexpr int kMaxDims = 8;
  if (dims > kMaxDims) return "has more than 8 dimensions";
  transfer::Dim dim[kMaxDims];
  int count = 0;
  int64_t total = 1, source_span = 1, target_span = 1;
  for (int d = 0; d < dims; ++d) {
    const Channels channels = !widths || d > 1 ? kFixed : d == 0 ? kOut : kIn;
    if (size[d] && total > INT32_MAX / size[d]) return "has 2^31 elements or more; split it";
    total *= size[d];
    if (size[d] == 1 && channels == kFixed) continue;
    dim[count++] = {size[d], size[d] > 1 ? source.stride[d] : 0, size[d] > 1 ? target.stride[d] : 0, 1, channels};
  }
  for (int d = 0; d < count && total > 0; ++d) {
    if (std::max(dim[d].source, dim[d].target) > INT32_MAX) return "spans 2^31 elements or more; split it";
    source_span += (dim[d].size - 1) * dim[d].source, target_span += (dim[d].size - 1) * dim[d].target;
  }
  if (std::max(source_span, target_span) > INT32_MAX) return "spans 2^31 elements or more; split it";
  const auto inside = [](const transfer::Dim& a, const transfer::Dim& b) {
    if ((a.size == 1) != (b.size == 1)) return b.size == 1;
    return a.target != b.target ? a.target < b.target : a.source < b.source;
  };
  for (int d = 1; d < count; ++d)  // a few elements, hundreds of times a step: no library sort
    for (int e = d; e > 0 && inside(dim[e], dim[e - 1]); --e) std::swap(dim[e], dim[e - 1]);
  int merged = 0;
  for (int d = 0; d < count; ++d) {
    transfer::Dim* inner = merged ? &dim[merged - 1] : nullptr;
    if (inner && inner->channels == kFixed && dim[d].source == inner->source * inner->size &&
        dim[d].target == inner->target * inner->size) {
      inner->unit = dim[d].channels == kFixed ? 1 : inner->size;
      inner->size *= dim[d].size, inner->channels = dim[d].channels;
    } else {
      dim[merged++] = dim[d];
    }
  }
  if (merged > kTransferDims) return "has more than 4 dimensions that do not lie behind one another";
  int8_t source_type = source.type, target_type = target.type;
  // A plain copy of 16-bit elements moves pairs of them as if they were float32: accesses twice as wide.
  if (source_type == target_type && (source_type == kBFloat16 || source_type == kFloat16) && !add && !widths &&
      transfer::in_pairs(source.data, dim, merged, &transfer::Dim::source) &&
      transfer::in_pairs(target.data, dim, merged, &transfer::Dim::target)) {
    source_type = target_type = kFloat32;
    dim[0].size /= 2;
    for (int d = 1; d < merged; ++d) dim[d].source /= 2, dim[d].target /= 2;
  }
  *out = {};
  if (dense != kNotDense && total > 0 && !transfer::rank_dense(dim, merged, dense, out->rank))
    return "is marked dense on a side that has gaps";
  out->source = source.data, out->target = target.data;
  for (int d = 0; d < kTransferDims; ++d) {
    if (d >= merged) out->rank[d] = int8_t(d);
    const transfer::Dim one{1, 0, 0, 1, kFixed}, &from = d < merged ? dim[d] : one;
    out->source_stride[d] = int32_t(from.source), out->target_stride[d] = int32_t(from.target);
    out->size[d] = int32_t(from.size), out->unit[d] = int32_t(from.unit), out->channels[d] = from.channels;
  }
  out->source_type = source_type, out->target_type = target_type, out->add = add, out->dense = dense;
  return nullptr;
}

// Tiles of an entry: enough for both access widths, and for every smaller width.
inline int64_t tiles_of(const Transfer& t) {
  int64_t padded = (int64_t(t.size[0]) + kTransferVector - 1) / kTransferVector * kTransferVector;
  for (int d = 1; d < kTransferDims; ++d) padded *= t.size[d];
  return (padded + kTransferTile - 1) / kTransferTile;
}

}  // namespace fastslim
