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

inline void check_depthwise_arguments(const at::Tensor& h, const at::Tensor& weight, bool takes_bf16 = false) {
  const at::ScalarType type = h.scalar_type();
  TORCH_CHECK_VALUE(h.dim() == 4 && (type == at::kFloat || (takes_bf16 && type == at::kBFloat16)), "h must be float32 ",
                    takes_bf16 ? "or bfloat16 " : "", "[N, C, H, W]; it is ", type, " ", h.sizes(), ".");
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.scalar_type() == type && weight.size(2) == h.size(1), "weight must be ",
                    type, " [K, K, C] with the C = ", h.size(1), " of h; it is ", weight.scalar_type(), " ",
                    weight.sizes(), ".");
  TORCH_CHECK_VALUE(weight.size(0) == weight.size(1) && weight.size(0) % 2 == 1, "The window is ", weight.size(0), "x",
                    weight.size(1), "; it must be square and odd.");
  TORCH_CHECK_VALUE(weight.device() == h.device(), "weight is on ", weight.device(), " but h is on ", h.device(),
                    "; move it there.");
}

inline void check_depthwise_bias(const at::Tensor& h, const at::Tensor& bias) {
  TORCH_CHECK_VALUE(bias.dim() == 1 && bias.scalar_type() == h.scalar_type() && bias.size(0) == h.size(1),
                    "bias must be ", h.scalar_type(), " [C] with the C = ", h.size(1), " of h; it is ",
                    bias.scalar_type(), " ", bias.sizes(), ".");
  TORCH_CHECK_VALUE(bias.device() == h.device(), "bias is on ", bias.device(), " but h is on ", h.device(),
                    "; move it there.");
}

inline void check_depthwise_gradient(const at::Tensor& dy, const at::Tensor& h, bool upsample) {
  const int64_t scale = upsample ? 2 : 1;
  TORCH_CHECK_VALUE(dy.dim() == 4 && dy.scalar_type() == h.scalar_type() && dy.size(0) == h.size(0) &&
                        dy.size(1) == h.size(1) && dy.size(2) == scale * h.size(2) && dy.size(3) == scale * h.size(3),
                    "dy must be ", h.scalar_type(), " with the shape of the output for h ", h.sizes(), "; it is ",
                    dy.scalar_type(), " ", dy.sizes(), ".");
  TORCH_CHECK_VALUE(dy.device() == h.device(), "dy is on ", dy.device(), " but h is on ", h.device(),
                    "; move it there.");
}

}  // namespace vf
