// The depthwise kernels for one instruction set; see each_isa.h.
//
// A tile is processed row by row. Each source row is read once (forward: activated; outside the image: zeros) into a
// ring of as many rows as the window is high, which stays in the L2 cache. From there kCells columns of output are
// summed in registers, so that one load of a source vector serves up to `taps` products. The order of summation does
// not depend on the tile, so the bits depend neither on the number of threads nor on the batch.

using depthwise::Image;
using depthwise::kCells;
using depthwise::Tile;
using depthwise::Window;

struct Pass {
  const Image& image;
  const Tile& tile;
  const Window& window;
  int64_t first_row, first_column;  // of the source; the ring counts from there
  int64_t columns;                  // of the ring
  int64_t vectors;                  // of channels
  Vec* ring;                        // [height][vectors][columns]
  Vec* weight;                      // [vectors][row phase][column phase][taps][taps]

  VF_INLINE Vec* row(int64_t r, int64_t v) const { return ring + (r % window.height() * vectors + v) * columns; }
  VF_INLINE int64_t channel(int64_t v) const { return tile.channel + v * kLanes; }
  VF_INLINE int lanes(int64_t v) const { return std::min<int64_t>(kLanes, tile.channels - v * kLanes); }
};

inline Pass make_pass(const Image& image, const Tile& tile, const Window& window, float* scratch) {
  const int64_t cells = (tile.right - tile.left + kCells - 1) / kCells * kCells;
  const int64_t columns = window.stride * (cells - 1) + window.height();
  const int64_t vectors = (tile.channels + kLanes - 1) / kLanes;
  Vec* ring = reinterpret_cast<Vec*>(scratch);
  return {image,   tile,    window, window.stride * tile.top - window.origin, window.stride * tile.left - window.origin,
          columns, vectors, ring,   ring + window.height() * vectors * columns};
}

// Tap (y, x) of phases (py, px): the sum of the weight's entries that fall on it.
VF_INLINE Vec sum_of_entries(const Pass& pass, int64_t v, Window::Range rows, Window::Range columns) {
  const float* weight = pass.image.weight + pass.channel(v);
  Vec sum{};
  for (int y = rows.begin; y < rows.end; ++y) {
    for (int x = columns.begin; x < columns.end; ++x) {
      sum += load(weight + (y * pass.window.K + x) * pass.image.C, pass.lanes(v));
    }
  }
  return sum;
}

inline void sum_weight(const Pass& pass) {
  const int phases = pass.window.phases, taps = pass.window.taps;
  const Window::Range* entries = pass.window.entries.data();
  Vec* out = pass.weight;
  for (int64_t v = 0; v < pass.vectors; ++v) {
    for (int py = 0; py < phases; ++py) {
      for (int px = 0; px < phases; ++px) {
        for (int y = py * taps; y < (py + 1) * taps; ++y) {
          for (int x = px * taps; x < (px + 1) * taps; ++x) *out++ = sum_of_entries(pass, v, entries[y], entries[x]);
        }
      }
    }
  }
}

// Source row first_row + r into the ring.
template <bool kForward>
VF_INLINE void read_row(const Pass& pass, int64_t r) {
  const Image& image = pass.image;
  const int64_t y = pass.first_row + r;
  const bool inside = 0 <= y && y < image.H;
  const int64_t begin = inside ? std::min(std::max<int64_t>(-pass.first_column, 0), pass.columns) : pass.columns;
  const int64_t end = std::max(std::min(image.W - pass.first_column, pass.columns), begin);
  for (int64_t v = 0; v < pass.vectors; ++v) {
    Vec* row = pass.row(r, v);
    const float* source = image.source + (y * image.W + pass.first_column) * image.C + pass.channel(v);
    std::fill(row, row + begin, Vec{});
    for (int64_t x = begin; x < end; ++x) {
      __builtin_prefetch(source + (image.W + x) * image.C);  // the row below
      const Vec value = load(source + x * image.C, pass.lanes(v));
      row[x] = kForward ? swish(value) : value;
    }
    std::fill(row + end, row + pass.columns, Vec{});
  }
}

