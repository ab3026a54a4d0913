// Every op on CUDA tensors: checks, device guard, allocation, launch on torch's current stream, launch check.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

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

// Calls launch(T{}) with the kernels' storage type for this scalar type.
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

std::tuple<at::Tensor, at::Tensor> power_iteration_cuda(const at::Tensor& weight, const at::Tensor& u,
                                                        const at::Tensor& v, int64_t iterations, double eps) {
  check_power_iteration_arguments(weight, u, v, iterations, eps);
  const int64_t B = weight.size(0), M = weight.size(1), K = weight.size(2), most = int64_t{1} << 30;
  TORCH_CHECK_VALUE(M < most && K < most && B * M < most && B * K < most, "weight is ", weight.sizes(),
                    "; the CUDA kernel takes M, K, B M and B K below 2^30.");
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor left = u.clone(at::MemoryFormat::Contiguous);
  if (iterations == 0) return {left, v.clone(at::MemoryFormat::Contiguous)};
  const at::Tensor rows = weight.contiguous();
  at::Tensor right = at::empty({B, K}, v.options());
  at::Tensor scratch = at::empty({power_iteration_scratch(B, static_cast<int>(M), static_cast<int>(K))}, v.options());
  launch_power_iteration(rows.const_data_ptr<float>(), B, static_cast<int>(M), static_cast<int>(K), iterations,
                         static_cast<float>(eps), scratch.mutable_data_ptr<float>(), left.mutable_data_ptr<float>(),
                         right.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {left, right};
}

// Contiguous in this memory format and 16-byte aligned; a view of a larger tensor may be neither.
at::Tensor aligned(const at::Tensor& tensor, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  const at::Tensor packed = tensor.contiguous(format);
  return reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0 ? packed : packed.clone(format);
}

std::tuple<at::Tensor, at::Tensor> inverted_residual_cuda(const at::Tensor& x, const at::Tensor& weight,
                                                          const at::Tensor& weight_t, const at::Tensor& bias,
                                                          bool with_h2) {
  const int64_t hidden = check_inverted_residual(x, weight, "weight", 2);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  check_tensor(weight_t, "weight_t", {hidden / 32, 96 * C + 1920}, x, at::kBFloat16);
  check_tensor(bias, "bias", {C}, x, at::kBFloat16);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor source = aligned(x, at::MemoryFormat::ChannelsLast), packed = aligned(weight), start = aligned(bias);
  at::Tensor s = at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor h2 = with_h2 ? at::empty({N, hidden, H, W}, x.options(), at::MemoryFormat::ChannelsLast)
                          : at::empty({0}, x.options());
  launch_inverted_residual(data<Bf16>(source), data<Bf16>(packed), data<Bf16>(start), N, H, W, C, hidden,
                           static_cast<Bf16*>(s.mutable_data_ptr()),
                           with_h2 ? static_cast<Bf16*>(h2.mutable_data_ptr()) : nullptr,
                           c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {s, h2};
}

at::Tensor inverted_residual_backward_cuda(const at::Tensor& ds, const at::Tensor& x, const at::Tensor& h2,
                                           const at::Tensor& weight_t) {
  const int64_t hidden = check_inverted_residual(x, weight_t, "weight_t", 3);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  check_tensor(ds, "ds", x.sizes(), x, at::kBFloat16);
  check_tensor(h2, "h2", {N, hidden, H, W}, x, at::kBFloat16);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto channels_last = at::MemoryFormat::ChannelsLast;
  const at::Tensor images[] = {aligned(ds, channels_last), aligned(x, channels_last), aligned(h2, channels_last)};
  const at::Tensor packed = aligned(weight_t);
  at::Tensor dx = at::empty(x.sizes(), x.options(), channels_last);
  launch_inverted_residual_backward(data<Bf16>(images[0]), data<Bf16>(images[1]), data<Bf16>(images[2]),
                                    data<Bf16>(packed), N, H, W, C, hidden, static_cast<Bf16*>(dx.mutable_data_ptr()),
                                    c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return dx;
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CUDA, m) {
  m.impl("philox_words", &vf::philox_words_cuda);
  m.impl("philox_normal", &vf::philox_normal_cuda);
  m.impl("langevin_update", &vf::langevin_update_cuda);
  m.impl("depthwise_swish", &vf::depthwise_swish_cuda);
  m.impl("depthwise_swish_backward", &vf::depthwise_swish_backward_cuda);
  m.impl("power_iteration", &vf::power_iteration_cuda);
  m.impl("inverted_residual", &vf::inverted_residual_cuda);
  m.impl("inverted_residual_backward", &vf::inverted_residual_backward_cuda);
}
