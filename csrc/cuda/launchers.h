// Every launcher of cuda/<op>.cu: plain pointers to device memory, nothing checked, nothing waited for.
#pragma once

#include <cstdint>

#include "launch.h"

namespace vf {

// seeds [N], draw [1] -> out [N, numel], contiguous and 16-byte aligned
void launch_philox_words(const int64_t* seeds, const int64_t* draw, uint32_t stream, int64_t N, int64_t numel,
                         uint32_t* out, cudaStream_t cuda_stream);
void launch_philox_normal(const int64_t* seeds, const int64_t* draw, uint32_t stream, int64_t N, int64_t numel,
                          float* out, cudaStream_t cuda_stream);

}  // namespace vf
