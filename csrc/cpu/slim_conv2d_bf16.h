// The directions of the bfloat16 convolution, one file each.
#pragma once
#include "slim_conv2d_amx.h"

namespace fastslim::FASTSLIM_ISA {

int64_t conv_bf16_forward_scratch(const SlimConv2dShape&);
void conv_bf16_forward(const bfloat16* x, const SlimConv2dWeight<const float>& weight, const float* bias, bfloat16* y,
                       const SlimConv2dShape&, void* scratch, const SlimConv2dParallel&);

int64_t conv_bf16_backward_input_scratch(const SlimConv2dShape&);
void conv_bf16_backward_input(const bfloat16* grad_y, const SlimConv2dWeight<const float>& weight, bfloat16* grad_x,
                              bool add, const SlimConv2dShape&, void* scratch, const SlimConv2dParallel&);

int64_t conv_bf16_backward_weight_scratch(const SlimConv2dShape&);
void conv_bf16_backward_weight(const bfloat16* grad_y, const bfloat16* x, const SlimConv2dWeight<float>& grad_weight,
                               bool add, const SlimConv2dShape&, void* scratch, const SlimConv2dParallel&);

}  // namespace fastslim::FASTSLIM_ISA
