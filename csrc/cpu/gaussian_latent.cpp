// gaussian_latent and its backward on CPU tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "pixel_blocks.h"

#define VF_KERNELS "gaussian_latent_kernels.h"
#include "each_isa.h"

namespace vf {
namespace {

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

void check_latent(const std::optional<at::Tensor>& parameters, const at::Tensor& eps) {
  check_image(eps, "eps");
  if (!parameters.has_value()) return;
  check_tensor(*parameters, "parameters", {eps.size(0), 2 * eps.size(1), eps.size(2), eps.size(3)}, eps);
}

// The raw parameters of `count` pixels of image n from `first` on, separated into means and log sigmas.
void read_parameters(const std::optional<at::Tensor>& parameters, int64_t n, int64_t first, int64_t count, int64_t L,
                     float* raw) {
  split_parameters(parameters.has_value() ? image_of(*parameters, n) + 2 * first * L : nullptr, count, L, raw);
}

std::optional<at::Tensor> nhwc_or_none(const std::optional<at::Tensor>& x) {
  return x.has_value() ? std::make_optional(nhwc_images(*x)) : std::nullopt;
}

std::tuple<at::Tensor, at::Tensor> gaussian_latent_cpu(const std::optional<at::Tensor>& parameters,
                                                       const at::Tensor& eps, double temperature, bool with_log_p) {
  check_latent(parameters, eps);
  const PixelBlocks blocks(eps);
  const std::optional<at::Tensor> prior = nhwc_or_none(parameters);
  const at::Tensor noise = nhwc_images(eps);
  at::Tensor z = at::empty(eps.sizes(), eps.options(), kLayout);
  at::Tensor log_p = at::empty({with_log_p ? blocks.N : 0}, eps.options());
  std::vector<double> sums(blocks.N * blocks.per_image);
  const auto run = VF_BEST(run_forward);
  blocks.for_each([&](int64_t n, int64_t block, int64_t first, int64_t pixels, float* raw) {
    read_parameters(prior, n, first, pixels, blocks.C, raw);
    const int64_t offset = first * blocks.C;
    sums[block] = run(raw, image_of(noise, n) + offset, pixels * blocks.C, static_cast<float>(temperature), with_log_p,
                      mutable_image_of(z, n) + offset);
  });
  if (with_log_p) blocks.write_log_p(sums, -0.5 * kLogTwoPi - std::log(temperature), log_p);
  return {z, log_p};
}

std::tuple<at::Tensor, at::Tensor> gaussian_latent_backward_cpu(const at::Tensor& dz,
                                                                const std::optional<at::Tensor>& dlog_p,
                                                                const std::optional<at::Tensor>& parameters,
                                                                const at::Tensor& eps, double temperature) {
  check_latent(parameters, eps);
  check_tensor(dz, "dz", eps.sizes(), eps);
  if (dlog_p.has_value()) check_tensor(*dlog_p, "dlog_p", {eps.size(0)}, eps);
  const PixelBlocks blocks(eps);
  const std::optional<at::Tensor> prior = nhwc_or_none(parameters);
  const at::Tensor noise = nhwc_images(eps), gradient = nhwc_images(dz);
  const at::Tensor weight = dlog_p.has_value() ? dlog_p->contiguous() : at::Tensor();
  at::Tensor deps = at::empty(eps.sizes(), eps.options(), kLayout);
  at::Tensor dparameters =
      prior.has_value() ? at::empty(prior->sizes(), eps.options(), kLayout) : at::empty({0}, eps.options());
  const auto run = VF_BEST(run_backward);
  blocks.for_each([&](int64_t n, int64_t, int64_t first, int64_t pixels, float* raw) {
    read_parameters(prior, n, first, pixels, blocks.C, raw);
    const int64_t offset = first * blocks.C;
    run(image_of(gradient, n) + offset, weight.defined() ? weight.const_data_ptr<float>()[n] : 0,
        image_of(noise, n) + offset, pixels * blocks.C, static_cast<float>(temperature), raw,
        mutable_image_of(deps, n) + offset);
    if (prior.has_value()) join_parameters(raw, pixels, blocks.C, mutable_image_of(dparameters, n) + 2 * offset);
  });
  return {dparameters, deps};
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("gaussian_latent", &vf::gaussian_latent_cpu);
  m.impl("gaussian_latent_backward", &vf::gaussian_latent_backward_cpu);
}
