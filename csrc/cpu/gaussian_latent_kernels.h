// Normal latents for one instruction set; see each_isa.h. `raw` holds the raw means of a block, `count` of them, then
// the raw log sigmas. sigma is exp(5 tanh(raw / 5)) + 0.01, without the temperature.

// z = mu + temperature sigma eps; returns the sum of eps^2 / 2 + log sigma if requested, else 0.
inline double run_forward(const float* raw, const float* eps, int64_t count, float temperature, bool with_log_p,
                          float* z) {
  Sum sum;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = std::min<int64_t>(kLanes, count - i);
    const Vec noise = load(eps + i, lanes), mu = soft_clamp5(load(raw + i, lanes)).value;
    const Vec sigma = exp_keeping_nan(soft_clamp5(load(raw + count + i, lanes)).value) + broadcast(0.01f);
    store(z + i, fma(sigma * broadcast(temperature), noise, mu), lanes);
    if (with_log_p) sum.add(first_lanes(fma(noise * noise, broadcast(0.5f), log_of_positive(sigma)), lanes));
  }
  return sum.across_lanes();
}

// Computes deps from dz and the image's dlog_p, and overwrites `raw` with its gradients.
inline void run_backward(const float* dz, float dlog_p, const float* eps, int64_t count, float temperature, float* raw,
                         float* deps) {
  const Vec scale = broadcast(temperature), weight = broadcast(dlog_p);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = std::min<int64_t>(kLanes, count - i);
    const SoftClamp mu = soft_clamp5(load(raw + i, lanes)), log_sigma = soft_clamp5(load(raw + count + i, lanes));
    const Vec exponential = exp_keeping_nan(log_sigma.value), sigma = exponential + broadcast(0.01f);
    const Vec noise = load(eps + i, lanes), scaled = load(dz + i, lanes) * scale;
    store(deps + i, fma(scaled, sigma, -weight * noise), lanes);
    store(raw + i, load(dz + i, lanes) * mu.slope, lanes);
    const Vec dsigma = fma(scaled, noise, -weight / sigma);
    store(raw + count + i, dsigma * exponential * log_sigma.slope, lanes);
  }
}
