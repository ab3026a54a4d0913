// csrc/cuda/inverted_residual.cu on the CPU: a library for tests/csrc/test_inverted_residual_cuda.py, and a program for the
// sanitisers, which runs every kernel once and exits with 1 when a result is not that of plain loops.
#include "ptx_emulation.h"
//
#include "../../../csrc/cuda/inverted_residual.cu"

#include <vector>

using vf::Bf16;

extern "C" void forward(const Bf16* x, const Bf16* weight, const Bf16* bias, int64_t N, int H, int W, int C, int hidden,
                        Bf16* s, Bf16* h2) {
  vf::launch_inverted_residual(x, weight, bias, N, H, W, C, hidden, s, h2, nullptr);
}

extern "C" void backward(const Bf16* ds, const Bf16* x, const Bf16* h2, const Bf16* weight_t, int64_t N, int H, int W,
                         int C, int hidden, Bf16* dx) {
  vf::launch_inverted_residual_backward(ds, x, h2, weight_t, N, H, W, C, hidden, dx, nullptr);
}

template <int C>
int64_t shared_bytes_of(bool backward) {
  return backward ? sizeof(vf::tile::BackwardShared<C>) : sizeof(vf::tile::ForwardShared<C>);
}

// Of a block.
extern "C" int64_t shared_bytes(int C, bool backward) {
  if (C == 32) return shared_bytes_of<32>(backward);
  return C == 64 ? shared_bytes_of<64>(backward) : shared_bytes_of<128>(backward);
}

namespace {

constexpr int64_t N = 1;
constexpr int H = 9, W = 18, C = 32, hidden = 64, pixels = N * H * W;  // four blocks, two chunks

using Numbers = std::vector<double>;
using Stored = std::vector<Bf16>;

Stored random_numbers(size_t size, float scale) {
  static uint32_t state = 1;
  Stored values(size);
  for (Bf16& value : values) {
    state = state * 1664525u + 1013904223u;
    value = vf::to_element<Bf16>((static_cast<float>(state >> 8) * 0x1p-23f - 1.0f) * scale);
  }
  return values;
}

Numbers exact(const Stored& stored) {
  Numbers values;
  for (const Bf16 value : stored) values.push_back(vf::to_float(value));
  return values;
}

// [rows, columns] -> [columns, rows]
template <class T>
std::vector<T> transposed(const std::vector<T>& matrix, size_t columns) {
  const size_t rows = matrix.size() / columns;
  std::vector<T> result(matrix.size());
  for (size_t i = 0; i < matrix.size(); ++i) result[i % columns * rows + i / columns] = matrix[i];
  return result;
}

// The 32 x 32 of weight [rows, columns] from (row, column) on, times `scale`, as lanes read it: as left operand, where
// i is half of the rows and half of the columns, or as right one, where it is 8 rows.
void pack(const Stored& weight, int columns, int row, int column, float scale, bool left, vf::tile::Tile& tile) {
  for (int i = 0; i < 4; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int e = 0; e < 8; ++e) {
        const int r = left ? 4 * g + i / 2 * 2 + e / 2 % 2 : g / 2 * 8 + 2 * i + g % 2;
        const int k = left ? 8 * q + i % 2 * 4 + e / 4 * 2 + e % 2 : 8 * q + e;
        const float value = scale * vf::to_float(weight[(row + r) * columns + column + k]);
        reinterpret_cast<Bf16*>(&tile[i][lane])[e] = vf::to_element<Bf16>(value);
      }
    }
  }
}

// Of channels 32 c .. 32 c + 31 the window, flipped or with its bias, and half of b1.
template <class Chunk>
void pack_window(const Stored& taps, const Stored* bd, const Stored& b1, int c, Chunk& chunk) {
  for (int channel = 32 * c; channel < 32 * c + 32; ++channel) {
    for (int i = 0; i < 28; ++i) {
      const int tap = bd == nullptr ? 24 - i : i;
      const float value = i < 25 ? vf::to_float(taps[tap * hidden + channel]) : 0.0f;
      chunk.window[i / 4][channel % 32].v[i % 4] = vf::bits_of(value);
    }
    if (bd != nullptr) chunk.window[6][channel % 32].v[1] = vf::bits_of(vf::to_float((*bd)[channel]));
    for (int twice = 0; twice < 2; ++twice) {
      const int place = bd != nullptr ? 2 * (channel % 2) + twice : channel % 2 + 2 * twice;
      chunk.expand_bias[channel % 32 / 2].v[place] = vf::bits_of(0.5f * vf::to_float(b1[channel]));
    }
  }
}

