// The pointwise kernels for one instruction set; see each_isa.h.
//
// A tile's rows are activated and packed for kTileDepth channels at a time; then each group of panels is multiplied
// with each group of kRows rows in registers. An output is the ordered sum of one partial sum per depth block, so its
// bits depend neither on the tiles nor on the number of threads, and its error grows with the depth rather than with K.

using pointwise::Activation;
using pointwise::kPanel;
using pointwise::kScratchRows;
using pointwise::kTileDepth;
using pointwise::kTileRows;
using pointwise::Product;
using pointwise::scratch_stride;
using pointwise::Tile;

constexpr int kPanelVectors = kPanel / kLanes;
// Sums in registers: 8 x 3 vectors of 32 registers for AVX-512, 6 x 2 of 16 for AVX2, 2 x 4 of 16 for the portable one.
constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 2;
constexpr int kMostPanels = kLanes == 16 ? 3 : 1;
static_assert((kTileRows + kRows - 1) / kRows * kRows <= kScratchRows, "a group of rows reads beyond the scratch memory");

VF_INLINE int lanes_at(int64_t n, int64_t N) { return static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(kLanes, N - n))); }

template <Activation kActivation>
VF_INLINE Vec activated(Vec x) {
  if constexpr (kActivation == Activation::swish) return swish(x);
  if constexpr (kActivation == Activation::elu) return elu(x);
  return x;
}

// f(x) of `rows` rows, channels [begin, begin + depth), into scratch.
template <Activation kActivation>
void pack_rows(const Product& product, int64_t top, int64_t rows, int64_t begin, int64_t depth, float* scratch) {
  const int64_t stride = scratch_stride(depth);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = product.x + (top + r) * product.K + begin;
    float* to = scratch + r * stride;
    for (int64_t k = 0; k < depth; k += kLanes) {
      store(to + k, activated<kActivation>(load(from + k, lanes_at(k, depth))), kLanes);
    }
  }
}

// sum[r][v] of kRows packed rows and kPanels panels over `depth` channels. A separate function, so that all sums stay
// in registers.
template <int kPanels>
__attribute__((noinline)) void multiply(const float* packed, int64_t stride, const float* weight, int64_t panel_stride,
                                        int64_t depth, Vec* sums) {
  constexpr int kVectors = kPanels * kPanelVectors;
  Vec sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec w[kVectors];
    VF_UNROLL_FULLY for (int v = 0; v < kVectors; ++v) {
      w[v] = load(weight + v / kPanelVectors * panel_stride + k * kPanel + v % kPanelVectors * kLanes, kLanes);
    }
    VF_UNROLL_FULLY for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(packed[r * stride + k]);
      VF_UNROLL_FULLY for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x, w[v], sum[r][v]);
    }
  }
  VF_UNROLL_FULLY for (int r = 0; r < kRows; ++r) {
    VF_UNROLL_FULLY for (int v = 0; v < kVectors; ++v) sums[r * kVectors + v] = sum[r][v];
  }
}

// Prefetches the cache lines of rows before they are read or written: segments of rows are too short for the hardware
// prefetcher.
template <bool kWrite>
VF_INLINE void prefetch(const float* rows, int64_t stride, int count, int64_t floats) {
  for (int r = 0; r < count; ++r) {
    for (int64_t n = 0; n < floats; n += kPanel) __builtin_prefetch(rows + r * stride + n, kWrite);
  }
}

// Rows [m, m + rows) of `panels` panels: the sums over one depth block, with initial terms at the first and final
// operations at the last.
inline void finish(const Product& product, int64_t m, int rows, int64_t panel, int panels, bool is_first, bool is_last,
                   const Vec* sums) {
  const int64_t N = product.N, begin = panel * kPanel, end = std::min(N, begin + panels * kPanel);
  const float* bias = is_first ? product.bias : nullptr;
  const float* residual = is_last ? product.residual : nullptr;
  const float* slope_of = is_last ? product.slope_of : nullptr;
  for (int r = 0; r < rows; ++r) {
    const Vec* sum = sums + r * panels * kPanelVectors;
    for (int64_t n = begin; n < end; n += kLanes) {
      const int64_t at = (m + r) * N + n;
      const int lanes = lanes_at(n, end);
      Vec value = *sum++;
      if (!is_first) value += load(product.y + at, lanes);
      if (bias != nullptr) value += load(bias + n, lanes);
      if (residual != nullptr) value += load(residual + at, lanes);
      if (slope_of != nullptr) {
        const Vec x = load(slope_of + at, lanes);
        value *= product.f == Activation::elu ? elu_slope(x) : swish_slope(x);
      }
      store(product.y + at, value, lanes);
    }
  }
}

// How many of `left` panels to process together: four as two and two, because a single panel is load-bound.
VF_INLINE int panels_of(int64_t left) {
  if (kMostPanels == 1) return 1;
  return left == 4 ? 2 : static_cast<int>(std::min<int64_t>(left, 3));
}

inline void run_tile(const Product& product, const Tile& tile, float* scratch) {
  const int64_t K = product.K, N = product.N;
  const Activation f = product.slope_of == nullptr ? product.f : Activation::none;
  const auto pack = f == Activation::swish ? pack_rows<Activation::swish>
                    : f == Activation::elu ? pack_rows<Activation::elu>
                                           : pack_rows<Activation::none>;
  alignas(64) Vec sums[kRows * kMostPanels * kPanelVectors];
  int64_t begin = 0;
  do {  // also once for K = 0, to write the bias
    const int64_t depth = std::min(kTileDepth, K - begin), stride = scratch_stride(depth);
    const bool is_first = begin == 0, is_last = begin + depth == K;
    pack(product, tile.top, tile.bottom - tile.top, begin, depth, scratch);
    for (int64_t panel = tile.left; panel < tile.right;) {
      const int panels = panels_of(tile.right - panel);
      const float* weight = product.weight + (panel * K + begin) * kPanel;
      for (int64_t m = tile.top; m < tile.bottom; m += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, tile.bottom - m));
        const float* packed = scratch + (m - tile.top) * stride;
        const int64_t at = m * N + panel * kPanel, floats = panels * kPanel;
        prefetch<true>(product.y + at, N, rows, floats);
        if (is_last && product.residual != nullptr) prefetch<false>(product.residual + at, N, rows, floats);
        if (is_last && product.slope_of != nullptr) prefetch<false>(product.slope_of + at, N, rows, floats);
        if (panels == 1) multiply<1>(packed, stride, weight, K * kPanel, depth, sums);
        if constexpr (kMostPanels == 3) {
          if (panels == 2) multiply<2>(packed, stride, weight, K * kPanel, depth, sums);
          if (panels == 3) multiply<3>(packed, stride, weight, K * kPanel, depth, sums);
        }
        finish(product, m, rows, panel, panels, is_first, is_last, sums);
      }
      panel += panels;
    }
    begin += kTileDepth;
  } while (begin < K);
}
