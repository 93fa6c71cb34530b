// What a kernel file needs of CUDA, so that the host compiler can run it too (tests/cuda_emulation/).
#pragma once
#include <cuda_runtime_api.h>

#ifdef __CUDACC__
#define FASTSLIM_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#else
#define FASTSLIM_LAUNCH(kernel, grid, block, stream, ...) \
  emulation::launch(grid, block, stream, [&] { kernel(__VA_ARGS__); })
#endif
