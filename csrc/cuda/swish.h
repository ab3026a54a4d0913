// swish and its slope from two special-function instructions: an exponential and a reciprocal.
//
// Relative error of the sigmoid below 2^-21 + 2^-23 |x|: 2^-22 from the exponential, 2^-23 from the reciprocal, the
// rest from rounding the exponent. For x < -87 the result is at most 2^-126; the true value is smaller still.
#pragma once

#include "ptx.h"

namespace vf {

struct Sigmoid {
  float s, e;  // sigmoid(x) and exp(-x): 1 - s = e s has no cancellation
};

// At most 2^126, so that 1 + e does not overflow and e s is not infinity times zero.
__device__ __forceinline__ Sigmoid sigmoid(float x) {
  const float e = exp2_approx(fminf(x * -1.44269504f, 126.0f));
  return {reciprocal_approx(1.0f + e), e};
}

__device__ __forceinline__ float swish(float x) { return x * sigmoid(x).s; }

// s (1 + x (1 - s))
__device__ __forceinline__ float swish_slope(float x) {
  const Sigmoid at = sigmoid(x);
  return at.s * fmaf(x, at.e * at.s, 1.0f);
}

// The same from one special function, for kernels that round to bf16: sigmoid(2 u) = (1 + tanh u) / 2 to 2^-12. So the
// error of swish(x) is below 2^-12 |x| and that of its slope below 2^-12 (1 + |x|): half of bf16's rounding error of x.
// They take u = x / 2, because weights are halved once, when they are packed.

__device__ __forceinline__ float swish_of_half(float u) { return fmaf(u, tanh_approx(u), u); }

// value * 2 swish'(2 u), with t = tanh u: 1 + t + u (1 - t^2).
__device__ __forceinline__ float times_twice_slope_of_half(float value, float u) {
  const float t = tanh_approx(u);
  return fmaf(value, fmaf(u, fmaf(-t, t, 1.0f), t), value);
}

}  // namespace vf
