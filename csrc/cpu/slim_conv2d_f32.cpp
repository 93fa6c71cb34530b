// slim_conv2d's float32 kernels: the forward pass and the input's gradient as products, and the table.
#include "slim_conv2d_f32.h"

#include <cstdlib>

#include "slim_conv2d_f32_product.h"

namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32 {
namespace {

struct Memory {
  void* data = nullptr;
  int64_t size = 0;
  ~Memory() { std::free(data); }
};
thread_local Memory memory;

template <bool Transposed> int64_t scratch_bytes(const Shape& s) {
  return product_scratch_bytes(Product(s, Transposed));
}

void forward(const float* x, const SlimConv2dWeight<const float>& weight, const float* bias, float* y, const Shape& s,
             void* scratch, const SlimConv2dParallel& parallel) {
  Product p(s, false);
  p.grid.image = x, p.weight = weight, p.bias = bias, p.out = y;
  run_product(p, scratch, parallel);
}

void backward_input(const float* grad_y, const SlimConv2dWeight<const float>& weight, float* grad_x, bool add,
                    const Shape& s, void* scratch, const SlimConv2dParallel& parallel) {
  Product p(s, true);
  p.grid.image = grad_y, p.weight = weight, p.out = grad_x, p.add = add;
  run_product(p, scratch, parallel);
}

}  // namespace

void* thread_memory(int64_t bytes) {
  if (bytes > memory.size) {
    std::free(memory.data);
    memory.size = round_up(bytes, 64);
    memory.data = std::aligned_alloc(64, size_t(memory.size));
    if (!memory.data) std::abort();
  }
  return memory.data;
}

}  // namespace fastslim::FASTSLIM_ISA::slim_conv2d_f32

namespace fastslim::FASTSLIM_ISA {

extern const SlimConv2dFloatTable slim_conv2d_float_table;
const SlimConv2dFloatTable slim_conv2d_float_table = {
    {{slim_conv2d_f32::scratch_bytes<false>, slim_conv2d_f32::forward},
     {slim_conv2d_f32::scratch_bytes<true>, slim_conv2d_f32::backward_input},
     {slim_conv2d_f32::backward_weight_scratch_bytes, slim_conv2d_f32::backward_weight}}};

}  // namespace fastslim::FASTSLIM_ISA
