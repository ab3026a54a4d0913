// Every launcher of cuda/<op>.cu: plain pointers to device memory, nothing checked, nothing waited for.
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

}  // namespace vf
