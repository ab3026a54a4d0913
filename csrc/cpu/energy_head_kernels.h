// The energy network's head for one instruction set; see each_isa.h. NHWC pixels of C channels, one weight per channel.

// The sum over `pixels` pixels and their channels of weight swish(t).
inline double run_forward(const float* y, const float* skip, float scale, const float* shift, const float* weight,
                          int64_t pixels, int64_t C) {
  const Vec factor = broadcast(scale);
  Sum sum;
  for (int64_t pixel = 0; pixel < pixels * C; pixel += C) {
    for (int64_t c = 0; c < C; c += kLanes) {
      const int lanes = std::min<int64_t>(kLanes, C - c);
      sum.add(load(weight + c, lanes) * swish(sum_of_terms(y, skip, factor, shift, pixel + c, c, lanes)));
    }
  }
  return sum.across_lanes();
}

// dt = denergy weight swish'(t) for `pixels` pixels.
inline void run_backward(float denergy, const float* y, const float* skip, float scale, const float* shift,
                         const float* weight, int64_t pixels, int64_t C, float* dt) {
  const Vec factor = broadcast(scale), gradient = broadcast(denergy);
  for (int64_t pixel = 0; pixel < pixels * C; pixel += C) {
    for (int64_t c = 0; c < C; c += kLanes) {
      const int lanes = std::min<int64_t>(kLanes, C - c);
      const Vec slope = swish_slope(sum_of_terms(y, skip, factor, shift, pixel + c, c, lanes));
      store(dt + pixel + c, gradient * load(weight + c, lanes) * slope, lanes);
    }
  }
}
