// philox_words and philox_normal on a GPU.
//
// Grid: x covers the ceil(numel / 4) counters of an image in blocks of 256 threads; y covers the images, in a loop past
// 65535. One thread owns one counter: four elements, written by one 16-byte store, or singly where rows are ragged.
// Bytes: 4 N numel written; a seed per image and the draw read, from cache after the first block.
// Per counter about 120 integer and 90 fp32 operations. No shared memory, no synchronisation.
#include <algorithm>
#include <cstdint>

#include "../philox.h"
#include "launchers.h"

namespace vf {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

__global__ void __launch_bounds__(kThreads)
    philox_words_kernel(const int64_t* seeds, const int64_t* draw, uint32_t stream, int64_t N, int64_t numel,
                        uint32_t* out) {
  const int64_t quad = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (4 * quad >= numel) return;
  for (int64_t n = blockIdx.y; n < N; n += gridDim.y) {
    const NoiseKey key = noise_key(seeds[n], *draw, stream);
    const auto values = philox_words(key, static_cast<uint32_t>(quad));
    store_quad(values, numel - 4 * quad, numel % 4 == 0, out + n * numel + 4 * quad);
  }
}

__global__ void __launch_bounds__(kThreads)
    philox_normal_kernel(const int64_t* seeds, const int64_t* draw, uint32_t stream, int64_t N, int64_t numel,
                         float* out) {
  const int64_t quad = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (4 * quad >= numel) return;
  for (int64_t n = blockIdx.y; n < N; n += gridDim.y) {
    const NoiseKey key = noise_key(seeds[n], *draw, stream);
    const auto values = philox_normal(key, static_cast<uint32_t>(quad));
    store_quad(values, numel - 4 * quad, numel % 4 == 0, out + n * numel + 4 * quad);
  }
}

dim3 grid_over(int64_t N, int64_t numel) {
  const int64_t quads = (numel + 3) / 4;
  return dim3(static_cast<unsigned>((quads + kThreads - 1) / kThreads), static_cast<unsigned>(std::min(N, kMaxGridY)));
}

}  // namespace

void launch_philox_words(const int64_t* seeds, const int64_t* draw, uint32_t stream, int64_t N, int64_t numel,
                         uint32_t* out, cudaStream_t cuda_stream) {
  if (N == 0 || numel == 0) return;
  VF_LAUNCH(philox_words_kernel, grid_over(N, numel), kThreads, 0, cuda_stream, seeds, draw, stream, N, numel, out);
}

void launch_philox_normal(const int64_t* seeds, const int64_t* draw, uint32_t stream, int64_t N, int64_t numel,
                          float* out, cudaStream_t cuda_stream) {
  if (N == 0 || numel == 0) return;
  VF_LAUNCH(philox_normal_kernel, grid_over(N, numel), kThreads, 0, cuda_stream, seeds, draw, stream, N, numel, out);
}

}  // namespace vf
