// The steps of inverted_residual.cu: a chunk of hidden activations, the window over it, the products with weights.
// kForward selects the forward or the backward kernel. Lane q of group g: see inverted_residual_tile.h.
#pragma once

#include <cstdint>

#include "inverted_residual_tile.h"
#include "swish.h"

namespace vf::tile {

__device__ __forceinline__ FragmentC to_fragment(const FourWords& words) {
  return {{float_of(words.v[0]), float_of(words.v[1]), float_of(words.v[2]), float_of(words.v[3])}};
}

// A chunk at 32 pixels of a warp: channels 4 g .. 4 g + 3 of its runs of pixels. [m][t][j].v[2 i + b] is channel
// 4 g + 2 m + i of pixel 2 j + b of run t.
struct HiddenSums {
  FragmentC v[2][2][2];

  // [m]: the bias of channels 4 g + 2 m and the next, twice each.
  __device__ void start(const FourWords (&bias)[2]) {
    VF_UNROLL
    for (int i = 0; i < 8; ++i) v[i / 4][i / 2 % 2][i % 2] = to_fragment(bias[i / 4]);
  }

  // += weight [32, 32] times the transpose of source [32 pixels, 32]; `rows`: the lane's of either sixteen.
  __device__ void add_product(const Tile& weight, const uint32_t* const (&rows)[2], int pitch, int lane) {
    FourWords left[4];
    VF_UNROLL
    for (int i = 0; i < 4; ++i) left[i] = weight[i][lane];
    VF_UNROLL
    for (int t = 0; t < 2; ++t) {
      VF_UNROLL
      for (int j = 0; j < 2; ++j) {
        const FragmentA right = load_matrices(rows[t] + 8 * j * pitch);
        VF_UNROLL
        for (int i = 0; i < 4; ++i) {
          const FragmentA part = {{left[i].v[0], left[i].v[1], left[i].v[2], left[i].v[3]}};
          multiply_add(v[i / 2][t][j], part, {{right.v[i % 2 * 2], right.v[i % 2 * 2 + 1]}});
        }
      }
    }
  }

  // swish; v hold halves.
  __device__ void activate() {
    VF_UNROLL
    for (int i = 0; i < 32; ++i) {
      float& value = v[i / 16][i / 8 % 2][i / 4 % 2].v[i % 4];
      value = swish_of_half(value);
    }
  }

  // Times swish'(h2); v hold halves.
  __device__ void multiply_by_slope(const TwoWords (&h2)[2][4]) {
    VF_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int m = i / 8, t = i / 4 % 2, e = i % 4;
      const Values<Bf16> half = to_values(Word<Bf16>{half_of_pair(h2[t][e].v[m])});
      VF_UNROLL
      for (int c = 0; c < 2; ++c) {
        float& value = v[m][t][e / 2].v[2 * c + e % 2];
        value = times_twice_slope_of_half(value, half.v[c]);
      }
    }
  }

  __device__ void store(const Runs& runs, bool zero_outside, int group, Hidden& hidden) const {
    VF_UNROLL
    for (int t = 0; t < 2; ++t) {
      uint32_t words[4][2];
      VF_UNROLL
      for (int c = 0; c < 4; ++c) {
        VF_UNROLL
        for (int j = 0; j < 2; ++j) {
          const FragmentC& sums = v[c / 2][t][j];
          words[c][j] = bf16_pair(sums.v[c % 2 * 2], sums.v[c % 2 * 2 + 1]);
        }
      }
      if (zero_outside) {
        VF_UNROLL
        for (int j = 0; j < 2; ++j) {
          uint32_t keep = runs.is_inside(t, 2 * j) ? 0xffffu : 0;
          if (runs.is_inside(t, 2 * j + 1)) keep |= ~0xffffu;
          VF_UNROLL
          for (int c = 0; c < 4; ++c) words[c][j] &= keep;
        }
      }
      VF_UNROLL
      for (int c = 0; c < 4; ++c) {
        store_two_words({{words[c][0], words[c][1]}}, &hidden[4 * group + c][runs.place[t] / 2]);
      }
    }
  }
};

// The chunk from channel `first` at all pixels that the window reads: forward swish(h1), backward dh2.
template <int C, bool kForward, class Weights>
__device__ void fill_hidden(const Arguments& a, const Place& at, const Runs& runs, int first, const Weights& weights,
                            ForwardShared<C>& shared) {
  constexpr int kPitch = C / 2 + kPad;
  HiddenSums sums;
  FourWords bias[2] = {};
  for (int m = 0; m < 2 && kForward; ++m) bias[m] = weights.expand_bias[at.lane / 4 * 2 + m];
  sums.start(bias);
  const uint32_t* rows[2];
  VF_UNROLL
  for (int t = 0; t < 2; ++t) rows[t] = shared.source[runs.place[t] / 16 * 16 + at.lane % 8] + at.lane / 8 * 4;
  VF_UNROLL
  for (int c = 0; c < C; c += kChunk) {
    const uint32_t* const part[2] = {rows[0] + c / 2, rows[1] + c / 2};
    sums.add_product(weights.in[c / kChunk], part, kPitch, at.lane);
  }
  TwoWords h2[2][4];
  if (!kForward) {
    VF_UNROLL
    for (int i = 0; i < 8; ++i) {
      const Bf16* from = runs.h2[i / 4] + first + int64_t{i % 4} * a.hidden;
      h2[i / 4][i % 4] = load_two_words(from, runs.is_inside(i / 4, i % 4));
    }
  }
  if (kForward) sums.activate();
  if (!kForward) sums.multiply_by_slope(h2);
  // Zeros outside the image, where the forward would give swish of the bias; the backward gives zeros, as the source.
  sums.store(runs, kForward && runs.inside != 0xff, at.lane / 4, shared.hidden);
}

