// Every launcher of cuda/<op>.cu: takes plain device pointers, checks nothing, does not synchronise.
#pragma once

#include <cstdint>

#include "launch.h"

namespace vf {

struct Bf16;  // of storage.h

// seeds [N], draw [1] -> out [N, numel], contiguous and 16-byte aligned
void launch_philox_words(const int64_t* seeds, const int64_t* draw, uint32_t stream, int64_t N, int64_t numel,
                         uint32_t* out, cudaStream_t cuda_stream);
void launch_philox_normal(const int64_t* seeds, const int64_t* draw, uint32_t stream, int64_t N, int64_t numel,
                          float* out, cudaStream_t cuda_stream);

// gradient [N, D], seeds [N], draw [1]; eps [N, D] and nonfinite_at [N] in place; all contiguous
void launch_langevin_update(const float* gradient, const int64_t* seeds, const int64_t* draw, uint32_t stream,
                            double step_size, bool prior, int64_t N, int64_t D, float* eps, int64_t* nonfinite_at,
                            cudaStream_t cuda_stream);

// T: float or Bf16. NHWC: h and dh [N, H, W, C], y and dy likewise, or [N, 2H, 2W, C] upsampled; weight [K, K, C], K
// odd; bias [C]; all contiguous
template <class T>
void launch_depthwise_swish(const T* h, const T* weight, const T* bias, bool upsample, int64_t N, int H, int W, int C,
                            int K, T* y, cudaStream_t cuda_stream);
template <class T>
void launch_depthwise_swish_backward(const T* dy, const T* h, const T* weight, bool upsample, int64_t N, int H, int W,
                                     int C, int K, T* dh, cudaStream_t cuda_stream);

// NHWC: x, s, ds, dx [N, H, W, C], h2 [N, H, W, hidden]; project_bias [C]; weight and weight_t of
// ops/inverted_residual.py pack_inverted_residual; C 32, 64 or 128, hidden a multiple of 32; all contiguous and 16-byte
// aligned. A null h2 is not written.
void launch_inverted_residual(const Bf16* x, const Bf16* weight, const Bf16* project_bias, int64_t N, int H, int W,
                              int C, int hidden, Bf16* s, Bf16* h2, cudaStream_t cuda_stream);
void launch_inverted_residual_backward(const Bf16* ds, const Bf16* x, const Bf16* h2, const Bf16* weight_t, int64_t N,
                                       int H, int W, int C, int hidden, Bf16* dx, cudaStream_t cuda_stream);

// weight [B, M, K], u [B, M] and v [B, K] in place; only u is read beforehand; all contiguous, M, K > 0. scratch:
// power_iteration_scratch(B, M, K) floats.
int64_t power_iteration_scratch(int64_t B, int M, int K);
void launch_power_iteration(const float* weight, int64_t B, int M, int K, int64_t iterations, float eps,
                            float* scratch, float* u, float* v, cudaStream_t cuda_stream);

}  // namespace vf
