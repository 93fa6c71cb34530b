// The launchers of csrc/cuda/prefix_pack.cu, run by the host, for ctypes. `table`: rows of prefix_pack_table.
#include "../../csrc/cuda/prefix_pack.cu"

extern "C" void run_batch(fastslim::Transfer* table, int64_t count) {
  fastslim::launch_prefix_pack(table, count, nullptr);
}
extern "C" void run_table(const fastslim::Transfer* table, int count, int tiles, const int32_t* widths) {
  fastslim::launch_prefix_pack_table(table, count, tiles, widths, nullptr);
}
