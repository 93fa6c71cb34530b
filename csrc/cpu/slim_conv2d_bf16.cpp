// bfloat16 convolution: whether AMX is there, and the table of its directions.
#include "slim_conv2d_bf16.h"

namespace fastslim::FASTSLIM_ISA {
namespace {

#ifdef FASTSLIM_AMX
bool ask_for_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24))) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool usable() {
  static const bool answer = ask_for_amx();
  return answer;
}
#else
bool usable() { return false; }
#endif

}  // namespace

extern const SlimConv2dBfloat16Table slim_conv2d_bfloat16_table;
#ifdef FASTSLIM_AMX
const SlimConv2dBfloat16Table slim_conv2d_bfloat16_table = {
    {{conv_bf16_forward_scratch, conv_bf16_forward},
     {conv_bf16_backward_input_scratch, conv_bf16_backward_input},
     {conv_bf16_backward_weight_scratch, conv_bf16_backward_weight}},
    usable};
#else
const SlimConv2dBfloat16Table slim_conv2d_bfloat16_table = {{}, usable};
#endif

}  // namespace fastslim::FASTSLIM_ISA
