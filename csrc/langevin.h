// The Langevin update of one element: the definition that every backend reproduces bit for bit.
#pragma once

#include "philox.h"

namespace vf {

// The factors of a step, h / 2 and sqrt(h), each rounded to fp32 once.
struct LangevinStep {
  float half, root;
  bool prior;
};

inline LangevinStep langevin_step(double step_size, bool prior) {
  return {static_cast<float>(step_size / 2), static_cast<float>(std::sqrt(step_size)), prior};
}

// eps - (h / 2) (gradient + prior * eps) + sqrt(h) noise
VF_HD float langevin_update(float eps, float gradient, float noise, const LangevinStep& step) {
  const float slope = step.prior ? add(gradient, eps) : gradient;
  return add(add(eps, mul(-step.half, slope)), mul(step.root, noise));
}

// The bits of |a|, which grow with |a|; a is infinite or NaN if they are at least kInfinity.
constexpr uint32_t kInfinity = 0x7f800000u;
VF_HD uint32_t magnitude(float a) { return bits_of(a) & 0x7fffffffu; }

}  // namespace vf
