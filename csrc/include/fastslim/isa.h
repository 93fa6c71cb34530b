// Which instruction set the CPU kernels run with. Every file in csrc/cpu/ is compiled once per set
// (namespace fastslim::baseline | avx2 | avx512 | avx512_bf16) and exports one table of function pointers; the
// table is chosen at run time, so one binary runs on an old laptop and uses a new one's vectors.
#pragma once

namespace fastslim {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The widest set this CPU supports, or the one named by FASTSLIM_CPU_ISA if the CPU supports it.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace fastslim

// Declares an op's tables and defines `const Table& name()`, which picks one.
#if defined(__x86_64__)
#define FASTSLIM_DEFINE_DISPATCH(Table, name)                  \
  namespace fastslim {                                         \
  namespace baseline {                                         \
  extern const Table name##_table;                             \
  }                                                            \
  namespace avx2 {                                             \
  extern const Table name##_table;                             \
  }                                                            \
  namespace avx512 {                                           \
  extern const Table name##_table;                             \
  }                                                            \
  namespace avx512_bf16 {                                      \
  extern const Table name##_table;                             \
  }                                                            \
  const Table& name() {                                        \
    switch (active_isa()) {                                    \
      case Isa::avx512_bf16: return avx512_bf16::name##_table; \
      case Isa::avx512: return avx512::name##_table;           \
      case Isa::avx2: return avx2::name##_table;               \
      default: return baseline::name##_table;                  \
    }                                                          \
  }                                                            \
  }
#else
#define FASTSLIM_DEFINE_DISPATCH(Table, name)            \
  namespace fastslim {                                   \
  namespace baseline {                                   \
  extern const Table name##_table;                       \
  }                                                      \
  const Table& name() { return baseline::name##_table; } \
  }
#endif
