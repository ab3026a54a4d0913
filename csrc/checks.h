// Argument checks that the CPU and the CUDA implementation of an op share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

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

inline void check_power_iteration_arguments(const at::Tensor& weight, const at::Tensor& u, const at::Tensor& v,
                                            int64_t iterations, double eps) {
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.scalar_type() == at::kFloat && weight.size(1) > 0 && weight.size(2) > 0,
                    "weight must be float32 [B, M, K] with M, K >= 1; it is ", weight.scalar_type(), " ",
                    weight.sizes(), ".");
  const auto check_vector = [&](const char* name, const at::Tensor& vector, int64_t size) {
    TORCH_CHECK_VALUE(vector.dim() == 2 && vector.scalar_type() == at::kFloat && vector.size(0) == weight.size(0) &&
                          vector.size(1) == size,
                      name, " must be float32 [", weight.size(0), ", ", size, "] for weight ", weight.sizes(),
                      "; it is ", vector.scalar_type(), " ", vector.sizes(), ".");
    TORCH_CHECK_VALUE(vector.device() == weight.device(), name, " is on ", vector.device(), " but weight is on ",
                      weight.device(), "; move it there.");
  };
  check_vector("u", u, weight.size(1));
  check_vector("v", v, weight.size(2));
  TORCH_CHECK_VALUE(iterations >= 0, "iterations is ", iterations, "; it must not be negative.");
  TORCH_CHECK_VALUE(eps > 0, "eps is ", eps, "; it must be positive.");
}

inline void check_image(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.scalar_type() == at::kFloat, name, " must be float32 [N, C, H, W]; it is ",
                    x.scalar_type(), " ", x.sizes(), ".");
}

// x must have this type (float32 or bfloat16) and shape, on the device of `other`.
inline void check_tensor(const at::Tensor& x, const char* name, at::IntArrayRef shape, const at::Tensor& other,
                         at::ScalarType type = at::kFloat) {
  TORCH_CHECK_VALUE(x.scalar_type() == type && x.sizes() == shape, name, " must be ",
                    type == at::kFloat ? "float32 " : "bfloat16 ", shape, "; it is ", x.scalar_type(), " ", x.sizes(),
                    ".");
  TORCH_CHECK_VALUE(x.device() == other.device(), name, " is on ", x.device(), "; move it to ", other.device(),
                    ", where the others are.");
}

// The terms of y + shift + skip_scale skip, which the energy network activates; y [N, C, H, W].
inline void check_energy_terms(const at::Tensor& y, const std::optional<at::Tensor>& skip,
                               const std::optional<at::Tensor>& shift) {
  check_image(y, "y");
  if (skip) check_tensor(*skip, "skip", y.sizes(), y);
  if (shift) check_tensor(*shift, "shift", {y.size(1)}, y);
}

inline void check_gate_weights(const at::Tensor& s, const at::Tensor& weight_in, const at::Tensor& weight_out) {
  TORCH_CHECK_VALUE(weight_in.dim() == 2, "weight_in must be [hidden, C]; it is ", weight_in.sizes(), ".");
  check_tensor(weight_in, "weight_in", {weight_in.size(0), s.size(1)}, s);
  check_tensor(weight_out, "weight_out", {s.size(1), weight_in.size(0)}, s);
}

// A product of x [N, C, H, W] with a weight packed for `channels` outputs.
inline void check_pointwise_arguments(const at::Tensor& x, const char* name, const at::Tensor& weight,
                                      int64_t channels) {
  check_image(x, name);
  check_tensor(weight, "The packed weight", {(channels + 15) / 16, x.size(1), 16}, x);
}

// An optional tensor with the image size of x and `channels` channels.
inline void check_like(const std::optional<at::Tensor>& y, const char* name, int64_t channels, const at::Tensor& x) {
  if (y) check_tensor(*y, name, {x.size(0), channels, x.size(2), x.size(3)}, x);
}

