// prefix_pack on a GPU: launchers, torch-free. An entry of the table stands in prefix_pack.h.
#pragma once
#include <cuda_runtime_api.h>

#include "fastslim/prefix_pack.h"

namespace fastslim {

// What fits into a kernel's arguments (32764 bytes since CUDA 12.1).
constexpr int kTransfersPerLaunch = 340;

struct TransferBatch {
  int32_t count;
  Transfer transfers[kTransfersPerLaunch];
};
static_assert(sizeof(TransferBatch) <= 32764, "a kernel takes no more arguments");

// Entries from host memory travel as the kernel's arguments: nothing is copied or allocated, and a
// captured graph holds them. One launch per kTransfersPerLaunch entries; sets their first_tile.
cudaError_t launch_prefix_pack(Transfer* transfers, int64_t count, cudaStream_t);

// Entries in device memory, their first_tile set; `tiles` of all of them together.
cudaError_t launch_prefix_pack_table(const Transfer* table, int32_t count, int32_t tiles,
                                     const int32_t* widths,  // (count, 2): active c_out and c_in; or null
                                     cudaStream_t);

}  // namespace fastslim
