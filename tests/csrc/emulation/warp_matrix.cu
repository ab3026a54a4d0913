// Kernels that use every warp function of csrc/cuda/ptx.h and of the emulation, for tests/csrc/test_cuda_emulation.py.
#include <cstdint>

#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/ptx.h"

namespace vf {
namespace {

// C [16, 8] fp32 = A [16, K] B [K, 8], bf16 row-major, K a multiple of 16: one warp per matrix, one block per two.
__global__ void warp_matrix_kernel(const uint16_t* a, const uint16_t* b, int K, float* c) {
  struct alignas(16) Tiles {
    uint16_t a[16][16], b[16][8];
  };
  VF_DYNAMIC_SHARED(Tiles, tiles);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int matrix = static_cast<int>(blockIdx.x) * 2 + warp;
  Tiles& tile = tiles[warp];
  FragmentC sum{};
  for (int k = 0; k < K; k += 16) {
    for (int i = lane; i < 256; i += 32) tile.a[i / 16][i % 16] = a[(matrix * 16 + i / 16) * K + k + i % 16];
    for (int i = lane; i < 128; i += 32) tile.b[i / 8][i % 8] = b[(matrix * K + k + i / 8) * 8 + i % 8];
    __syncwarp();
    const FragmentA left = load_matrices(&tile.a[lane % 16][lane / 16 * 8]);
    const FragmentA right = load_matrices_transposed(&tile.b[lane % 16][0]);
    multiply_add(sum, left, {{right.v[0], right.v[1]}});
    __syncwarp();
  }
  for (int i = 0; i < 4; ++i) c[(matrix * 16 + lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = sum.v[i];
}

// out [blocks, 4]: of the last warp of each block its sum by xor, its sum by down and its lane 5's value; the block's
// sum through shared memory.
__global__ void warp_sums_kernel(const float* values, float* out) {
  using Sums = float[8];
  VF_SHARED(Sums, sums);
  const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float value = values[blockIdx.x * blockDim.x + threadIdx.x];
  float by_xor = value, by_down = value;
  for (int offset = 16; offset > 0; offset /= 2) {
    by_xor += __shfl_xor_sync(0xffffffffu, by_xor, offset);
    by_down += __shfl_down_sync(0xffffffffu, by_down, offset);
  }
  const float fifth = __shfl_sync(0xffffffffu, value, 5);
  if (threadIdx.x % 32 == 0) sums[warp] = by_down;
  __syncthreads();
  if (threadIdx.x != blockDim.x - 1) return;
  float all = 0.0f;
  for (unsigned w = 0; w < warps; ++w) all += sums[w];
  float* mine = out + 4 * blockIdx.x;
  mine[0] = by_xor;
  mine[1] = sums[warp];
  mine[2] = fifth;
  mine[3] = all;
}

}  // namespace

void launch_warp_matrix(const uint16_t* a, const uint16_t* b, int blocks, int K, float* c, cudaStream_t cuda_stream) {
  VF_LAUNCH(warp_matrix_kernel, blocks, 64, 1536, cuda_stream, a, b, K, c);
}

void launch_warp_sums(const float* values, int blocks, int threads, float* out, cudaStream_t cuda_stream) {
  VF_LAUNCH(warp_sums_kernel, blocks, threads, 0, cuda_stream, values, out);
}

}  // namespace vf
