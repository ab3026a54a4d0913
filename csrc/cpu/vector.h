// Vectors of floats for one instruction set, and swish on them. each_isa.h includes this file once per instruction set,
// inside a namespace of its own and under the compiler's target for it; hence no include guard.
//
// VF_LANES: floats in a vector. VF_FMA(a, b, c): a b + c, with one rounding if the instruction set has fma.

typedef float Vec __attribute__((vector_size(4 * VF_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * VF_LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * VF_LANES)));

constexpr int kLanes = VF_LANES;

VF_INLINE Vec fma(Vec a, Vec b, Vec c) { return VF_FMA(a, b, c); }
VF_INLINE Vec broadcast(float a) { return a - Vec{}; }  // a + 0 would be an addition: it turns -0 into 0

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

// t = y + shift + scale skip at element i, of channel c; skip and shift may be null.
VF_INLINE Vec sum_of_terms(const float* y, const float* skip, Vec scale, const float* shift, int64_t i, int64_t c,
                           int lanes) {
  Vec value = load(y + i, lanes);
  if (shift != nullptr) value += load(shift + c, lanes);
  return skip == nullptr ? value : fma(scale, load(skip + i, lanes), value);
}

// exp(-x) = 2^n (1 + r quotient); n is stored in the exponent bits of a float.
struct ExpParts {
  Vec r, quotient;
  IntVec exponent;
};

// For |x| <= 87; larger |x| is clamped to 87.
//
// -x = n ln 2 + r with n whole and |r| <= ln 2 / 2; ln 2 is in two parts, the first of 9 bits, so that its product with
// n is exact without fma too. exp r is a polynomial (minimax, 2^-28.2).
VF_INLINE ExpParts exp_minus_in_parts(Vec x) {
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
  return {r, fma(p, r, broadcast(1.0f)), reinterpret_cast<IntVec>(shifted) << 23};
}

// 2^n x, n as in ExpParts.
VF_INLINE Vec scaled_by_power(Vec x, IntVec exponent) {
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(x) + exponent);
}

// exp(-x) for |x| <= 87; larger |x| is clamped to 87.
VF_INLINE Vec exp_minus(Vec x) {
  const ExpParts e = exp_minus_in_parts(x);
  return scaled_by_power(fma(e.quotient, e.r, broadcast(1.0f)), e.exponent);
}

// x sigmoid(x)
VF_INLINE Vec swish(Vec x) { return x / (broadcast(1.0f) + exp_minus(x)); }

// d swish / dx = s (1 + x (1 - s)) with s = sigmoid(x); 1 - s = s exp(-x) has no cancellation.
VF_INLINE Vec swish_slope(Vec x) {
  const Vec one = broadcast(1.0f), e = exp_minus(x), s = one / (one + e);
  return s * fma(x, e * s, one);
}

// exp(x) for |x| <= 87, as exp_minus; NaN stays NaN.
VF_INLINE Vec exp_keeping_nan(Vec x) { return x == x ? exp_minus(-x) : x; }

// x for x > 0, else exp(x) - 1 = 2^n r quotient + (2^n - 1), which does not cancel; NaN stays NaN.
VF_INLINE Vec elu(Vec x) {
  const ExpParts e = exp_minus_in_parts(-x);
  const Vec one = broadcast(1.0f), power = scaled_by_power(one, e.exponent);
  return x <= 0 ? fma(power, e.r * e.quotient, power - one) : x;
}

// d elu / dx: 1 for x > 0, else exp(x); NaN stays NaN.
VF_INLINE Vec elu_slope(Vec x) { return x > 0 ? broadcast(1.0f) : exp_keeping_nan(x); }

// log x for normal positive x, relative error below 2^-22; NaN stays NaN.
//
// x = 2^e m with m in [sqrt(1/2), sqrt 2) and t = m - 1 exact; log m = t + t^2 Q(t), Q as in math.h.
VF_INLINE Vec log_of_positive(Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x), e = (bits - 0x3f3504f3) >> 23;  // bits of sqrt(1/2)
  const Vec t = reinterpret_cast<Vec>(bits - (e << 23)) - broadcast(1.0f);
  Vec q = broadcast(-0.0763640329f);
  q = fma(q, t, broadcast(0.127622008f));
  q = fma(q, t, broadcast(-0.131596133f));
  q = fma(q, t, broadcast(0.142015815f));
  q = fma(q, t, broadcast(-0.166234091f));
  q = fma(q, t, broadcast(0.200012416f));
  q = fma(q, t, broadcast(-0.250008196f));
  q = fma(q, t, broadcast(0.333333313f));
  q = fma(q, t, broadcast(-0.5f));
  const Vec log_m = fma(t * t, q, t), exponent = __builtin_convertvector(e, Vec);
  const Vec log_x = fma(exponent, broadcast(0.693359375f), fma(exponent, broadcast(-2.12194440e-4f), log_m));
  return x == x ? log_x : x;
}

struct SoftClamp {
  Vec value, slope;
};

// 5 tanh(x / 5) and its slope 1 - tanh^2(x / 5); NaN stays NaN.
//
// With e = exp(-2 |x| / 5), tanh is 1 - 2 e / (1 + e). That cancels for small x, where a polynomial replaces it
// (minimax, 2^-30). The slope 4 e / (1 + e)^2 never cancels.
VF_INLINE SoftClamp soft_clamp5(Vec x) {
  const Vec one = broadcast(1.0f), magnitude = x < 0 ? -x : x, x2 = x * x;
  const Vec e = exp_keeping_nan(magnitude * broadcast(-0.4f)), inverse = one / (one + e);
  Vec p = broadcast(9.12168778e-12f);
  p = fma(p, x2, broadcast(-8.46105075e-10f));
  p = fma(p, x2, broadcast(5.56357662e-8f));
  p = fma(p, x2, broadcast(-3.4529387e-6f));
  p = fma(p, x2, broadcast(2.13331921e-4f));
  p = fma(p, x2, broadcast(-1.33333327e-2f));
  const Vec near = fma(x * x2, p, x), far = fma(broadcast(-10.0f) * e, inverse, broadcast(5.0f));
  return {magnitude < broadcast(3.0f) ? near : (x < 0 ? -far : far), broadcast(4.0f) * e * inverse * inverse};
}

// x with zeros behind its first `lanes` floats.
VF_INLINE Vec first_lanes(Vec x, int lanes) { return load(reinterpret_cast<const float*>(&x), lanes); }

// A compensated sum of vectors, as if in twice the precision: the exact rounding error of each addition (Knuth's
// TwoSum) is summed separately. Unlike Kahan's, it stays accurate when large terms cancel, and its additions are
// independent.
struct Sum {
  Vec total{}, rounded_away{};

  VF_INLINE void add(Vec x) {
    const Vec next = total + x, from_x = next - total;
    rounded_away += (total - (next - from_x)) + (x - from_x);
    total = next;
  }

  VF_INLINE double across_lanes() const {
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(total[lane]) + rounded_away[lane];
    return sum;
  }
};
