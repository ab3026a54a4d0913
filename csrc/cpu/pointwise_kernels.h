// The pointwise kernels for one instruction set; see each_isa.h.
//
// A tile of rows is packed (activated on the way) for kTileDepth channels at a time; then every group of panels meets
// every group of kRows rows in registers. An output is the sum, in order, of one sum for each depth, so its bits depend
// neither on the tiles nor on the number of threads, and its error grows with the depth rather than with K.

using pointwise::kPanel;
using pointwise::kTileDepth;
using pointwise::Product;
using pointwise::scratch_stride;
using pointwise::Tile;

constexpr int kPanelVectors = kPanel / kLanes;
// Sums in registers: 8 x 3 vectors of 32 registers for AVX-512, 6 x 2 of 16 for AVX2, 2 x 4 of 16 for the portable one.
constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 2;
constexpr int kMostPanels = kLanes == 16 ? 3 : 1;

VF_INLINE int lanes_at(int64_t n, int64_t N) { return static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(kLanes, N - n))); }

// f(x) of `rows` rows, channels [begin, begin + depth), into scratch.
template <bool kSwish>
void pack_rows(const Product& product, int64_t top, int64_t rows, int64_t begin, int64_t depth, float* scratch) {
  const int64_t stride = scratch_stride(depth);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = product.x + (top + r) * product.K + begin;
    float* to = scratch + r * stride;
    for (int64_t k = 0; k < depth; k += kLanes) {
      const Vec value = load(from + k, lanes_at(k, depth));
      store(to + k, kSwish ? swish(value) : value, kLanes);
    }
  }
}

// Rows [m, m + rows) of panels [panel, panel + kPanels): the sum over channels [begin, begin + depth), with the bias if
// these are the first, else added to what is there.
template <int kPanels>
__attribute__((noinline)) void multiply(const Product& product, int64_t m, int rows, int64_t panel, int64_t begin,
                                        int64_t depth, const float* scratch) {
  constexpr int kVectors = kPanels * kPanelVectors;
  const int64_t K = product.K, N = product.N, stride = scratch_stride(depth), first = panel * kPanel;
  const float* weight = product.weight + (panel * K + begin) * kPanel;
  Vec sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec w[kVectors];
    VF_UNROLL_FULLY for (int v = 0; v < kVectors; ++v) {
      w[v] = load(weight + v / kPanelVectors * K * kPanel + k * kPanel + v % kPanelVectors * kLanes, kLanes);
    }
    VF_UNROLL_FULLY for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(scratch[r * stride + k]);
      VF_UNROLL_FULLY for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x, w[v], sum[r][v]);
    }
  }
  VF_UNROLL_FULLY for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    float* y = product.y + (m + r) * N + first;
    VF_UNROLL_FULLY for (int v = 0; v < kVectors; ++v) {
      const int64_t n = v * kLanes;
      const int lanes = lanes_at(first + n, N);
      if (begin > 0) sum[r][v] += load(y + n, lanes);
      if (begin == 0 && product.bias != nullptr) sum[r][v] += load(product.bias + first + n, lanes);
      store(y + n, sum[r][v], lanes);
    }
  }
}

// Asks for the cache lines of rows before they are read or written: pieces of rows are too short a pattern for the
// processor to foresee.
template <bool kWrite>
VF_INLINE void prefetch(const float* rows, int64_t stride, int count, int64_t floats) {
  for (int r = 0; r < count; ++r) {
    for (int64_t n = 0; n < floats; n += kPanel) __builtin_prefetch(rows + r * stride + n, kWrite);
  }
}

// What follows the sum, on rows that were just written and are in the L1 cache.
inline void finish(const Product& product, int64_t m, int rows, int64_t panel, int panels) {
  const int64_t N = product.N, begin = panel * kPanel, end = std::min(N, begin + panels * kPanel);
  for (int64_t row = m; row < m + rows; ++row) {
    float* y = product.y + row * N;
    if (product.residual != nullptr) {
      const float* residual = product.residual + row * N;
      for (int64_t n = begin; n < end; n += kLanes) {
        const int lanes = lanes_at(n, end);
        store(y + n, load(y + n, lanes) + load(residual + n, lanes), lanes);
      }
    }
    if (product.slope_of != nullptr) {
      const float* slope_of = product.slope_of + row * N;
      for (int64_t n = begin; n < end; n += kLanes) {
        const int lanes = lanes_at(n, end);
        store(y + n, load(y + n, lanes) * swish_slope(load(slope_of + n, lanes)), lanes);
      }
    }
  }
}

// How many of `left` panels to take together: four as two and two, because a single one starves for loads.
VF_INLINE int panels_of(int64_t left) {
  if (kMostPanels == 1) return 1;
  return left == 4 ? 2 : static_cast<int>(std::min<int64_t>(left, 3));
}

inline void run_tile(const Product& product, const Tile& tile, float* scratch) {
  const int64_t K = product.K;
  int64_t begin = 0;
  do {  // once for K = 0 too, where the bias alone is left
    const int64_t depth = std::min(kTileDepth, K - begin);
    (product.swish ? pack_rows<true> : pack_rows<false>)(product, tile.top, tile.bottom - tile.top, begin, depth,
                                                         scratch);
    for (int64_t panel = tile.left; panel < tile.right;) {
      const int panels = panels_of(tile.right - panel);
      for (int64_t m = tile.top; m < tile.bottom; m += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, tile.bottom - m));
        const float* packed = scratch + (m - tile.top) * scratch_stride(depth);
        const int64_t at = m * product.N + panel * kPanel, floats = panels * kPanel;
        const bool is_last = begin + depth == K;
        prefetch<true>(product.y + at, product.N, rows, floats);
        if (is_last && product.residual != nullptr) prefetch<false>(product.residual + at, product.N, rows, floats);
        if (is_last && product.slope_of != nullptr) prefetch<false>(product.slope_of + at, product.N, rows, floats);
        if (panels == 1) multiply<1>(product, m, rows, panel, begin, depth, packed);
        if constexpr (kMostPanels == 3) {
          if (panels == 2) multiply<2>(product, m, rows, panel, begin, depth, packed);
          if (panels == 3) multiply<3>(product, m, rows, panel, begin, depth, packed);
        }
        if (is_last) finish(product, m, rows, panel, panels);
      }
      panel += panels;
    }
    begin += kTileDepth;
  } while (begin < K);
}
