// What inverted_residual.cu makes its two kernels of: the source tile of a block, operands and sums of a warp, hidden
// chunks, the window over them. kForward: for the forward kernel, else for the backward one.
#pragma once

#include <cstdint>

#include "launch.h"
#include "ptx.h"
#include "storage.h"
#include "swish.h"

namespace vf::tile {

constexpr int kK = 5, kHalo = kK / 2;
constexpr int kRows = 8, kColumns = 16;  // of output pixels
constexpr int kDown = kRows + kK - 1, kAcross = kColumns + kK - 1, kPixels = kDown * kAcross;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRun = 8;     // outputs of a thread, in a row
constexpr int kChunk = 32;  // channels that a step of every product takes
constexpr int kPairs = kChunk / 2;
constexpr int kPitch = kAcross + 1;  // odd, for the two rows of pixels that a warp reads at once to lie in other banks
constexpr int kPad = 4;              // words; rows a multiple of 32 banks apart would collide in load_matrices()
static_assert(kPixels % 16 == 0 && kRows * kColumns == 16 * kWarps && kRows / 2 * (kColumns / kRun) == kWarps &&
              kPixels <= 32 * kWarps);

struct Arguments {
  const Bf16* source;      // [N, H, W, C]: x, backward ds
  const Bf16* in_weight;   // [hidden, C]: of expand, backward project's transposed
  const Bf16* taps;        // [5, 5, hidden]
  const Bf16* out_weight;  // [C, hidden]: of project, backward expand's transposed
  Bf16* target;            // [N, H, W, C]: s, backward dx
  Bf16* h2;                // [N, H, W, hidden]: written unless null, backward read
  const Bf16 *expand_bias, *depthwise_bias, *project_bias;  // the last two null backward
  const Bf16 *x, *expand_weight;                            // to compute h1 again; null forward
  int H, W, hidden;
};

// A row of a left operand holds the channels of each 32 in another order than memory: lane q of four multiplies those
// of 8 q .. 8 q + 7, which it reads from a row of the weight at once, where the hardware takes them for 2 q, 2 q + 1,
// 2 q + 8 and 2 q + 9 of two products of depth 16. Pair p (channels 2 p, 2 p + 1) thus lies at word
__device__ __forceinline__ int place_of_pair(int p) { return 4 * (p % 4) + p / 4; }

// Two, so that one fills the tensor cores while the other is at its window; but C = 128 needs more than 128 registers.
template <int C>
constexpr int kBlocksPerSm = C < 128 ? 2 : 1;

template <int C>
using OperandRow = uint32_t[C / 2 + kPad];
using Hidden = uint32_t[kDown][kPitch][kPairs];  // in the order of memory

template <int C>
struct alignas(16) ForwardShared {
  OperandRow<C> source[kPixels];
  Hidden hidden;
  OperandRow<kChunk> middle[kWarps][16];
};

template <int C>
struct alignas(16) BackwardShared {
  ForwardShared<C> both;
  OperandRow<C> x[kWarps][16];
};

// Where a thread works: the block's first pixel, the warp's first among the block's, the lane.
struct Place {
  int64_t n;
  int top, left, row, column, warp, lane;

  __device__ explicit Place(const Arguments& a)
      : warp(static_cast<int>(threadIdx.x / 32)), lane(static_cast<int>(threadIdx.x % 32)) {
    const int across = (a.W - 1) / kColumns + 1, down = (a.H - 1) / kRows + 1;
    const auto tile = static_cast<int>(blockIdx.x);
    left = tile % across * kColumns;
    top = tile / across % down * kRows;
    n = tile / across / down;
    row = warp / 2 * 2;
    column = warp % 2 * kRun;
  }

  // Index of a pixel counted from the block's first; -1 outside the image.
  __device__ int64_t pixel(const Arguments& a, int y, int x) const {
    const bool inside = 0 <= top + y && top + y < a.H && 0 <= left + x && left + x < a.W;
    return inside ? (n * a.H + top + y) * a.W + left + x : -1;
  }

  // Of the warp's 16, those of its operands' rows: eight of one row of the image, then eight of the next.
  __device__ int64_t own_pixel(const Arguments& a, int i) const { return pixel(a, row + i / kRun, column + i % kRun); }
};

// Eight neighbouring channels `group` of a pixel into its row of an operand; zeros for pixel -1.
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
    copy_group<C>(a.source, at.pixel(a, p / kAcross - kHalo, p % kAcross - kHalo), i % (C / 8), source[p]);
  }
}