// eps and nonfinite_at are written in place, so they must be contiguous.
inline void check_langevin_arguments(const at::Tensor& eps, const at::Tensor& gradient, const at::Tensor& seeds,
                                     const at::Tensor& draw, const at::Tensor& nonfinite_at, int64_t stream,
                                     double step_size) {
  TORCH_CHECK_VALUE(eps.dim() == 2 && eps.scalar_type() == at::kFloat && eps.is_contiguous(),
                    "eps must be float32 [N, D] and contiguous; it is ", eps.scalar_type(), " ", eps.sizes(),
                    " with strides ", eps.strides(), ".");
  check_noise_arguments(seeds, draw, stream, eps.size(1));
  check_tensor(gradient, "gradient", eps.sizes(), eps);
  TORCH_CHECK_VALUE(seeds.size(0) == eps.size(0) && seeds.device() == eps.device(), "seeds must be int64 [",
                    eps.size(0), "] on ", eps.device(), ", one per row of eps; they are ", seeds.sizes(), " on ",
                    seeds.device(), ".");
  TORCH_CHECK_VALUE(nonfinite_at.scalar_type() == at::kLong && nonfinite_at.sizes() == seeds.sizes() &&
                        nonfinite_at.is_contiguous() && nonfinite_at.device() == eps.device(),
                    "nonfinite_at must be int64 [", eps.size(0), "], contiguous, on ", eps.device(), "; it is ",
                    nonfinite_at.scalar_type(), " ", nonfinite_at.sizes(), " on ", nonfinite_at.device(), ".");
  TORCH_CHECK_VALUE(step_size > 0 && std::isfinite(step_size), "step_size is ", step_size,
                    "; it must be a positive number.");
}

inline void check_gather_arguments(const at::Tensor& images, const at::Tensor& index, const at::Tensor& flip,
                                   const at::Tensor& top, const at::Tensor& left, int64_t size) {
  TORCH_CHECK_VALUE(images.dim() == 4 && images.scalar_type() == at::kByte && images.is_contiguous() &&
                        (images.size(3) == 1 || images.size(3) == 3),
                    "images must be uint8 [M, H, W, C], C = 1 or 3, and contiguous; it is ", images.scalar_type(), " ",
                    images.sizes(), " with strides ", images.strides(), ".");
  TORCH_CHECK_VALUE(index.dim() == 1 && index.scalar_type() == at::kLong, "index must be int64 [n]; it is ",
                    index.scalar_type(), " ", index.sizes(), ".");
  const auto check_each = [&](const char* name, const at::Tensor& each, at::ScalarType type, const char* type_name) {
    TORCH_CHECK_VALUE(each.scalar_type() == type && each.sizes() == index.sizes(), name, " must be ", type_name, " ",
                      index.sizes(), ", as many as index has; it is ", each.scalar_type(), " ", each.sizes(), ".");
  };
  check_each("flip", flip, at::kBool, "bool");
  check_each("top", top, at::kLong, "int64");
  check_each("left", left, at::kLong, "int64");
  const auto check_device = [&](const char* name, const at::Tensor& each) {
    TORCH_CHECK_VALUE(each.device() == images.device(), name, " is on ", each.device(), "; move it to ",
                      images.device(), ", where the others are.");
  };
  check_device("index", index);
  check_device("flip", flip);
  check_device("top", top);
  check_device("left", left);
  const int64_t largest = std::min(images.size(1), images.size(2));
  TORCH_CHECK_VALUE(1 <= size && size <= largest, "size is ", size, "; it must be within 1..", largest, " for images ",
                    images.sizes(), ".");
  TORCH_CHECK_VALUE(images.size(0) > 0 || index.size(0) == 0, "images is empty, so there is none to gather.");
}

// For the CUDA kernels, which store bfloat16. Returns the number of hidden channels; a row of `weight` holds 32.
// `products`: the number of [32, C] weights in a row.
inline int64_t check_inverted_residual(const at::Tensor& x, const at::Tensor& weight, const char* name,
                                       int64_t products) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.scalar_type() == at::kBFloat16, "x must be bfloat16 [N, C, H, W]; it is ",
                    x.scalar_type(), " ", x.sizes(), ".");
  const int64_t C = x.size(1), chunks = weight.dim() == 2 ? weight.size(0) : 0;
  TORCH_CHECK_VALUE((C == 32 || C == 64 || C == 128) && chunks < (1 << 15), "C is ", C, " and hidden ", 32 * chunks,
                    "; the kernel takes C = 32, 64 or 128 and hidden below 2^20.");
  TORCH_CHECK_VALUE(x.size(2) < (1 << 27) && x.size(3) < (1 << 27), "x is ", x.sizes(),
                    "; the kernel takes H and W below 2^27.");
  check_tensor(weight, name, {chunks, 32 * products * C + 1920}, x, at::kBFloat16);
  return 32 * chunks;
}

}  // namespace vf
