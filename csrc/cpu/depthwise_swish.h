// The work of one task of the depthwise kernels: how a window's taps move (the same for rows and columns), one image,
// and a tile of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vf::depthwise {

constexpr int kCells = 8;  // summed in registers at a time

// A cell is the output of one step: a pixel, or the 2x2 pixels that upsampling makes from one. Phase p of cell a reads
// the source rows stride a - origin + shift[p] + e for e = 0 .. taps-1; tap e is the sum of the weight's rows
// entries[p taps + e]. Columns likewise.
struct Window {
  struct Range {
    int begin, end;
  };
  int K, taps, stride, phases, origin;
  int shift[2];
  std::vector<Range> entries;

  int height() const { return taps + shift[phases - 1]; }  // source rows that the phases of a cell read
};

// y[a] = sum_k w[k] s[a + k - K/2], s the activated source; or its transpose, with the taps in reverse.
inline Window plain_window(int K, bool transposed) {
  Window window{K, K, 1, 1, K / 2, {0, 0}, {}};
  for (int e = 0; e < K; ++e) {
    const int k = transposed ? K - 1 - e : e;
    window.entries.push_back({k, k + 1});
  }
  return window;
}

// y[2a + p] = sum_k w[k] s[floor((2a + p + k - K/2) / 2)]: two taps fall on one source row. Source rows -1 and H each
// represent two rows outside the upsampled image, so zeros there equal its zero padding.
inline Window upsampling_window(int K) {
  const int P = K / 2, origin = (P + 1) / 2;
  Window window{K, P + 1, 1, 2, origin, {0, P % 2}, {}};
  for (int p = 0; p < 2; ++p) {
    for (int e = 0; e < window.taps; ++e) {
      const int k = 2 * (e + window.shift[p] - origin) + P - p;
      window.entries.push_back({std::max(k, 0), std::min(k + 2, K)});
    }
  }
  return window;
}

// Its transpose: ds[a] = sum_e (w[K-1-e] + w[K-e]) dy[2a - K/2 + e] for e = 0 .. K, w zero outside 0 .. K-1.
inline Window transposed_upsampling_window(int K) {
  Window window{K, K + 1, 2, 1, K / 2, {0, 0}, {}};
  for (int e = 0; e <= K; ++e) window.entries.push_back({std::max(K - 1 - e, 0), std::min(K - e + 1, K)});
  return window;
}

// NHWC: source [H, W, C], target [phases * cell_rows, phases * cell_columns, C]. Forward reads bias and activates the
// source; backward multiplies the target by swish'(slope_of), which has the target's shape.
struct Image {
  const float* source;
  const float* weight;    // [K, K, C]
  const float* bias;      // [C]; null backward
  const float* slope_of;  // null forward
  float* target;
  int64_t C, H, W, cell_rows, cell_columns;
};

// Cells [top, bottom) x [left, right) of channels [channel, channel + channels).
struct Tile {
  int64_t top, bottom, left, right, channel, channels;
};

// Floats of scratch memory, 64-byte aligned, for tiles of at most this many columns and channels.
inline int64_t scratch_floats(const Window& window, int64_t columns, int64_t channels) {
  constexpr int64_t kMostLanes = 16;
  const int64_t cells = (columns + kCells - 1) / kCells * kCells;
  const int64_t ring = window.height() * (window.stride * (cells - 1) + window.height());
  const int64_t weight = int64_t{window.phases} * window.phases * window.taps * window.taps;
  return (ring + weight) * ((channels + kMostLanes - 1) / kMostLanes * kMostLanes);
}

}  // namespace vf::depthwise
