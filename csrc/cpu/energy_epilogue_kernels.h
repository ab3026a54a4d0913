// The energy network's epilogue for one instruction set; see each_isa.h.

// u = swish(t) for elements [begin, end).
inline void run_forward(const float* y, const float* skip, float scale, float* u, int64_t begin, int64_t end) {
  const Vec factor = broadcast(scale);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int lanes = std::min<int64_t>(kLanes, end - i);
    store(u + i, swish(sum_with_skip(y, skip, factor, i, lanes)), lanes);
  }
}

// dt = du swish'(t) for elements [begin, end).
inline void run_backward(const float* du, const float* y, const float* skip, float scale, float* dt, int64_t begin,
                         int64_t end) {
  const Vec factor = broadcast(scale);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int lanes = std::min<int64_t>(kLanes, end - i);
    store(dt + i, load(du + i, lanes) * swish_slope(sum_with_skip(y, skip, factor, i, lanes)), lanes);
  }
}
