// The energy network's epilogue for one instruction set; see each_isa.h. NHWC pixels of C channels.

// u = swish(t) for `pixels` pixels.
inline void run_forward(const float* y, const float* skip, float scale, const float* shift, int64_t pixels, int64_t C,
                        float* u) {
  const Vec factor = broadcast(scale);
  for (int64_t pixel = 0; pixel < pixels * C; pixel += C) {
    for (int64_t c = 0; c < C; c += kLanes) {
      const int lanes = std::min<int64_t>(kLanes, C - c);
      store(u + pixel + c, swish(sum_of_terms(y, skip, factor, shift, pixel + c, c, lanes)), lanes);
    }
  }
}

// dt = du swish'(t) for `pixels` pixels.
inline void run_backward(const float* du, const float* y, const float* skip, float scale, const float* shift,
                         int64_t pixels, int64_t C, float* dt) {
  const Vec factor = broadcast(scale);
  for (int64_t pixel = 0; pixel < pixels * C; pixel += C) {
    for (int64_t c = 0; c < C; c += kLanes) {
      const int lanes = std::min<int64_t>(kLanes, C - c);
      const Vec slope = swish_slope(sum_of_terms(y, skip, factor, shift, pixel + c, c, lanes));
      store(dt + pixel + c, load(du + pixel + c, lanes) * slope, lanes);
    }
  }
}
