// energy_epilogue and its backward on CPU tensors: pixel by pixel over dense channels_last memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "../checks.h"

#define VF_KERNELS "energy_epilogue_kernels.h"
#include "each_isa.h"

namespace vf {
namespace {

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;
// y, skip and shift of t = y + shift + skip_scale skip, dense; an omitted skip or shift is undefined.
struct Terms {
  at::Tensor y, skip, shift;
  int64_t C;

  Terms(const at::Tensor& y_, const std::optional<at::Tensor>& skip_, const std::optional<at::Tensor>& shift_)
      : y(y_.contiguous(kLayout)),
        skip(skip_ ? skip_->contiguous(kLayout) : at::Tensor()),
        shift(shift_ ? shift_->contiguous() : at::Tensor()),
        C(y.size(1)) {}

  // run(offset, y, skip, shift, pixels), the tensors from that element on
  template <class Run>
  void for_each_task(const Run& run) const {
    constexpr int64_t kElementsPerTask = 1 << 14;
    const int64_t width = std::max<int64_t>(1, C);
    at::parallel_for(0, y.numel() / width, std::max<int64_t>(1, kElementsPerTask / width),
                     [&](int64_t begin, int64_t end) {
                       const int64_t offset = begin * C;
                       run(offset, y.const_data_ptr<float>() + offset,
                           skip.defined() ? skip.const_data_ptr<float>() + offset : nullptr,
                           shift.defined() ? shift.const_data_ptr<float>() : nullptr, end - begin);
                     });
  }
};

at::Tensor energy_epilogue_cpu(const at::Tensor& y, const std::optional<at::Tensor>& skip, double skip_scale,
                               const std::optional<at::Tensor>& shift) {
  check_energy_terms(y, skip, shift);
  const Terms terms(y, skip, shift);
  at::Tensor u = at::empty(y.sizes(), y.options(), kLayout);
  const auto run = VF_BEST(run_forward);
  terms.for_each_task(
      [&](int64_t offset, const float* from, const float* added, const float* shifts, int64_t pixels) {
        run(from, added, static_cast<float>(skip_scale), shifts, pixels, terms.C, u.mutable_data_ptr<float>() + offset);
      });
  return u;
}

at::Tensor energy_epilogue_backward_cpu(const at::Tensor& du, const at::Tensor& y,
                                        const std::optional<at::Tensor>& skip, double skip_scale,
                                        const std::optional<at::Tensor>& shift) {
  check_energy_terms(y, skip, shift);
  check_tensor(du, "du", y.sizes(), y);
  const Terms terms(y, skip, shift);
  const at::Tensor gradient = du.contiguous(kLayout);
  at::Tensor dt = at::empty(y.sizes(), y.options(), kLayout);
  const auto run = VF_BEST(run_backward);
  terms.for_each_task(
      [&](int64_t offset, const float* from, const float* added, const float* shifts, int64_t pixels) {
        run(gradient.const_data_ptr<float>() + offset, from, added, static_cast<float>(skip_scale), shifts, pixels,
            terms.C, dt.mutable_data_ptr<float>() + offset);
      });
  return dt;
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("energy_epilogue", &vf::energy_epilogue_cpu);
  m.impl("energy_epilogue_backward", &vf::energy_epilogue_backward_cpu);
}
