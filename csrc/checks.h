// Argument checks that the CPU and the CUDA implementation of an op share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

namespace vf {

inline void check_noise_arguments(const at::Tensor& seeds, const at::Tensor& draw, int64_t stream, int64_t numel) {
  TORCH_CHECK_VALUE(seeds.dim() == 1 && seeds.scalar_type() == at::kLong,
                    "seeds must be int64 [N], one per image; they are ", seeds.scalar_type(), " ", seeds.sizes(), ".");
  TORCH_CHECK_VALUE(draw.numel() == 1 && draw.scalar_type() == at::kLong, "draw must be one int64 number; it is ",
                    draw.scalar_type(), " ", draw.sizes(), ".");
  TORCH_CHECK_VALUE(draw.device() == seeds.device(), "draw is on ", draw.device(), " but seeds are on ", seeds.device(),
                    "; move it there.");
  TORCH_CHECK_VALUE(0 <= stream && stream <= UINT32_MAX, "stream is ", stream, "; it must be within 0..2^32-1.");
  TORCH_CHECK_VALUE(0 <= numel && numel <= (int64_t{1} << 34), "numel is ", numel, "; it must be within 0..2^34.");
}

}  // namespace vf
