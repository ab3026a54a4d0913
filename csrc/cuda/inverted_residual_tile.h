// Layouts for the kernels of inverted_residual.cu: packed weights, a block's shared memory, the pixels of a block, a
// warp and a lane.
//
// Lane l of a warp is lane q = l % 4 of group g = l / 4, as the tensor cores count them.
#pragma once

#include <cstdint>

#include "launch.h"
#include "ptx.h"
#include "storage.h"

namespace vf::tile {

constexpr int kK = 5, kHalo = kK / 2;
constexpr int kRows = 8, kColumns = 16;  // of output pixels
constexpr int kDown = kRows + kK - 1, kAcross = kColumns + kK - 1, kPixels = kDown * kAcross;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSide = 4;    // of the square of output pixels that a warp owns
constexpr int kChunk = 32;  // channels per step of every product; one per lane in the window
constexpr int kPairs = kChunk / 2;
constexpr int kPad = 4;  // words; rows a multiple of 32 banks apart would conflict in load_matrices()
static_assert(kPixels % 16 == 0 && kPixels <= 32 * kWarps && kRows * kColumns == kSide * kSide * kWarps &&
              kAcross % 4 == 0 && kColumns / kSide == 4);

// The bytes that 32 lanes load at once; [32, 32] of a weight in the order of an operand; one channel's taps per lane.
using Lanes = FourWords[32];
using Tile = Lanes[4];

// The weights of 32 hidden channels, as packed by ops/inverted_residual.py. They are halved for swish.h, which takes
// x / 2 and returns twice the slope. A lane reads all of it at immediate offsets from one address.
template <int C, int kWeights>
struct Chunk {
  // Left operand: half of expand's, backward half of project's transposed.
  Tile in[C / kChunk];
  // Right operands: project's; backward half of expand's transposed and half of expand's.
  Tile more[kWeights - 1][C / kChunk];
  // Of channel `lane`, fp32: 25 taps, the bias, two unused; backward flipped, no bias.
  Lanes window[7];
  // Half of expand's, fp32, each twice: what the sums of a product begin with.
  FourWords expand_bias[kChunk / 2];
};

template <int C>
using ForwardChunk = Chunk<C, 2>;
template <int C>
using BackwardChunk = Chunk<C, 3>;

struct Arguments {
  const Bf16* source;  // [N, H, W, C]: x, backward ds
  const Bf16* weight;  // [hidden / 32] of ForwardChunk<C>, backward of BackwardChunk<C>
  const Bf16* bias;    // [C], of project; null backward
  Bf16* target;        // [N, H, W, C]: s, backward dx
  Bf16* h2;            // [N, H, W, hidden]: written unless null, backward read
  const Bf16* x;       // to compute h1 again; null forward
  int H, W, hidden;
};

// A row of a source operand permutes each 32 channels: lane q multiplies channels 8 q .. 8 q + 7, which the hardware
// takes for 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of two products of depth 16, so a lane holds eight adjacent channels.
// Pair p (channels 2 p, 2 p + 1) is therefore at word
__device__ __forceinline__ int place_of_pair(int p) { return 4 * (p % 4) + p / 4; }

// Likewise for each 16 pixels: lane q gets 4 q .. 4 q + 3, which the hardware takes for 2 q and 2 q + 1 of two operands
// of eight.
__device__ __forceinline__ int place_of_pixel(int p) { return p / 16 * 16 + p / 2 % 2 * 8 + p / 4 % 4 * 2 + p % 2; }

// Two blocks per SM, so that one uses the tensor cores while the other computes its window; C = 128 needs more than 128
// registers and gets one.
template <int C>
constexpr int kBlocksPerSm = C < 128 ? 2 : 1;

template <int C>
using OperandRow = uint32_t[C / 2 + kPad];

// A channel's pixels are contiguous, in bf16. The pitch is twice an odd number, so that there are no bank conflicts
// between lanes that read 8 bytes of a channel each, or between lanes that write 8 bytes of every fourth channel.
using Hidden = uint32_t[kChunk][kPixels / 2 + 2];

// A warp's 16 pixels of each channel: 8 words. The row pitch avoids bank conflicts between eight consecutive rows,
// which are written together, and between rows 0, 1, 8, 9, 16, 17, 24, 25, which form a matrix.
__device__ constexpr int middle_row(int channel) { return 12 * channel + 8 * (channel / 8); }
using Middle = uint32_t[middle_row(kChunk - 1) + 8];

template <int C>
struct alignas(16) ForwardShared {
  OperandRow<C> source[kPixels];
  Hidden hidden;
  alignas(16) Middle middle[kWarps];
};

template <int C>
struct alignas(16) BackwardShared {
  ForwardShared<C> both;
  OperandRow<C> x[kWarps][16];
};

// A thread's position: the block's first pixel and its index, the warp's first pixel within the block, the lane.
struct Place {
  int64_t first;
  int top, left, row, column, warp, lane;