// The warp's own pixels of x, which no other warp reads.
template <int C>
__device__ void load_own(const Arguments& a, const Place& at, OperandRow<C> (&own)[16]) {
  for (int i = at.lane; i < 16 * (C / 8); i += 32) {
    copy_group<C>(a.x, at.own_pixel(a, i / (C / 8)), i % (C / 8), own[i / (C / 8)]);
  }
}

// [32, 32] of a weight, whose rows are `pitch` apart, as the right operand of two products of depth 16.
struct Weight {
  FourWords rows[4];

  __device__ Weight(const Bf16* first, int pitch, int lane) {
    const int row = lane / 8 * 8 + lane / 4 % 2;  // and every second from there, for the order of Sums
    const Bf16* from = first + int64_t{row} * pitch + 8 * (lane % 4);
    VF_UNROLL
    for (int j = 0; j < 4; ++j) rows[j] = load_four_words(from + int64_t{2 * j} * pitch, true);
  }
};

// A warp's sums [16 pixels, 32 channels]: lane 4 p + q holds channels 8 q .. 8 q + 7 of pixels p and p + 8, two of them
// in each tile. That is the order of a left operand too.
struct Sums {
  FragmentC tiles[4];

  __device__ void start(const Bf16* bias, int lane) {
    const FourWords words = load_four_words(bias + 8 * (lane % 4), bias != nullptr);
    VF_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Values<Bf16> pair = to_values(Word<Bf16>{words.v[j]});
      tiles[j] = {{pair.v[0], pair.v[1], pair.v[0], pair.v[1]}};
    }
  }

  // += left [16, 32] times the transpose of weight.
  __device__ void add_product(const FragmentA (&left)[2], const Weight& weight) {
    VF_UNROLL
    for (int j = 0; j < 4; ++j) {
      multiply_add(tiles[j], left[0], {{weight.rows[j].v[0], weight.rows[j].v[1]}});
      multiply_add(tiles[j], left[1], {{weight.rows[j].v[2], weight.rows[j].v[3]}});
    }
  }

  // Pair j of the lane's channels at its pixel `half`.
  __device__ Values<Bf16> pair(int half, int j) const { return {{tiles[j].v[2 * half], tiles[j].v[2 * half + 1]}}; }

  __device__ FourWords words(int half) const {
    FourWords words;
    VF_UNROLL
    for (int j = 0; j < 4; ++j) words.v[j] = to_word(pair(half, j)).bits;
    return words;
  }
};

// 16 rows, of which `row` is the one of pixel lane % 16, and 32 channels.
__device__ __forceinline__ void load_left(FragmentA (&left)[2], const uint32_t* row, int lane) {
  VF_UNROLL
  for (int s = 0; s < 2; ++s) left[s] = load_matrices(row + 8 * s + lane / 16 * 4);
}

// bias + source [16, C] times the transpose of weight [32, C], for kTiles sources; `rows` as above.
template <int C, int kTiles>
__device__ void start_hidden(Sums (&sums)[kTiles], const uint32_t* const (&rows)[kTiles], const Bf16* weight,
                             const Bf16* bias, int lane) {
  VF_UNROLL
  for (int t = 0; t < kTiles; ++t) sums[t].start(bias, lane);
  VF_ROLL  // or C = 64 takes more than 128 registers
  for (int c = 0; c < C; c += kChunk) {
    const Weight part(weight + c, C, lane);
    VF_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      FragmentA left[2];
      load_left(left, rows[t] + c / 2, lane);
      sums[t].add_product(left, part);
    }
  }
}

// Pixels p and p + 8 of the lane's `sums` into the hidden chunk from channel `first`: swish, backward times its slope.
template <bool kForward>
__device__ void put_hidden(const Arguments& a, const Place& at, int first, int p, Sums& sums, Hidden& hidden) {
  VF_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int y = (p + 8 * half) / kAcross, x = (p + 8 * half) % kAcross;
    const int64_t pixel = at.pixel(a, y - kHalo, x - kHalo);
    FourWords h2{};
    if (!kForward) h2 = load_four_words(a.h2 + pixel * a.hidden + first + at.lane % 4 * 8, pixel >= 0);
    VF_UNROLL
    for (int i = 0; i < 8; ++i) {
      float& value = sums.tiles[i / 2].v[2 * half + i % 2];
      if (kForward) value = pixel >= 0 ? swish(value) : 0.0f;  // outside the image, swish of the bias would stand
      if (!kForward) value *= swish_slope(to_values(Word<Bf16>{h2.v[i / 2]}).v[i % 2]);
    }
    store_four_words(sums.words(half), &hidden[y][x][at.lane % 4 * 4]);
  }
}

