// csrc/cuda/power_iteration.cu on the CPU: a library for tests/csrc/test_power_iteration_cuda.py, and a program for the
// sanitisers, which runs every kernel once and exits with 1 when a result is not that of plain loops.
#include "cuda_emulation.h"
//
#include "../../../csrc/cuda/power_iteration.cu"

#include <limits>
#include <vector>

// u and v in place; scratch is of the exact size, and NaN.
extern "C" void power_iteration(const float* weight, int64_t B, int M, int K, int64_t iterations, float eps, float* u,
                                float* v) {
  std::vector<float> scratch(vf::power_iteration_scratch(B, M, K), std::numeric_limits<float>::quiet_NaN());
  vf::launch_power_iteration(weight, B, M, K, iterations, eps, scratch.data(), u, v, nullptr);
}

extern "C" int widest() { return vf::kWidest; }

namespace {

constexpr float kEps = 1e-3f;

std::vector<float> random_vector(size_t size) {
  static uint32_t state = 1;
  std::vector<float> values(size);
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) * 0x1p-22f - 2.0f;
  }
  return values;
}

// out[i] = sum over j of weight[i row_step + j column_step] in[j], normalised.
std::vector<double> product(const float* weight, int rows, int columns, int row_step, int column_step,
                            const std::vector<double>& in) {
  std::vector<double> out(rows);
  double squares = 0;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) out[i] += weight[int64_t{i} * row_step + int64_t{j} * column_step] * in[j];
    squares += out[i] * out[i];
  }
  for (double& value : out) value /= std::max(std::sqrt(squares), static_cast<double>(kEps));
  return out;
}

bool agree(const float* result, const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!(std::abs(result[i] - expected[i]) <= 1e-5)) return false;
  }
  return true;
}

bool runs_right(int64_t B, int M, int K, int iterations) {
  const auto weight = random_vector(B * M * K), start = random_vector(B * M);
  std::vector<float> u = start, v(B * K, std::numeric_limits<float>::quiet_NaN());
  power_iteration(weight.data(), B, M, K, iterations, kEps, u.data(), v.data());
  bool right = true;
  for (int64_t b = 0; b < B; ++b) {
    const float* matrix = weight.data() + b * M * K;
    std::vector<double> left(start.begin() + b * M, start.begin() + (b + 1) * M), right_vector;
    for (int i = 0; i < iterations; ++i) {
      right_vector = product(matrix, K, M, 1, K, left);
      left = product(matrix, M, K, K, 1, right_vector);
    }
    right &= agree(u.data() + b * M, left) && agree(v.data() + b * K, right_vector);
  }
  return right;
}

}  // namespace

int main() {
  // Each width of a pass, whole quads and ragged ones, several strips, and panels.
  bool right = runs_right(2, 19, 140, 2) && runs_right(1, 9, 27, 2) && runs_right(1, 13, 516, 2);
  right = right && runs_right(1, 11, 1029, 1) && runs_right(1, 5, 4100, 1) && runs_right(1, 2, vf::kWidest + 5, 1);
  return right ? 0 : 1;
}
