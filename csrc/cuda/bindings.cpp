// Every op on CUDA tensors: checks, device guard, allocation, launch on torch's current stream, launch check.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "launchers.h"
#include "storage.h"

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

void langevin_update_cuda(at::Tensor& eps, const at::Tensor& gradient, const at::Tensor& seeds, const at::Tensor& draw,
                          at::Tensor& nonfinite_at, int64_t stream, double step_size, bool prior) {
  check_langevin_arguments(eps, gradient, seeds, draw, nonfinite_at, stream, step_size);
  const c10::cuda::CUDAGuard guard(eps.device());
  const at::Tensor slope = gradient.contiguous(), keys = seeds.contiguous();
  launch_langevin_update(slope.const_data_ptr<float>(), keys.const_data_ptr<int64_t>(), draw.const_data_ptr<int64_t>(),
                         static_cast<uint32_t>(stream), step_size, prior, eps.size(0), eps.size(1),
                         eps.mutable_data_ptr<float>(), nonfinite_at.mutable_data_ptr<int64_t>(),
                         c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls launch(T{}) with the type that a kernel has for this scalar type.
template <class Launch>
void with_storage(at::ScalarType type, const Launch& launch) {
  type == at::kBFloat16 ? launch(Bf16{}) : launch(float{});
}

template <class T>
const T* data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

void check_sizes(const at::Tensor& h) {
  for (const int64_t size : h.sizes().slice(1)) {
    TORCH_CHECK_VALUE(size < (int64_t{1} << 30), "h is ", h.sizes(), "; the CUDA kernel takes C, H, W below 2^30.");
  }
}

at::Tensor depthwise_swish_cuda(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, bool upsample) {
  check_depthwise_arguments(h, weight, /*takes_bf16=*/true);
  check_depthwise_bias(h, bias);
  check_sizes(h);
  const c10::cuda::CUDAGuard guard(h.device());
  const int64_t N = h.size(0), C = h.size(1), H = h.size(2), W = h.size(3), scale = upsample ? 2 : 1;
  const at::Tensor source = h.contiguous(at::MemoryFormat::ChannelsLast), packed = weight.contiguous();
  const at::Tensor start = bias.contiguous();
  at::Tensor y = at::empty({N, C, scale * H, scale * W}, h.options(), at::MemoryFormat::ChannelsLast);
  with_storage(h.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_depthwise_swish(data<T>(source), data<T>(packed), data<T>(start), upsample, N, H, W, C, weight.size(0),
                           static_cast<T*>(y.mutable_data_ptr()), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

at::Tensor depthwise_swish_backward_cuda(const at::Tensor& dy, const at::Tensor& h, const at::Tensor& weight,
                                         bool upsample) {
  check_depthwise_arguments(h, weight, /*takes_bf16=*/true);
  check_depthwise_gradient(dy, h, upsample);
  check_sizes(h);
  const c10::cuda::CUDAGuard guard(h.device());
  const int64_t N = h.size(0), C = h.size(1), H = h.size(2), W = h.size(3);
  const at::Tensor source = dy.contiguous(at::MemoryFormat::ChannelsLast), packed = weight.contiguous();
  const at::Tensor slope_of = h.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor dh = at::empty({N, C, H, W}, h.options(), at::MemoryFormat::ChannelsLast);
  with_storage(h.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_depthwise_swish_backward(data<T>(source), data<T>(slope_of), data<T>(packed), upsample, N, H, W, C,
                                    weight.size(0), static_cast<T*>(dh.mutable_data_ptr()),
                                    c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return dh;
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CUDA, m) {
  m.impl("philox_words", &vf::philox_words_cuda);
  m.impl("philox_normal", &vf::philox_normal_cuda);
  m.impl("langevin_update", &vf::langevin_update_cuda);
  m.impl("depthwise_swish", &vf::depthwise_swish_cuda);
  m.impl("depthwise_swish_backward", &vf::depthwise_swish_backward_cuda);
}
