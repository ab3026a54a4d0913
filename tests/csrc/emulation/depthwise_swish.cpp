// csrc/cuda/depthwise_swish.cu on the CPU: a library for tests/csrc/test_depthwise_swish_cuda.py, and a program for the
// sanitisers, which runs every kernel once and exits with 1 when a result is not that of plain loops.
#include "ptx_emulation.h"
//
#include "../../../csrc/cuda/depthwise_swish.cu"

#include <vector>

#define VF_DRIVERS(suffix, T)                                                                                          \
  extern "C" void forward_##suffix(const T* h, const T* weight, const T* bias, bool upsample, int64_t N, int H, int W, \
                                   int C, int K, T* y) {                                                               \
    vf::launch_depthwise_swish(h, weight, bias, upsample, N, H, W, C, K, y, nullptr);                                  \
  }                                                                                                                    \
  extern "C" void backward_##suffix(const T* dy, const T* h, const T* weight, bool upsample, int64_t N, int H, int W,  \
                                    int C, int K, T* dh) {                                                             \
    vf::launch_depthwise_swish_backward(dy, h, weight, upsample, N, H, W, C, K, dh, nullptr);                          \
  }
VF_DRIVERS(float, float)
VF_DRIVERS(bf16, vf::Bf16)

namespace {

template <class T>
std::vector<T> random_vector(size_t size) {
  static uint32_t state = 1;
  std::vector<T> values(size);
  for (T& value : values) {
    state = state * 1664525u + 1013904223u;
    value = vf::to_element<T>(static_cast<float>(state >> 8) * 0x1p-22f - 2.0f);
  }
  return values;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Shape {
  int64_t N;
  int H, W, C, K, scale;
};

// Calls body(output pixel, input pixel, tap) for each tap inside the image; pixels without channels.
template <class Body>
void for_each_tap(const Shape& s, const Body& body) {
  const int H = s.scale * s.H, W = s.scale * s.W;
  for (int n = 0; n < s.N; ++n) {
    for (int i = 0; i < H * W; ++i) {
      for (int k = 0; k < s.K * s.K; ++k) {
        const int y = i / W + k / s.K - s.K / 2, x = i % W + k % s.K - s.K / 2;
        if (y < 0 || y >= H || x < 0 || x >= W) continue;
        body(n * H * W + i, (n * s.H + y / s.scale) * s.W + x / s.scale, k);
      }
    }
  }
}

template <class T>
bool agree(const std::vector<T>& result, const std::vector<double>& expected) {
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-2;
  for (size_t i = 0; i < result.size(); ++i) {
    if (!(std::abs(vf::to_float(result[i]) - expected[i]) <= tolerance * (1 + std::abs(expected[i])))) return false;
  }
  return true;
}

template <class T>
bool runs_right(const Shape& s) {
  const size_t inputs = s.N * s.H * s.W * s.C, outputs = inputs * s.scale * s.scale;
  const auto h = random_vector<T>(inputs), dy = random_vector<T>(outputs);
  const auto weight = random_vector<T>(s.K * s.K * s.C), bias = random_vector<T>(s.C);
  std::vector<T> y(outputs), dh(inputs);
  vf::launch_depthwise_swish(h.data(), weight.data(), bias.data(), s.scale == 2, s.N, s.H, s.W, s.C, s.K, y.data(),
                             nullptr);
  vf::launch_depthwise_swish_backward(dy.data(), h.data(), weight.data(), s.scale == 2, s.N, s.H, s.W, s.C, s.K,
                                      dh.data(), nullptr);
  std::vector<double> expected_y(outputs), expected_dh(inputs);
  for (size_t i = 0; i < outputs; ++i) expected_y[i] = vf::to_float(bias[i % s.C]);
  for_each_tap(s, [&](int out, int in, int k) {
    for (int c = 0; c < s.C; ++c) {
      const double at = vf::to_float(h[in * s.C + c]), tap = vf::to_float(weight[k * s.C + c]);
      expected_y[out * s.C + c] += tap * at * sigmoid(at);
      expected_dh[in * s.C + c] +=
          tap * vf::to_float(dy[out * s.C + c]) * sigmoid(at) * (1 + at * (1 - sigmoid(at)));
    }
  });
  return agree(y, expected_y) && agree(dh, expected_dh);
}

}  // namespace

int main() {
  bool right = true;
  for (const int K : {3, 5, 7}) {
    for (const int scale : {1, 2}) {
      right &= runs_right<float>({1, 9, 17, 33, K, scale});
      right &= runs_right<vf::Bf16>({2, 3, 5, 70, K, scale});
    }
  }
  return right ? 0 : 1;
}
