// warp_matrix.cu on the CPU, and the arithmetic of csrc/cuda/swish.h and storage.h element by element.
#include "ptx_emulation.h"
//
#include "../../../csrc/cuda/storage.h"
#include "../../../csrc/cuda/swish.h"
#include "warp_matrix.cu"

extern "C" void warp_matrix(const uint16_t* a, const uint16_t* b, int blocks, int K, float* c) {
  vf::launch_warp_matrix(a, b, blocks, K, c, nullptr);
}

extern "C" void warp_sums(const float* values, int blocks, int threads, float* out) {
  vf::launch_warp_sums(values, blocks, threads, out, nullptr);
}

extern "C" void swish(const float* x, int64_t n, float* y, float* slope) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = vf::swish(x[i]);
    slope[i] = vf::swish_slope(x[i]);
  }
}

extern "C" void swish_by_tanh(const float* x, int64_t n, float* y, float* slope) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = vf::swish_of_half(0.5f * x[i]);
    slope[i] = 0.5f * vf::times_twice_slope_of_half(1.0f, 0.5f * x[i]);
  }
}

extern "C" void halves(const uint32_t* pairs, int64_t n, uint32_t* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = vf::half_of_pair(pairs[i]);
}

extern "C" void round_to_bf16(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = vf::to_element<vf::Bf16>(x[i]).bits;
}
