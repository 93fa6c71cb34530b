// The active channels of a tensor, as a kernel takes them.
#pragma once
#include <cstdint>

#include "fastslim/scalar.h"

namespace fastslim {

// A width that the host knows or, so that one captured graph can replay any width, that lies in
// device memory: then `value` is the largest it can be, and the grid is made for that.
struct Width {
  int32_t value;
  const int32_t* from;  // or null

  FASTSLIM_HOST_DEVICE Width(int32_t value = 0, const int32_t* from = nullptr) : value(value), from(from) {}
  FASTSLIM_HOST_DEVICE int32_t get() const { return from ? *from : value; }
};

}  // namespace fastslim
