// langevin_update on CPU tensors: blocks of 16 Philox counters, which the compiler vectorises.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../checks.h"
#include "../langevin.h"
#include "clones.h"

namespace vf {
namespace {

constexpr int64_t kLanes = 16;          // counters per block
constexpr int64_t kBlock = 4 * kLanes;  // elements per block
constexpr int64_t kBlocksPerTask = 256;

// Updates one block of an image; returns whether the result is finite.
VF_CLONES bool update_block(const NoiseKey& key, uint32_t quad, const LangevinStep& step, const float* gradient,
                            float* eps) {
  float noise[kBlock];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const Quad<float> normals = philox_normal(key, quad + lane);
    for (int j = 0; j < 4; ++j) noise[4 * lane + j] = normals.v[j];
  }
  uint32_t largest = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    eps[i] = langevin_update(eps[i], gradient[i], noise[i], step);
    largest = std::max(largest, magnitude(eps[i]));
  }
  return largest < kInfinity;
}

// The last block of an image, which may be partial.
bool update_ragged(const NoiseKey& key, uint32_t quad, const LangevinStep& step, const float* gradient, int64_t count,
                   float* eps) {
  float state[kBlock] = {}, slope[kBlock] = {};
  std::copy_n(eps, count, state);
  std::copy_n(gradient, count, slope);
  const bool finite = update_block(key, quad, step, slope, state);
  std::copy_n(state, count, eps);
  return finite;
}

void langevin_update_cpu(at::Tensor& eps, const at::Tensor& gradient, const at::Tensor& seeds, const at::Tensor& draw,
                         at::Tensor& nonfinite_at, int64_t stream, double step_size, bool prior) {
  check_langevin_arguments(eps, gradient, seeds, draw, nonfinite_at, stream, step_size);
  const at::Tensor slope = gradient.contiguous(), keys = seeds.contiguous();
  const LangevinStep step = langevin_step(step_size, prior);
  const int64_t N = eps.size(0), D = eps.size(1), blocks = (D + kBlock - 1) / kBlock;
  const int64_t* seed = keys.const_data_ptr<int64_t>();
  const int64_t k = *draw.const_data_ptr<int64_t>();
  const float* from = slope.const_data_ptr<float>();
  float* state = eps.mutable_data_ptr<float>();
  std::vector<std::atomic<bool>> broken(N);  // threads share images
  at::parallel_for(0, N * blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / blocks, e = index % blocks * kBlock, at = n * D + e, count = std::min(kBlock, D - e);
      const NoiseKey key = noise_key(seed[n], k, static_cast<uint32_t>(stream));
      const uint32_t quad = static_cast<uint32_t>(e / 4);
      const bool finite = count == kBlock ? update_block(key, quad, step, from + at, state + at)
                                          : update_ragged(key, quad, step, from + at, count, state + at);
      if (!finite) broken[n].store(true, std::memory_order_relaxed);
    }
  });
  int64_t* first = nonfinite_at.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < N; ++n) {
    if (broken[n].load(std::memory_order_relaxed) && first[n] < 0) first[n] = static_cast<uint32_t>(k);
  }
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("langevin_update", &vf::langevin_update_cpu);
}
