// csrc/cuda/philox_normal.cu on the CPU, for tests/csrc/test_noise_cuda.py.
#define VF_THREADS_NEVER_WAIT
#include "cuda_emulation.h"
//
#include "../../../csrc/cuda/philox_normal.cu"

extern "C" void philox_words(const int64_t* seeds, const int64_t* draw, uint32_t stream, int64_t N, int64_t numel,
                             uint32_t* out) {
  vf::launch_philox_words(seeds, draw, stream, N, numel, out, nullptr);
}

extern "C" void philox_normal(const int64_t* seeds, const int64_t* draw, uint32_t stream, int64_t N, int64_t numel,
                              float* out) {
  vf::launch_philox_normal(seeds, draw, stream, N, numel, out, nullptr);
}

// z [n, 2] from words [n, 2]: the words that no seed reaches at will.
extern "C" void box_muller(const uint32_t* words, int64_t n, float* z) {
  for (int64_t i = 0; i < n; ++i) {
    const vf::NormalPair pair = vf::box_muller(words[2 * i], words[2 * i + 1]);
    z[2 * i] = pair.z0;
    z[2 * i + 1] = pair.z1;
  }
}
