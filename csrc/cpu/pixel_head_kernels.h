// Gaussian pixels for one instruction set; see each_isa.h. `raw` holds the raw means of a block, `count` of them, then
// the raw log sigmas.

struct Pixels {
  SoftClamp mu, log_sigma;
  Vec exponential, sigma;
  Vec unclamped, clamped;      // mu + sigma eps
  Vec sigma_of_p, normalised;  // log p floors log sigma at -2
};

VF_INLINE Pixels pixels_of(const float* raw, const float* eps_x, int64_t count, int64_t i, int lanes) {
  const Vec one = broadcast(1.0f), sigma_floor = broadcast(0.145335283f);  // exp(-2) + 0.01
  Pixels p;
  p.mu = soft_clamp5(load(raw + i, lanes));
  p.log_sigma = soft_clamp5(load(raw + count + i, lanes));
  p.exponential = exp_keeping_nan(p.log_sigma.value);
  p.sigma = p.exponential + broadcast(0.01f);
  p.unclamped = p.mu.value + p.sigma * load(eps_x + i, lanes);  // no fma, so the clamp decides as in plain PyTorch
  p.clamped = p.unclamped < -one ? -one : (p.unclamped > one ? one : p.unclamped);
  p.sigma_of_p = p.log_sigma.value < broadcast(-2.0f) ? sigma_floor : p.sigma;
  p.normalised = (p.clamped - p.mu.value) / p.sigma_of_p;
  return p;
}

// Computes x; returns the sum of normalised^2 / 2 + log sigma if requested, else 0.
inline double run_forward(const float* raw, const float* eps_x, int64_t count, bool with_log_p, float* x) {
  const Vec half = broadcast(0.5f);
  Sum sum;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = std::min<int64_t>(kLanes, count - i);
    const Pixels p = pixels_of(raw, eps_x, count, i, lanes);
    store(x + i, fma(p.clamped, half, half), lanes);
    if (!with_log_p) continue;
    sum.add(first_lanes(fma(p.normalised * p.normalised, half, log_of_positive(p.sigma_of_p)), lanes));
  }
  return sum.across_lanes();
}

// Computes deps_x from dx and the image's dlog_p, and overwrites `raw` with its gradients. Values exactly at the
// clamp's bounds and a log sigma exactly at its floor have a gradient. Inside the bounds log p has none for mu, because
// x moves with it.
inline void run_backward(const float* dx, float dlog_p, const float* eps_x, int64_t count, float* raw, float* deps_x) {
  const Vec zero{}, one = broadcast(1.0f), weight = broadcast(dlog_p);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = std::min<int64_t>(kLanes, count - i);
    const Pixels p = pixels_of(raw, eps_x, count, i, lanes);
    const auto inside = (p.unclamped >= -one) & (p.unclamped <= one);
    const Vec half_dx = load(dx + i, lanes) * broadcast(0.5f), pull = weight * p.normalised / p.sigma_of_p;
    const Vec dunclamped = inside ? half_dx - pull : zero, dmu = inside ? half_dx : pull;
    store(deps_x + i, dunclamped * p.sigma, lanes);
    const Vec spread = weight * fma(p.normalised, p.normalised, -one) / p.sigma_of_p;
    const Vec unfloored = p.log_sigma.value < broadcast(-2.0f) ? zero : spread;
    const Vec dsigma = fma(dunclamped, load(eps_x + i, lanes), unfloored);
    store(raw + i, dmu * p.mu.slope, lanes);
    store(raw + count + i, dsigma * p.exponential * p.log_sigma.slope, lanes);
  }
}
