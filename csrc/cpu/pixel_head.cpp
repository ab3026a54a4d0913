// pixel_head and its backward on CPU tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "pixel_blocks.h"

#define VF_KERNELS "pixel_head_kernels.h"
#include "each_isa.h"

namespace vf {
namespace {

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

void check_pixels(const at::Tensor& logits, const at::Tensor& eps_x) {
  check_image(eps_x, "eps_x");
  check_tensor(logits, "logits", {eps_x.size(0), 2 * eps_x.size(1), eps_x.size(2), eps_x.size(3)}, eps_x);
}

std::tuple<at::Tensor, at::Tensor> pixel_head_cpu(const at::Tensor& logits, const at::Tensor& eps_x, bool with_log_p) {
  check_pixels(logits, eps_x);
  const PixelBlocks blocks(eps_x);
  const at::Tensor parameters = nhwc_images(logits), noise = nhwc_images(eps_x);
  at::Tensor x = at::empty(eps_x.sizes(), eps_x.options(), kLayout);
  at::Tensor log_p = at::empty({with_log_p ? blocks.N : 0}, eps_x.options());
  std::vector<double> sums(blocks.N * blocks.per_image);
  const auto run = VF_BEST(run_forward);
  blocks.for_each([&](int64_t n, int64_t block, int64_t first, int64_t pixels, float* raw) {
    const int64_t offset = first * blocks.C;
    split_parameters(image_of(parameters, n) + 2 * offset, pixels, blocks.C, raw);
    sums[block] = run(raw, image_of(noise, n) + offset, pixels * blocks.C, with_log_p, mutable_image_of(x, n) + offset);
  });
  if (with_log_p) blocks.write_log_p(sums, -0.5 * kLogTwoPi, log_p);
  return {x, log_p};
}

std::tuple<at::Tensor, at::Tensor> pixel_head_backward_cpu(const at::Tensor& dx,
                                                           const std::optional<at::Tensor>& dlog_p,
                                                           const at::Tensor& logits, const at::Tensor& eps_x) {
  check_pixels(logits, eps_x);
  check_tensor(dx, "dx", eps_x.sizes(), eps_x);
  if (dlog_p.has_value()) check_tensor(*dlog_p, "dlog_p", {eps_x.size(0)}, eps_x);
  const PixelBlocks blocks(eps_x);
  const at::Tensor parameters = nhwc_images(logits), noise = nhwc_images(eps_x), gradient = nhwc_images(dx);
  const at::Tensor weight = dlog_p.has_value() ? dlog_p->contiguous() : at::Tensor();
  at::Tensor dlogits = at::empty(logits.sizes(), logits.options(), kLayout);
  at::Tensor deps_x = at::empty(eps_x.sizes(), eps_x.options(), kLayout);
  const auto run = VF_BEST(run_backward);
  blocks.for_each([&](int64_t n, int64_t, int64_t first, int64_t pixels, float* raw) {
    const int64_t offset = first * blocks.C;
    split_parameters(image_of(parameters, n) + 2 * offset, pixels, blocks.C, raw);
    run(image_of(gradient, n) + offset, weight.defined() ? weight.const_data_ptr<float>()[n] : 0,
        image_of(noise, n) + offset, pixels * blocks.C, raw, mutable_image_of(deps_x, n) + offset);
    join_parameters(raw, pixels, blocks.C, mutable_image_of(dlogits, n) + 2 * offset);
  });
  return {dlogits, deps_x};
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("pixel_head", &vf::pixel_head_cpu);
  m.impl("pixel_head_backward", &vf::pixel_head_backward_cpu);
}
