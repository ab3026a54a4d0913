// Power iteration for one instruction set; see each_isa.h.
//
// With t = W v unnormalised, the next v is normalize(W't / |t|). The division comes last, so one pass over a row gives
// its t and adds t times the row to the next v. K is a multiple of kLanes here; rows are padded with zeros.

constexpr int kRows = 8;  // summed in registers at a time; their second read hits the cache

VF_INLINE Vec load(const float* from) { return load(from, kLanes); }

VF_INLINE float sum_of_lanes(Vec x) {
  VF_UNROLL_FULLY for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) x[lane] += x[lane + width];
  }
  return x[0];
}

// t = W v for rows [begin, end), unless v is null (t is given); then sum = t'W over these rows, unless sum is null.
inline void run_rows(const float* weight, int64_t K, int64_t begin, int64_t end, const float* v, float* t, float* sum) {
  if (sum != nullptr) std::fill_n(sum, K, 0.0f);
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t count = std::min<int64_t>(kRows, end - m);
    const float* row[kRows];  // repeats the last row if fewer remain
    VF_UNROLL_FULLY for (int r = 0; r < kRows; ++r) row[r] = weight + (m + std::min<int64_t>(r, count - 1)) * K;
    if (v != nullptr) {
      Vec product[kRows] = {};
      for (int64_t k = 0; k < K; k += kLanes) {
        const Vec here = load(v + k);
        VF_UNROLL_FULLY for (int r = 0; r < kRows; ++r) product[r] = fma(load(row[r] + k), here, product[r]);
      }
      for (int r = 0; r < count; ++r) t[m + r] = sum_of_lanes(product[r]);
    }
    if (sum != nullptr) {
      Vec factor[kRows];
      VF_UNROLL_FULLY for (int r = 0; r < kRows; ++r) factor[r] = broadcast(r < count ? t[m + r] : 0.0f);
      for (int64_t k = 0; k < K; k += kLanes) {
        Vec total = load(sum + k);
        VF_UNROLL_FULLY for (int r = 0; r < kRows; ++r) total = fma(load(row[r] + k), factor[r], total);
        store(sum + k, total, kLanes);
      }
    }
  }
}

// x / max(|x|, eps) for x = (parts[0] + .. + parts[count - 1]) / divisor, each of `size` floats, a multiple of kLanes;
// returns max(|x|, eps). `out` may be `parts`.
inline float normalise(const float* parts, int64_t count, int64_t size, float divisor, float eps, float* out) {
  Vec squares{};
  for (int64_t i = 0; i < size; i += kLanes) {
    Vec x = load(parts + i);
    for (int64_t part = 1; part < count; ++part) x += load(parts + part * size + i);
    x /= broadcast(divisor);
    squares = fma(x, x, squares);
    store(out + i, x, kLanes);
  }
  const float length = std::max(std::sqrt(sum_of_lanes(squares)), eps);
  for (int64_t i = 0; i < size; i += kLanes) store(out + i, load(out + i) / broadcast(length), kLanes);
  return length;
}
