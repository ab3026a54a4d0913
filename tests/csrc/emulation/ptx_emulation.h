// The CPU's stand-ins for csrc/cuda/ptx.h, which says what each does. Approximate instructions are exact here, to rounding.
#pragma once

#include "cuda_emulation.h"
//
#include "../../../csrc/cuda/ptx.h"
#include "../../../csrc/math.h"

namespace vf {

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float reciprocal_approx(float x) {
  const float y = std::fabs(x) < 0x1p-126f ? std::copysign(INFINITY, x) : 1.0f / x;
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, x) : y;
}

// As far from the truth as the instruction may be, up or down by the last bit of x; no bound on the result is promised.
inline float tanh_approx(float x) {
  const float y = std::tanh(x);
  return std::isinf(x) ? y : y * (1.0f + (bits_of(x) & 1 ? 0x1p-11f : -0x1p-11f));
}

inline uint32_t bf16_bits(float a) {
  if (std::isnan(a)) return 0x7fff;
  const uint32_t bits = bits_of(a);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t bf16_pair(float lo, float hi) { return bf16_bits(lo) | bf16_bits(hi) << 16; }

// Half 0 or 1 of a word.
inline float bf16_half(uint32_t word, int half) { return float_of(half == 0 ? word << 16 : word & 0xffff0000u); }

inline uint32_t half_of_pair(uint32_t pair) {
  return bf16_pair(0.5f * bf16_half(pair, 0), 0.5f * bf16_half(pair, 1));
}

#ifndef VF_THREADS_NEVER_WAIT

inline void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  struct Operands {
    FragmentA a;
    FragmentB b;
  };
  const auto all = emulation::exchange(Operands{a, b});
  for (int i = 0; i < 4; ++i) {
    const int row = emulation::lane / 4 + 8 * (i / 2), column = 2 * (emulation::lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2;  // which of the four lanes of a row of A, or column of B
      const uint32_t left = all[4 * (row % 8) + quad].a.v[row / 8 + 2 * (k / 8)];
      const uint32_t right = all[4 * column + quad].b.v[k / 8];
      c.v[i] += bf16_half(left, k % 2) * bf16_half(right, k % 2);
    }
  }
}

// The 32 rows that the lanes name, 16 bytes each.
inline auto matrix_rows(const void* row) {
  emulation::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "a row given to load_matrices is not 16-byte aligned");
  return emulation::exchange(static_cast<const unsigned char*>(row));
}

inline FragmentA load_matrices(const void* row) {
  const auto rows = matrix_rows(row);
  FragmentA m;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&m.v[i], rows[8 * i + emulation::lane / 4] + 4 * (emulation::lane % 4), sizeof m.v[i]);
  }
  __syncwarp();  // the instruction reads for all lanes at once: no lane goes on to overwrite what another has not read
  return m;
}

inline FragmentA load_matrices_transposed(const void* row) {
  const auto rows = matrix_rows(row);
  FragmentA m{};
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      uint16_t element;
      std::memcpy(&element, rows[8 * i + 2 * (emulation::lane % 4) + half] + 2 * (emulation::lane / 4), sizeof element);
      m.v[i] |= static_cast<uint32_t>(element) << (16 * half);
    }
  }
  __syncwarp();
  return m;
}
#endif

}  // namespace vf
