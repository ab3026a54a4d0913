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

// exp(-x) for |x| <= 87; an x beyond counts as -87 or 87.
//
// -x = n ln 2 + r with n whole and |r| <= ln 2 / 2; ln 2 is in two parts, the first of 9 bits, so that its product with
// n is exact without fma too. exp r is a polynomial (minimax, 2^-28.2), and 2^n is added to its exponent bits.
VF_INLINE Vec exp_minus(Vec x) {
  const Vec limit = broadcast(87.0f), magic = broadcast(12582912.0f);  // 1.5 2^23: adding it rounds to a whole number
  x = x < limit ? x : limit;
  x = x > -limit ? x : -limit;
  const Vec shifted = fma(x, broadcast(-1.44269502f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, broadcast(-0.693359375f), -x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.38214685e-3f);
  p = fma(p, r, broadcast(8.36866256e-3f));
  p = fma(p, r, broadcast(4.16682549e-2f));
  p = fma(p, r, broadcast(1.66665211e-1f));
  p = fma(p, r, broadcast(4.99999940e-1f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  const IntVec exponent = reinterpret_cast<IntVec>(shifted) << 23;
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + exponent);
}

// x sigmoid(x)
VF_INLINE Vec swish(Vec x) { return x / (broadcast(1.0f) + exp_minus(x)); }

// d swish / dx = s (1 + x (1 - s)) with s = sigmoid(x); 1 - s = s exp(-x) has no cancellation.
VF_INLINE Vec swish_slope(Vec x) {
  const Vec one = broadcast(1.0f), e = exp_minus(x), s = one / (one + e);
  return s * fma(x, e * s, one);
}