// bias + x [pixels, inputs] times the transpose of weight [outputs, inputs].
Numbers product(const Numbers& x, const Numbers& weight, const Numbers& bias) {
  const size_t outputs = bias.size(), inputs = weight.size() / outputs;
  Numbers y(pixels * outputs);
  for (size_t i = 0; i < y.size(); ++i) {
    y[i] = bias[i % outputs];
    for (size_t k = 0; k < inputs; ++k) y[i] += x[i / outputs * inputs + k] * weight[i % outputs * inputs + k];
  }
  return y;
}

// The 5x5 window over [H, W, hidden]; flipped: its transpose.
Numbers window(const Numbers& x, const Numbers& taps, const Numbers& bias, bool flipped) {
  Numbers y(x.size());
  for (int i = 0; i < pixels; ++i) {
    for (int k = 0; k < 25; ++k) {
      const int row = i / W + k / 5 - 2, column = i % W + k % 5 - 2;
      if (row < 0 || row >= H || column < 0 || column >= W) continue;
      const int tap = flipped ? 24 - k : k;
      for (int c = 0; c < hidden; ++c) y[i * hidden + c] += x[(row * W + column) * hidden + c] * taps[tap * hidden + c];
    }
    for (int c = 0; c < hidden; ++c) y[i * hidden + c] += bias[c];
  }
  return y;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

Numbers swish(Numbers h) {
  for (double& x : h) x *= sigmoid(x);
  return h;
}

Numbers times_slope(Numbers y, const Numbers& h) {
  for (size_t i = 0; i < y.size(); ++i) y[i] *= sigmoid(h[i]) * (1 + h[i] * (1 - sigmoid(h[i])));
  return y;
}

bool agree(const Stored& result, const Numbers& expected) {
  for (size_t i = 0; i < result.size(); ++i) {
    if (!(std::abs(vf::to_float(result[i]) - expected[i]) <= 2e-2 * (1 + std::abs(expected[i])))) return false;
  }
  return true;
}

}  // namespace

int main() {
  const Stored x = random_numbers(pixels * C, 1), ds = random_numbers(pixels * C, 1);
  const Stored W1 = random_numbers(hidden * C, 0.3f), b1 = random_numbers(hidden, 1);
  const Stored taps = random_numbers(25 * hidden, 0.5f), bd = random_numbers(hidden, 1);
  const Stored W2 = random_numbers(C * hidden, 0.3f), b2 = random_numbers(C, 1);
  Stored s(pixels * C), h2(pixels * hidden), dx(pixels * C);
  const Stored W1_t = transposed(W1, C), W2_t = transposed(W2, hidden);
  std::vector<vf::tile::ForwardChunk<C>> weight(hidden / 32);
  std::vector<vf::tile::BackwardChunk<C>> weight_t(hidden / 32);
  for (int c = 0; c < hidden / 32; ++c) {
    pack(W1, C, 32 * c, 0, 0.5f, true, weight[c].in[0]);
    pack(W2, hidden, 0, 32 * c, 1.0f, false, weight[c].more[0][0]);
    pack_window(taps, &bd, b1, c, weight[c]);
    pack(W2_t, C, 32 * c, 0, 0.5f, true, weight_t[c].in[0]);
    pack(W1_t, hidden, 0, 32 * c, 0.5f, false, weight_t[c].more[0][0]);
    pack(W1, C, 32 * c, 0, 0.5f, false, weight_t[c].more[1][0]);
    pack_window(taps, nullptr, b1, c, weight_t[c]);
  }
  const auto* packed = reinterpret_cast<const Bf16*>(weight.data());
  const auto* packed_t = reinterpret_cast<const Bf16*>(weight_t.data());
  forward(x.data(), packed, b2.data(), N, H, W, C, hidden, s.data(), h2.data());
  backward(ds.data(), x.data(), h2.data(), packed_t, N, H, W, C, hidden, dx.data());

  const Numbers h1 = product(exact(x), exact(W1), exact(b1));
  const Numbers expected_h2 = window(swish(h1), exact(taps), exact(bd), false);
  const Numbers dh2 = times_slope(product(exact(ds), exact(W2_t), Numbers(hidden)), exact(h2));
  const Numbers dh1 = times_slope(window(dh2, exact(taps), Numbers(hidden), true), h1);
  const bool right = agree(h2, expected_h2) && agree(s, product(swish(expected_h2), exact(W2), exact(b2))) &&
                     agree(dx, product(dh1, exact(W1_t), Numbers(C)));
  return right ? 0 : 1;
}
