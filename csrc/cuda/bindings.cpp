// Every op on CUDA tensors: checks, device guard, allocation, launch on torch's current stream, launch check.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "launchers.h"

namespace vf {
namespace {

at::Tensor philox_words_cuda(const at::Tensor& seeds, const at::Tensor& draw, int64_t stream, int64_t numel) {
  check_noise_arguments(seeds, draw, stream, numel);
  const c10::cuda::CUDAGuard guard(seeds.device());
  const at::Tensor contiguous_seeds = seeds.contiguous();
  at::Tensor out = at::empty({seeds.size(0), numel}, seeds.options().dtype(at::kInt));
  launch_philox_words(contiguous_seeds.const_data_ptr<int64_t>(), draw.const_data_ptr<int64_t>(),
                      static_cast<uint32_t>(stream), seeds.size(0), numel,
                      reinterpret_cast<uint32_t*>(out.mutable_data_ptr<int32_t>()), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor philox_normal_cuda(const at::Tensor& seeds, const at::Tensor& draw, int64_t stream, int64_t numel) {
  check_noise_arguments(seeds, draw, stream, numel);
  const c10::cuda::CUDAGuard guard(seeds.device());
  const at::Tensor contiguous_seeds = seeds.contiguous();
  at::Tensor out = at::empty({seeds.size(0), numel}, seeds.options().dtype(at::kFloat));
  launch_philox_normal(contiguous_seeds.const_data_ptr<int64_t>(), draw.const_data_ptr<int64_t>(),
                       static_cast<uint32_t>(stream), seeds.size(0), numel, out.mutable_data_ptr<float>(),
                       c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CUDA, m) {
  m.impl("philox_words", &vf::philox_words_cuda);
  m.impl("philox_normal", &vf::philox_normal_cuda);
}