// sum[t] += sum_k row[stride t + k] weight[k] over `taps` taps; kTaps is their number, or 0 if known only at run time.
template <int kTaps, int kStride>
VF_INLINE void add_row(Vec (&sum)[kCells], const Vec* row, const Vec* weight, int taps) {
  if constexpr (kTaps == 0) {
    for (int k = 0; k < taps; ++k) {
      const Vec tap = weight[k];
      VF_UNROLL_FULLY for (int t = 0; t < kCells; ++t) sum[t] = fma(row[kStride * t + k], tap, sum[t]);
    }
  } else {
    Vec tap[kTaps];
    VF_UNROLL_FULLY for (int k = 0; k < kTaps; ++k) tap[k] = weight[k];
    VF_UNROLL_FULLY for (int x = 0; x < kStride * (kCells - 1) + kTaps; ++x) {
      const Vec value = row[x];
      VF_UNROLL_FULLY for (int k = 0; k < kTaps; ++k) {
        const int t = (x - k) / kStride;
        if (x >= k && (x - k) % kStride == 0 && t < kCells) sum[t] = fma(value, tap[k], sum[t]);
      }
    }
  }
}

// Phase (py, px) of cells (a, x) .. (a, x + kCells - 1), x counted from the tile's left. Cells right of the tile are
// computed from padding columns of the ring but not stored.
template <bool kForward, int kTaps, int kStride>
VF_INLINE void write_cells(const Pass& pass, int64_t a, int64_t x, int64_t v, int py, int px) {
  const Image& image = pass.image;
  const Window& window = pass.window;
  const int taps = kTaps == 0 ? window.taps : kTaps, lanes = pass.lanes(v), phases = window.phases;
  const int64_t width = phases * image.cell_columns, step = phases * image.C;
  const int64_t first = ((phases * a + py) * width + phases * (pass.tile.left + x) + px) * image.C + pass.channel(v);
  const int64_t count = std::min<int64_t>(kCells, pass.tile.right - pass.tile.left - x);
  VF_UNROLL_FULLY for (int t = 0; t < kCells; ++t) {
    __builtin_prefetch(image.target + first + t * step, 1);
    if (!kForward) __builtin_prefetch(image.slope_of + first + t * step);
  }
  const Vec start = kForward ? load(image.bias + pass.channel(v), lanes) : Vec{};
  Vec sum[kCells];
  VF_UNROLL_FULLY for (int t = 0; t < kCells; ++t) sum[t] = start;
  const Vec* weight = pass.weight + ((v * phases + py) * phases + px) * taps * taps;
  const int64_t top = kStride * (a - pass.tile.top) + window.shift[py], left = kStride * x + window.shift[px];
  for (int e = 0; e < taps; ++e) add_row<kTaps, kStride>(sum, pass.row(top + e, v) + left, weight + e * taps, taps);
  Vec done[kCells];
  VF_UNROLL_FULLY for (int t = 0; t < kCells; ++t) done[t] = sum[t];
#pragma GCC unroll 1  // a copy of the sums and one body: eight bodies are slower
  for (int t = 0; t < count; ++t) {
    const int64_t here = first + t * step;
    store(image.target + here, kForward ? done[t] : done[t] * swish_slope(load(image.slope_of + here, lanes)), lanes);
  }
}

template <bool kForward, int kTaps, int kStride>
void run(const Pass& pass) {
  const Tile& tile = pass.tile;
  const Window& window = pass.window;
  sum_weight(pass);
  int64_t read = 0;
  for (int64_t a = tile.top; a < tile.bottom; ++a) {
    const int64_t needed = kStride * (a - tile.top) + window.height();
    for (; read < needed; ++read) read_row<kForward>(pass, read);
    for (int64_t v = 0; v < pass.vectors; ++v) {
      for (int py = 0; py < window.phases; ++py) {
        for (int64_t x = 0; x < tile.right - tile.left; x += kCells) {
          for (int px = 0; px < window.phases; ++px) write_cells<kForward, kTaps, kStride>(pass, a, x, v, py, px);
        }
      }
    }
  }
}

inline void run_tile(const Image& image, const Tile& tile, const Window& window, float* scratch) {
  const Pass pass = make_pass(image, tile, window, scratch);
  if (image.slope_of == nullptr) {  // 3 taps: K = 3, and the phases of an upsampled K = 5
    if (window.taps == 5) return run<true, 5, 1>(pass);
    if (window.taps == 3) return run<true, 3, 1>(pass);
    return run<true, 0, 1>(pass);
  }
  if (window.stride == 2) return window.taps == 6 ? run<false, 6, 2>(pass) : run<false, 0, 2>(pass);
  if (window.taps == 5) return run<false, 5, 1>(pass);
  if (window.taps == 3) return run<false, 3, 1>(pass);
  return run<false, 0, 1>(pass);
}
