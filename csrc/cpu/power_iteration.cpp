// power_iteration on CPU tensors: one matrix per thread, or, with fewer matrices than threads, all threads share the
// rows of one matrix after another.
//
// Rows are summed in chunks and the chunks in order, so the bits depend neither on the number of threads nor on the
// batch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../checks.h"

#define VF_KERNELS "power_iteration_kernels.h"
#include "each_isa.h"

namespace vf::power {
namespace {

constexpr int64_t kMostLanes = 16;
constexpr int64_t kChunk = 64;  // rows; a multiple of the kernel's kRows

struct Kernels {
  decltype(&portable::run_rows) run_rows;
  decltype(&portable::normalise) normalise;
};

Kernels kernels() {
  if (isa() == Isa::avx512) return {avx512::run_rows, avx512::normalise};
  if (isa() == Isa::avx2) return {avx2::run_rows, avx2::normalise};
  return {portable::run_rows, portable::normalise};
}

int64_t padded(int64_t size) { return (size + kMostLanes - 1) / kMostLanes * kMostLanes; }

// All iterations for one matrix [M, K], K padded, while it is in the cache. Starts from t [padded(M)], which holds u
// and zeros, and leaves u there and v in v [K].
void iterate(const float* weight, int64_t M, int64_t K, int64_t iterations, float eps, float* t, float* v) {
  const Kernels run = kernels();
  const int64_t chunks = (M + kChunk - 1) / kChunk;
  at::Tensor scratch = at::empty({chunks * K}, at::kFloat);
  float* sums = scratch.mutable_data_ptr<float>();  // [chunks, K]
  const auto pass = [&](const float* v, bool last) {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        run.run_rows(weight, K, c * kChunk, std::min(M, (c + 1) * kChunk), v, t, last ? nullptr : sums + c * K);
      }
    });
  };
  float length = 1;
  pass(nullptr, false);
  for (int64_t i = 1; i <= iterations; ++i) {
    run.normalise(sums, chunks, K, length, eps, v);
    pass(v, i == iterations);
    length = run.normalise(t, 1, padded(M), 1, eps, t);
  }
}

// A contiguous copy with zeros behind every row.
at::Tensor with_padded_rows(const at::Tensor& x) {
  return at::constant_pad_nd(x.contiguous(), {0, padded(x.size(-1)) - x.size(-1)});
}

std::tuple<at::Tensor, at::Tensor> power_iteration_cpu(const at::Tensor& weight, const at::Tensor& u,
                                                       const at::Tensor& v, int64_t iterations, double eps) {
  check_power_iteration_arguments(weight, u, v, iterations, eps);
  if (iterations == 0) return {u.clone(at::MemoryFormat::Contiguous), v.clone(at::MemoryFormat::Contiguous)};
  const int64_t B = weight.size(0), M = weight.size(1), K = weight.size(2);
  const at::Tensor rows = K == padded(K) ? weight.contiguous() : with_padded_rows(weight);
  at::Tensor left = with_padded_rows(u), right = at::empty({B, padded(K)}, v.options());
  const float* from = rows.const_data_ptr<float>();
  float *t = left.mutable_data_ptr<float>(), *next = right.mutable_data_ptr<float>();
  // A grain of the whole batch leaves the threads to the rows: nested parallel loops run serially.
  const int64_t grain = B < at::get_num_threads() ? std::max<int64_t>(B, 1) : 1;
  at::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      iterate(from + b * M * padded(K), M, padded(K), iterations, static_cast<float>(eps), t + b * padded(M),
              next + b * padded(K));
    }
  });
  return {left.narrow(1, 0, M).contiguous(), right.narrow(1, 0, K).contiguous()};
}

}  // namespace
}  // namespace vf::power

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) { m.impl("power_iteration", &vf::power::power_iteration_cpu); }
