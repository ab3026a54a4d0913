// energy_epilogue and its backward on CPU tensors: element by element over dense channels_last memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "../checks.h"

#define VF_KERNELS "energy_epilogue_kernels.h"
#include "each_isa.h"

namespace vf {
namespace {

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;
constexpr int64_t kElementsPerTask = 1 << 14;

// The skip in channels_last, or an undefined tensor where there is none.
at::Tensor dense_skip(const std::optional<at::Tensor>& skip) {
  return skip.has_value() ? skip->contiguous(kLayout) : at::Tensor();
}

const float* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

at::Tensor energy_epilogue_cpu(const at::Tensor& y, const std::optional<at::Tensor>& skip, double skip_scale) {
  check_image(y, "y");
  if (skip.has_value()) check_tensor(*skip, "skip", y.sizes(), y);
  const at::Tensor dense = y.contiguous(kLayout), added = dense_skip(skip);
  at::Tensor u = at::empty(y.sizes(), y.options(), kLayout);
  const auto run = VF_BEST(run_forward);
  at::parallel_for(0, y.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
    run(dense.const_data_ptr<float>(), data_or_null(added), static_cast<float>(skip_scale), u.mutable_data_ptr<float>(),
        begin, end);
  });
  return u;
}

at::Tensor energy_epilogue_backward_cpu(const at::Tensor& du, const at::Tensor& y,
                                        const std::optional<at::Tensor>& skip, double skip_scale) {
  check_image(y, "y");
  if (skip.has_value()) check_tensor(*skip, "skip", y.sizes(), y);
  check_tensor(du, "du", y.sizes(), y);
  const at::Tensor gradient = du.contiguous(kLayout), dense = y.contiguous(kLayout), added = dense_skip(skip);
  at::Tensor dt = at::empty(y.sizes(), y.options(), kLayout);
  const auto run = VF_BEST(run_backward);
  at::parallel_for(0, y.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
    run(gradient.const_data_ptr<float>(), dense.const_data_ptr<float>(), data_or_null(added),
        static_cast<float>(skip_scale), dt.mutable_data_ptr<float>(), begin, end);
  });
  return dt;
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("energy_epilogue", &vf::energy_epilogue_cpu);
  m.impl("energy_epilogue_backward", &vf::energy_epilogue_backward_cpu);
}
