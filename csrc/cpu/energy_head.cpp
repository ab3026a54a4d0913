// energy_head and its backward on CPU tensors, in chunks of an image's pixels.
//
// A chunk is summed in float with compensation (twice the precision), the chunks of an image in double, because the
// energy's terms cancel. Chunks, and so the bits, depend neither on the number of threads nor on the batch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../checks.h"

#define VF_KERNELS "energy_head_kernels.h"
#include "each_isa.h"

namespace vf {
namespace {

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

// The image tensors in channels_last, split into chunks of pixels; an omitted skip or shift is undefined.
struct Chunks {
  at::Tensor y, skip, shift;
  int64_t N, C, pixels, size, per_image;

  Chunks(const at::Tensor& y_, const std::optional<at::Tensor>& skip_, const std::optional<at::Tensor>& shift_)
      : y(y_.contiguous(kLayout)),
        skip(skip_ ? skip_->contiguous(kLayout) : at::Tensor()),
        shift(shift_ ? shift_->contiguous() : at::Tensor()),
        N(y.size(0)),
        C(y.size(1)),
        pixels(y.size(2) * y.size(3)) {
    constexpr int64_t kElements = 1 << 12;
    size = std::max<int64_t>(1, kElements / std::max<int64_t>(1, C));
    per_image = (pixels + size - 1) / size;
  }

  const float* shifts() const { return shift.defined() ? shift.const_data_ptr<float>() : nullptr; }

  // run(n, chunk, y, skip, offset of these two, pixels)
  template <class Run>
  void for_each(const Run& run) const {
    constexpr int64_t kChunksPerTask = 4;
    at::parallel_for(0, N * per_image, kChunksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t n = index / per_image, first = index % per_image * size, offset = (n * pixels + first) * C;
        const float* added = skip.defined() ? skip.const_data_ptr<float>() + offset : nullptr;
        run(n, index, y.const_data_ptr<float>() + offset, added, offset, std::min(size, pixels - first));
      }
    });
  }
};

at::Tensor energy_head_cpu(const at::Tensor& y, const std::optional<at::Tensor>& skip, double skip_scale,
                           const std::optional<at::Tensor>& shift, const at::Tensor& weight, const at::Tensor& bias) {
  check_energy_terms(y, skip, shift);
  check_tensor(weight, "weight", {y.size(1)}, y);
  check_tensor(bias, "bias", {1}, y);
  const Chunks chunks(y, skip, shift);
  const at::Tensor weights = weight.contiguous();
  std::vector<double> sums(chunks.N * chunks.per_image);
  const auto run = VF_BEST(run_forward);
  chunks.for_each([&](int64_t, int64_t chunk, const float* from, const float* added, int64_t, int64_t pixels) {
    sums[chunk] = run(from, added, static_cast<float>(skip_scale), chunks.shifts(), weights.const_data_ptr<float>(),
                      pixels, chunks.C);
  });
  at::Tensor energy = at::empty({chunks.N}, y.options());
  float* out = energy.mutable_data_ptr<float>();
  for (int64_t n = 0; n < chunks.N; ++n) {
    double value = *bias.const_data_ptr<float>();
    for (int64_t chunk = 0; chunk < chunks.per_image; ++chunk) value += sums[n * chunks.per_image + chunk];
    out[n] = static_cast<float>(value);
  }
  return energy;
}

at::Tensor energy_head_backward_cpu(const at::Tensor& denergy, const at::Tensor& y,
                                    const std::optional<at::Tensor>& skip, double skip_scale,
                                    const std::optional<at::Tensor>& shift, const at::Tensor& weight) {
  check_energy_terms(y, skip, shift);
  check_tensor(weight, "weight", {y.size(1)}, y);
  check_tensor(denergy, "denergy", {y.size(0)}, y);
  const Chunks chunks(y, skip, shift);
  const at::Tensor weights = weight.contiguous(), gradient = denergy.contiguous();
  at::Tensor dt = at::empty(y.sizes(), y.options(), kLayout);
  const auto run = VF_BEST(run_backward);
  chunks.for_each([&](int64_t n, int64_t, const float* from, const float* added, int64_t offset, int64_t pixels) {
    run(gradient.const_data_ptr<float>()[n], from, added, static_cast<float>(skip_scale), chunks.shifts(),
        weights.const_data_ptr<float>(), pixels, chunks.C, dt.mutable_data_ptr<float>() + offset);
  });
  return dt;
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("energy_head", &vf::energy_head_cpu);
  m.impl("energy_head_backward", &vf::energy_head_backward_cpu);
}
