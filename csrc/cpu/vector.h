// Vectors of floats for one instruction set, and swish on them. each_isa.h includes this file once per instruction set,
// inside a namespace of its own and under the compiler's target for it; hence no include guard.
//
// VF_LANES: floats in a vector. VF_FMA(a, b, c): a b + c, in one rounding where the instruction set can.

typedef float Vec __attribute__((vector_size(4 * VF_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * VF_LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * VF_LANES)));

constexpr int kLanes = VF_LANES;

VF_INLINE Vec fma(Vec a, Vec b, Vec c) { return VF_FMA(a, b, c); }
VF_INLINE Vec broadcast(float a) { return Vec{} + a; }

// The first `lanes` floats at `from`, zeros behind them.
VF_INLINE Vec load(const float* from, int lanes) {
  if (lanes == kLanes) return *reinterpret_cast<const UnalignedVec*>(from);
  Vec value{};
  std::memcpy(&value, from, sizeof(float) * lanes);
  return value;
}

// The first `lanes` floats of `value` to `to`.
VF_INLINE void store(float* to, Vec value, int lanes) {
  if (lanes == kLanes) {
    *reinterpret_cast<UnalignedVec*>(to) = value;
  } else {
    std::memcpy(to, &value, sizeof(float) * lanes);
  }
}

// 1 + exp(-x) for |x| <= 87, the relative error of exp below 2^-22.5; an x beyond counts as -87 or 87.
//
// -x log2 e = n + f with n whole and |f| <= 1/2; 2^f is a polynomial (minimax, 2^-25.9), 2^n goes into exponent bits.
VF_INLINE Vec one_plus_exp_minus(Vec x) {
  const Vec limit = broadcast(87.0f), magic = broadcast(12582912.0f);  // 1.5 2^23: adding it rounds to a whole number
  x = x < limit ? x : limit;
  x = x > -limit ? x : -limit;
  const Vec shifted = fma(x, broadcast(-1.44269502f), magic);
  const Vec n = shifted - magic;
  Vec f = fma(x, broadcast(-1.44269502f), -n);
  f = fma(x, broadcast(-1.92596303e-8f), f);
  Vec p = broadcast(1.53575238e-4f);
  p = fma(p, f, broadcast(1.33989053e-3f));
  p = fma(p, f, broadcast(9.61842295e-3f));
  p = fma(p, f, broadcast(5.55033237e-2f));
  p = fma(p, f, broadcast(2.40226477e-1f));
  p = fma(p, f, broadcast(6.93147182e-1f));
  p = fma(p, f, broadcast(1.0f));
  const IntVec exponent = reinterpret_cast<IntVec>(shifted) << 23;
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + exponent) + broadcast(1.0f);
}

// x sigmoid(x)
VF_INLINE Vec swish(Vec x) { return x / one_plus_exp_minus(x); }

// d swish / dx = s (1 + x (1 - s)) with s = sigmoid(x)
VF_INLINE Vec swish_slope(Vec x) {
  const Vec one = broadcast(1.0f), s = one / one_plus_exp_minus(x);
  return s * fma(x, one - s, one);
}
