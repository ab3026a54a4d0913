// The work of one task of the pointwise kernels: a product of NHWC pixels with a packed weight, and a tile of it.
#pragma once

#include <cstdint>

namespace vf::pointwise {

constexpr int kPanel = 16;           // contiguous output channels of a packed weight
constexpr int64_t kTileRows = 64;    // pixels whose packed channels stay in the L2 cache: 64 x 384 take 96 KB
constexpr int64_t kScratchRows = 66;  // a tile's rows in whole groups of 2, 6 or 8: the last group reads beyond the tile
constexpr int64_t kTileDepth = 384;  // input channels per partial sum; longer sums are less accurate than oneDNN's

enum class Activation { none, swish, elu };

// y[m, n] = sum_k f(x[m, k]) weight[k, n], + bias[n] and + residual[m, n] if given; with slope_of,
// f'(slope_of[m, n]) sum_k x[m, k] weight[k, n].
struct Product {
  const float* x;         // [M, K]
  const float* weight;    // [ceil(N / kPanel)][K][kPanel], zeros beyond N
  const float* bias;      // [N] or null
  const float* residual;  // [M, N] or null
  const float* slope_of;  // [M, N] or null
  float* y;               // [M, N]
  int64_t M, K, N;
  Activation f;
};

// Rows [top, bottom) x panels [left, right).
struct Tile {
  int64_t top, bottom, left, right;
};

// Floats of scratch memory, 64-byte aligned, for a tile's packed rows. Each row is padded by a cache line, because rows
// a power of two apart evict each other from the L1 cache.
inline int64_t scratch_stride(int64_t depth) { return (depth + kPanel - 1) / kPanel * kPanel + kPanel; }
inline int64_t scratch_floats(int64_t K) {
  return kScratchRows * scratch_stride(K < kTileDepth ? K : kTileDepth);
}

}  // namespace vf::pointwise
