// langevin_update on a GPU.
//
// Grid: x covers the ceil(D / 4) Philox counters of an image in blocks of 256 threads; y covers the images, in a loop
// past 65535. One thread owns one counter: four elements, moved by 16-byte accesses, or singly where rows are ragged.
// Bytes: 12 N D; eps and gradient are read once, eps is written once, its noise never leaves the registers. A seed per
// image and the draw are read from cache after the first block.
// Per counter about 120 integer and 110 fp32 operations. No shared memory, no synchronisation: all threads that find a
// non-finite element of an image write the same number.
#include <algorithm>
#include <cstdint>

#include "../langevin.h"
#include "launchers.h"

namespace vf {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// whole: every row is whole quads, aligned in both tensors.
__global__ void __launch_bounds__(kThreads)
    langevin_update_kernel(const float* gradient, const int64_t* seeds, const int64_t* draw, uint32_t stream,
                           LangevinStep step, bool whole, int64_t N, int64_t D, float* eps, int64_t* nonfinite_at) {
  const int64_t quad = int64_t{blockIdx.x} * kThreads + threadIdx.x, count = D - 4 * quad;
  if (count <= 0) return;
  for (int64_t n = blockIdx.y; n < N; n += gridDim.y) {
    const int64_t at = n * D + 4 * quad;
    const Quad<float> slope = load_quad(gradient + at, count, whole);
    Quad<float> state = load_quad(eps + at, count, whole);
    const NoiseKey key = noise_key(seeds[n], *draw, stream);
    const Quad<float> noise = philox_normal(key, static_cast<uint32_t>(quad));
    bool finite = true;
    VF_UNROLL
    for (int j = 0; j < 4; ++j) {
      state.v[j] = langevin_update(state.v[j], slope.v[j], noise.v[j], step);
      finite = finite && magnitude(state.v[j]) < kInfinity;
    }
    store_quad(state, count, whole, eps + at);
    if (!finite && nonfinite_at[n] < 0) nonfinite_at[n] = key.draw;
  }
}

}  // namespace

void launch_langevin_update(const float* gradient, const int64_t* seeds, const int64_t* draw, uint32_t stream,
                            double step_size, bool prior, int64_t N, int64_t D, float* eps, int64_t* nonfinite_at,
                            cudaStream_t cuda_stream) {
  if (N == 0 || D == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(eps) | reinterpret_cast<uintptr_t>(gradient);
  const bool whole = D % 4 == 0 && address % sizeof(Quad<float>) == 0;
  const int64_t quads = (D + 3) / 4;
  const dim3 grid(static_cast<unsigned>((quads + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min(N, kMaxGridY)));
  VF_LAUNCH(langevin_update_kernel, grid, kThreads, 0, cuda_stream, gradient, seeds, draw, stream,
            langevin_step(step_size, prior), whole, N, D, eps, nonfinite_at);
}

}  // namespace vf
