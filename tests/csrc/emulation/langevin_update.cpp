// csrc/cuda/langevin_update.cu on the CPU: a library for tests/csrc/test_langevin_update_cuda.py, and a program that runs
// the kernel on memory of the exact size, for AddressSanitizer.
#define VF_THREADS_NEVER_WAIT
#include "cuda_emulation.h"
//
#include "../../../csrc/cuda/langevin_update.cu"

#include <vector>

extern "C" void langevin_update(const float* gradient, const int64_t* seeds, const int64_t* draw, uint32_t stream,
                                double step_size, bool prior, int64_t N, int64_t D, float* eps,
                                int64_t* nonfinite_at) {
  vf::launch_langevin_update(gradient, seeds, draw, stream, step_size, prior, N, D, eps, nonfinite_at, nullptr);
}

int main() {
  const int64_t N = 3, draw = 1;
  for (const int64_t D : {1, 7, 64, 1027}) {
    std::vector<float> eps(N * D), gradient(N * D, 1.0f);
    std::vector<int64_t> seeds(N, 5), nonfinite_at(N, -1);
    langevin_update(gradient.data(), seeds.data(), &draw, 0, 0.5, true, N, D, eps.data(), nonfinite_at.data());
    for (const int64_t at : nonfinite_at) {
      if (at != -1) return 1;
    }
  }
  return 0;
}