// The chunk at all pixels that the window reads: forward swish(h1), backward dh2. Two tiles of 16 pixels for each warp,
// to load a weight once for both; there are 15, and the last warp has the last of them twice.
template <int C, bool kForward>
__device__ void fill_hidden(const Arguments& a, const Place& at, int first, ForwardShared<C>& shared) {
  const int pixels[2] = {32 * at.warp, min(32 * at.warp + 16, kPixels - 16)};
  const uint32_t* const rows[2] = {shared.source[pixels[0] + at.lane % 16], shared.source[pixels[1] + at.lane % 16]};
  Sums sums[2];
  const Bf16* bias = kForward ? a.expand_bias + first : nullptr;
  start_hidden<C>(sums, rows, a.in_weight + int64_t{first} * C, bias, at.lane);
  VF_UNROLL
  for (int t = 0; t < 2; ++t) put_hidden<kForward>(a, at, first, pixels[t] + at.lane / 4, sums[t], shared.hidden);
}

// The window over the chunk from channel `first`: a thread has one pair of channels of eight pixels of a row.
template <bool kForward>
struct Window {
  Values<Bf16> sums[kRun];

  __device__ Window(const Arguments& a, const Place& at, int first, const Hidden& hidden) {
    const int pair = at.lane % kPairs, y = at.row + at.lane / kPairs;
    const Values<Bf16> bias = to_values(load_word(a.depthwise_bias + first + 2 * pair, kForward));
    VF_UNROLL
    for (int t = 0; t < kRun; ++t) sums[t] = bias;
    VF_UNROLL
    for (int k = 0; k < kK; ++k) {
      Values<Bf16> inputs[kRun + kK - 1];
      VF_UNROLL
      for (int i = 0; i < kRun + kK - 1; ++i) inputs[i] = to_values(Word<Bf16>{hidden[y + k][at.column + i][pair]});
      VF_UNROLL
      for (int l = 0; l < kK; ++l) {
        const int entry = kForward ? k * kK + l : kK * kK - 1 - k * kK - l;
        const Values<Bf16> tap = to_values(load_word(a.taps + int64_t{entry} * a.hidden + first + 2 * pair, true));
        VF_UNROLL
        for (int i = 0; i < 2 * kRun; ++i) {
          float& sum = sums[i / 2].v[i % 2];
          sum = fmaf(inputs[i / 2 + l].v[i % 2], tap.v[i % 2], sum);
        }
      }
    }
  }

  __device__ void write_h2(const Arguments& a, const Place& at, int first) const {
    const int64_t pixel = at.own_pixel(a, at.lane / kPairs * kRun);
    const int count = pixel < 0 ? 0 : a.W - at.left - at.column;
    Bf16* to = a.h2 + pixel * a.hidden + first + at.lane % kPairs * 2;
    VF_UNROLL
    for (int t = 0; t < kRun; ++t) {
      if (t < count) store_word(to_word(sums[t]), to + int64_t{t} * a.hidden);
    }
  }

  // Through shared memory to the lanes that need them as a left operand.
  __device__ void to_left(FragmentA (&left)[2], const Place& at, OperandRow<kChunk> (&middle)[16]) const {
    VF_UNROLL
    for (int t = 0; t < kRun; ++t) {
      Values<Bf16> values = sums[t];
      if (kForward) values = {{swish(values.v[0]), swish(values.v[1])}};
      middle[at.lane / kPairs * kRun + t][place_of_pair(at.lane % kPairs)] = to_word(values).bits;
    }
    __syncwarp();
    load_left(left, middle[at.lane % 16], at.lane);
  }
};

// The sums of a warp's own pixels, over all C channels of the output.
template <int C>
struct Output {
  Sums sums[C / kChunk];

  __device__ Output(const Bf16* bias, int lane) {
    VF_UNROLL
    for (int c = 0; c < C; c += kChunk) sums[c / kChunk].start(bias == nullptr ? nullptr : bias + c, lane);
  }

  __device__ void add(const Arguments& a, int first, const FragmentA (&left)[2], int lane) {
    VF_UNROLL
    for (int c = 0; c < C; c += kChunk) {
      sums[c / kChunk].add_product(left, Weight(a.out_weight + int64_t{c} * a.hidden + first, a.hidden, lane));
    }
  }

  __device__ void write(const Arguments& a, const Place& at) const {
    VF_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t pixel = at.own_pixel(a, at.lane / 4 + 8 * half);
      if (pixel < 0) continue;
      VF_UNROLL
      for (int c = 0; c < C; c += kChunk) {
        store_four_words(sums[c / kChunk].words(half), a.target + pixel * C + c + at.lane % 4 * 8);
      }
    }
  }
};

}  // namespace vf::tile