// The window over a chunk: a lane computes one channel of the warp's pixels.
struct Window {
  float sums[kSide][kSide];

  __device__ Window(const Lanes (&packed)[7], const Place& at, const Hidden& hidden) {
    float taps[28];
    VF_UNROLL
    for (int i = 0; i < 7; ++i) {
      const FourWords words = packed[i][at.lane];
      VF_UNROLL
      for (int j = 0; j < 4; ++j) taps[4 * i + j] = float_of(words.v[j]);
    }
    VF_UNROLL
    for (int i = 0; i < kSide * kSide; ++i) sums[i / kSide][i % kSide] = taps[kK * kK];
    const uint32_t* from = &hidden[at.lane][(at.row * kAcross + at.column) / 2];
    VF_UNROLL
    for (int y = 0; y < kSide + kK - 1; ++y) {
      float inputs[8];
      VF_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Values<Bf16> pair = to_values(Word<Bf16>{load_two_words(from + y * (kAcross / 2) + i / 2 * 2).v[i % 2]});
        inputs[2 * i] = pair.v[0];
        inputs[2 * i + 1] = pair.v[1];
      }
      VF_UNROLL
      for (int row = 0; row < kSide; ++row) {
        if (y < row || y >= row + kK) continue;
        VF_UNROLL
        for (int l = 0; l < kK; ++l) {
          VF_UNROLL
          for (int x = 0; x < kSide; ++x) sums[row][x] = fmaf(inputs[x + l], taps[(y - row) * kK + l], sums[row][x]);
        }
      }
    }
  }

  // Through shared memory: eight adjacent channels 8 q .. 8 q + 7 of pixels g and g + 8, rounded.
  __device__ void transpose(FourWords (&pixels)[2], int lane, Middle& middle) const {
    VF_UNROLL
    for (int half = 0; half < 2; ++half) {
      FourWords words;
      VF_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float* const pair = &sums[2 * half + j / 2][j % 2 * 2];
        words.v[j] = bf16_pair(pair[0], pair[1]);
      }
      store_four_words(words, &middle[middle_row(lane) + 4 * half]);
    }
    __syncwarp();
    const uint32_t* row = &middle[middle_row(lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2)];
    VF_UNROLL
    for (int half = 0; half < 2; ++half) {
      const FragmentA matrices = load_matrices_transposed(row + 4 * half);
      VF_UNROLL
      for (int j = 0; j < 4; ++j) pixels[half].v[j] = matrices.v[j];
    }
  }
};

// A warp's sums [16 pixels, 32 channels]: a lane holds channels 8 q .. 8 q + 7 of pixels g and g + 8, two of them in
// each tile. This is also the order of a left operand.
struct Sums {
  FragmentC tiles[4];

  // += left [16, 32] times the transpose of weight.
  __device__ void add_product(const FragmentA (&left)[2], const Tile& weight, int lane) {
    VF_UNROLL
    for (int j = 0; j < 4; ++j) {
      const FourWords right = weight[j][lane];
      multiply_add(tiles[j], left[0], {{right.v[0], right.v[1]}});
      multiply_add(tiles[j], left[1], {{right.v[2], right.v[3]}});
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

// Half of h1 at the warp's own pixels, whose x are `rows`.
template <int C>
__device__ void own_hidden(Sums& h1, const OperandRow<C> (&rows)[16], const BackwardChunk<C>& weights, int lane) {
  VF_UNROLL
  for (int j = 0; j < 4; ++j) h1.tiles[j] = to_fragment(weights.expand_bias[lane % 4 * 4 + j]);
  VF_UNROLL
  for (int c = 0; c < C; c += kChunk) {
    FragmentA left[2];
    VF_UNROLL
    for (int s = 0; s < 2; ++s) left[s] = load_matrices(&rows[lane % 16][c / 2 + 8 * s + lane / 16 * 4]);
    h1.add_product(left, weights.more[1][c / kChunk], lane);
  }
}

// The sums of a warp's own pixels, over all C channels of the output.
template <int C>
struct Output {
  Sums sums[C / kChunk];

  __device__ Output(const Bf16* bias, int lane) {
    VF_UNROLL
    for (int c = 0; c < C; c += kChunk) {
      const FourWords words = load_four_words(bias + c + 8 * (lane % 4), bias != nullptr);
      VF_UNROLL
      for (int j = 0; j < 4; ++j) {
        const Values<Bf16> pair = to_values(Word<Bf16>{words.v[j]});
        sums[c / kChunk].tiles[j] = {{pair.v[0], pair.v[1], pair.v[0], pair.v[1]}};
      }
    }
  }

  __device__ void add(const Tile (&weight)[C / kChunk], const FragmentA (&left)[2], int lane) {
    VF_UNROLL
    for (int c = 0; c < C; c += kChunk) sums[c / kChunk].add_product(left, weight[c / kChunk], lane);
  }

  __device__ void write(const Arguments& a, const Place& at, const OwnPixels& pixels) const {
    VF_UNROLL
    for (int half = 0; half < 2; ++half) {
      VF_UNROLL
      for (int c = 0; c < C; c += kChunk) {
        pixels.write(half, sums[c / kChunk].words(half), a.target + c + at.lane % 4 * 8, at.first, a.W, C);
      }
    }
  }
};

}  // namespace vf::tile
