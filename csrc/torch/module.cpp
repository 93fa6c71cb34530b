// The only pybind11 file: importing fastslim._C loads this library, which registers the CPU ops.
#include <pybind11/pybind11.h>

#include "blas.h"
#include "fastslim/isa.h"
#include "fastslim/slim_conv2d.h"

#define FASTSLIM_STRING_(x) #x
#define FASTSLIM_STRING(x) FASTSLIM_STRING_(x)

#ifdef __clang__
#define FASTSLIM_COMPILER __VERSION__
#else
#define FASTSLIM_COMPILER "gcc " __VERSION__
#endif

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = FASTSLIM_STRING(FASTSLIM_TORCH_VERSION);
    info["cuda"] = bool(FASTSLIM_CUDA);
    info["compiler"] = FASTSLIM_COMPILER;
    info["cpu_isa"] = fastslim::isa_name(fastslim::active_isa());
    info["blas"] = fastslim::has_sgemm();
    info["slim_conv2d_bf16"] = fastslim::slim_conv2d_bfloat16().usable();
    return info;
  });
}
