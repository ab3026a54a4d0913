// fp32 elementary functions with the same bits everywhere: each step is one IEEE-754 operation, rounded to nearest, in
// a fixed order, so C++, CUDA, numpy and eager torch agree bit for bit. Hence no fma (numpy and eager torch have none),
// no division, and no library function except the IEEE square root. Compile with -ffp-contract=off.
//
// C++17 and CUDA, no torch headers. Include it by relative path: were csrc an -I folder, <math.h> would find this file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VF_HD __host__ __device__ __forceinline__
#define VF_UNROLL _Pragma("unroll")
#define VF_ROLL _Pragma("unroll 1")
#else
#define VF_HD inline __attribute__((always_inline))
#define VF_ROLL _Pragma("GCC unroll 1")
#ifndef VF_UNROLL
#define VF_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

namespace vf {

VF_HD float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

VF_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

VF_HD float square_root(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

VF_HD uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}

VF_HD float float_of(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}

// log u for a normal number u in (0, 1]: never positive, zero only at u = 1, relative error below 9e-8.
//
// u = 2^e m with m in [sqrt(1/2), sqrt 2); t = m - 1 is exact; log m = t + t^2 Q(t), Q minimax (2^-27.3 of log m);
// log u = e ln2_hi + (e ln2_lo + log m), where ln2_hi has 9 bits, so e ln2_hi is exact.
VF_HD float log_of_unit(float u) {
  const uint32_t bits = bits_of(u);
  const int32_t e = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;  // 0x3f3504f3: bits of sqrt(1/2)
  const float t = add(float_of(bits - (static_cast<uint32_t>(e) << 23)), -1.0f);
  float q = -0.0763640329f;
  q = add(mul(q, t), 0.127622008f);
  q = add(mul(q, t), -0.131596133f);
  q = add(mul(q, t), 0.142015815f);
  q = add(mul(q, t), -0.166234091f);
  q = add(mul(q, t), 0.200012416f);
  q = add(mul(q, t), -0.250008196f);
  q = add(mul(q, t), 0.333333313f);
  q = add(mul(q, t), -0.5f);
  const float log_m = add(t, mul(mul(t, t), q));
  const float exponent = static_cast<float>(e);
  return add(mul(exponent, 0.693359375f), add(mul(exponent, -2.12194440e-4f), log_m));
}

struct CosSin {
  float cosine, sine;
};

// Cosine and sine of 2 pi turns / 2^32, absolute error below 1.2e-7 each.
//
// Integer bits give the nearest quarter turn; the rest, |x| <= pi/4, goes through minimax polynomials,
// sin x = x + x^3 S(x^2) (2^-27.8) and cos x = 1 + x^2 C(x^2) (2^-32.8); the quarter then swaps and negates them.
VF_HD CosSin cos_sin_of_turns(uint32_t turns) {
  const uint32_t quarter = (turns + (1u << 29)) >> 30;
  const int32_t rest = static_cast<int32_t>(turns - (quarter << 30));  // in [-2^29, 2^29)
  const float x = mul(static_cast<float>(rest), 1.46291808e-9f);       // 2 pi / 2^32
  const float x2 = mul(x, x);
  float s = -1.95182904e-4f;
  s = add(mul(s, x2), 8.33218917e-3f);
  s = add(mul(s, x2), -0.166666552f);
  const float sine = add(x, mul(mul(x, x2), s));
  float c = 2.44323273e-5f;
  c = add(mul(c, x2), -1.38873095e-3f);
  c = add(mul(c, x2), 4.16666456e-2f);
  c = add(mul(c, x2), -0.5f);
  const float cosine = add(1.0f, mul(x2, c));
  const bool swap = quarter & 1u;
  const uint32_t cosine_sign = ((quarter + 1u) & 2u) << 30;
  const uint32_t sine_sign = (quarter & 2u) << 30;
  return {float_of(bits_of(swap ? sine : cosine) ^ cosine_sign), float_of(bits_of(swap ? cosine : sine) ^ sine_sign)};
}

}  // namespace vf