  __device__ explicit Place(const Arguments& a)
      : warp(static_cast<int>(threadIdx.x / 32)), lane(static_cast<int>(threadIdx.x % 32)) {
    const int across = (a.W - 1) / kColumns + 1, down = (a.H - 1) / kRows + 1;
    const auto tile = static_cast<int>(blockIdx.x);
    left = tile % across * kColumns;
    top = tile / across % down * kRows;
    first = (int64_t{tile / across / down} * a.H + top) * a.W + left;
    row = warp / 4 * kSide;
    column = warp % 4 * kSide;
  }

  __device__ bool is_inside(const Arguments& a, int y, int x) const {
    return 0 <= top + y && top + y < a.H && 0 <= left + x && left + x < a.W;
  }

  // Index of a pixel counted from the block's first; -1 outside the image.
  __device__ int64_t pixel(const Arguments& a, int y, int x) const {
    return is_inside(a, y, x) ? first + y * a.W + x : -1;
  }

  // Of the warp's 16, row by row.
  __device__ int64_t own_pixel(const Arguments& a, int i) const {
    return pixel(a, row + i / kSide, column + i % kSide);
  }
};

// Copies eight adjacent channels, number `group`, of a pixel into its row of an operand; zeros for pixel -1.
template <int C>
__device__ __forceinline__ void copy_group(const Bf16* tensor, int64_t pixel, int group, OperandRow<C>& row) {
  const FourWords words = load_four_words(tensor + pixel * C + 8 * group, pixel >= 0);
  VF_UNROLL
  for (int j = 0; j < 4; ++j) row[group / 4 * kPairs + place_of_pair(group % 4 * 4 + j)] = words.v[j];
}

template <int C>
__device__ void load_source(const Arguments& a, const Place& at, OperandRow<C> (&source)[kPixels]) {
  for (int i = static_cast<int>(threadIdx.x); i < kPixels * (C / 8); i += kThreads) {
    const int p = i / (C / 8);
    const int64_t pixel = at.pixel(a, p / kAcross - kHalo, p % kAcross - kHalo);
    copy_group<C>(a.source, pixel, i % (C / 8), source[place_of_pixel(p)]);
  }
}

// The warp's own pixels of x, which no other warp reads.
template <int C>
__device__ void load_own(const Arguments& a, const Place& at, OperandRow<C> (&own)[16]) {
  for (int i = at.lane; i < 16 * (C / 8); i += 32) {
    copy_group<C>(a.x, at.own_pixel(a, i / (C / 8)), i % (C / 8), own[i / (C / 8)]);
  }
}

// Pixels 4 q .. 4 q + 3 of each of the two groups of 16 that a warp fills in a chunk. There are 15 groups, so the last
// warp computes the last one twice.
struct Runs {
  int place[2];       // of a run's first pixel among kPixels
  const Bf16* h2[2];  // its channels 4 g .. 4 g + 3; null forward
  unsigned inside;    // bit 4 t + e: pixel e of run t is inside the image

  __device__ Runs(const Arguments& a, const Place& at) : inside(0) {
    VF_UNROLL
    for (int t = 0; t < 2; ++t) {
      place[t] = 16 * min(2 * at.warp + t, kPixels / 16 - 1) + at.lane % 4 * 4;
      const int y = place[t] / kAcross - kHalo, x = place[t] % kAcross - kHalo;
      h2[t] = a.x == nullptr ? nullptr : a.h2 + (at.first + y * a.W + x) * a.hidden + at.lane / 4 * 4;
      for (int e = 0; e < 4; ++e) inside |= static_cast<unsigned>(at.is_inside(a, y, x + e)) << (4 * t + e);
    }
  }

  __device__ bool is_inside(int t, int e) const { return inside >> (4 * t + e) & 1; }
};

// Pixels g and g + 8 of the warp's own; a lane writes eight adjacent channels of them at a time.
struct OwnPixels {
  int first;       // index of the first relative to the block's first pixel; the second is two rows below
  bool inside[2];  // the image

  __device__ OwnPixels(const Arguments& a, const Place& at) {
    const int y = at.row + at.lane / 16, x = at.column + at.lane / 4 % 4;
    first = y * a.W + x;
    for (int half = 0; half < 2; ++half) inside[half] = at.is_inside(a, y + 2 * half, x);
  }

  // To eight channels of a tensor of C, from `to` on; `block`: index of the block's first pixel.
  __device__ void write(int half, const FourWords& words, Bf16* to, int64_t block, int W, int C) const {
    if (inside[half]) store_four_words(words, to + (block + first + 2 * half * W) * C);
  }
};

}  // namespace vf::tile
