// philox_words and philox_normal on CPU tensors: blocks of 16 counters, which the compiler vectorises.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../philox.h"
#include "clones.h"

namespace vf {
namespace {

constexpr int64_t kLanes = 16;          // counters per block
constexpr int64_t kBlock = 4 * kLanes;  // elements per block
constexpr int64_t kBlocksPerTask = 256;

VF_CLONES void words_block(const NoiseKey& key, uint32_t quad, uint32_t* __restrict__ out) {
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const Quad<uint32_t> words = philox_words(key, quad + lane);
    for (int j = 0; j < 4; ++j) out[4 * lane + j] = words.v[j];
  }
}

VF_CLONES void normal_block(const NoiseKey& key, uint32_t quad, float* __restrict__ out) {
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const Quad<float> normals = philox_normal(key, quad + lane);
    for (int j = 0; j < 4; ++j) out[4 * lane + j] = normals.v[j];
  }
}

// out[n, e] for all n < N, e < numel; the last block of an image may be ragged.
template <class T>
void fill(void (*block)(const NoiseKey&, uint32_t, T*), const at::Tensor& seeds, const at::Tensor& draw, int64_t stream,
          int64_t numel, T* out) {
  const at::Tensor contiguous_seeds = seeds.contiguous();
  const int64_t* seed = contiguous_seeds.const_data_ptr<int64_t>();
  const int64_t k = *draw.const_data_ptr<int64_t>();
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  at::parallel_for(0, seeds.size(0) * blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    T ragged[kBlock];
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / blocks, e = index % blocks * kBlock;
      const int64_t count = std::min(kBlock, numel - e);
      T* target = out + n * numel + e;
      block(noise_key(seed[n], k, static_cast<uint32_t>(stream)), static_cast<uint32_t>(e / 4),
            count == kBlock ? target : ragged);
      if (count < kBlock) std::copy_n(ragged, count, target);
    }
  });
}

at::Tensor philox_words_cpu(const at::Tensor& seeds, const at::Tensor& draw, int64_t stream, int64_t numel) {
  check_noise_arguments(seeds, draw, stream, numel);
  at::Tensor out = at::empty({seeds.size(0), numel}, seeds.options().dtype(at::kInt));
  fill(words_block, seeds, draw, stream, numel, reinterpret_cast<uint32_t*>(out.mutable_data_ptr<int32_t>()));
  return out;
}

at::Tensor philox_normal_cpu(const at::Tensor& seeds, const at::Tensor& draw, int64_t stream, int64_t numel) {
  check_noise_arguments(seeds, draw, stream, numel);
  at::Tensor out = at::empty({seeds.size(0), numel}, seeds.options().dtype(at::kFloat));
  fill(normal_block, seeds, draw, stream, numel, out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("philox_words", &vf::philox_words_cpu);
  m.impl("philox_normal", &vf::philox_normal_cpu);
}
