// inverted_residual and its backward on a GPU: a whole block in one kernel, on tensor cores. NHWC, bf16, fp32 sums.
//
// A block owns 8 x 16 output pixels of one image and all channels; each of its 8 warps owns 4 x 4 of these pixels.
// Grid: x covers tiles across, tiles down, images, in this order. Hidden channels are processed in chunks of 32:
//   1. All warps compute the chunk's hidden activations at the 12 x 20 pixels that the 5x5 window reads, by tensor
//      cores from the source tile in shared memory, and store them in shared memory, a channel's pixels contiguous.
//   2. Each warp applies the window at its own pixels in fp32, one channel per lane, transposes the result through
//      shared memory so that a pixel's channels are contiguous, and multiplies it with the second weight by tensor
//      cores, into sums that stay in registers for all chunks.
// The backward is the same with ds for x, each weight replaced by the other's transpose, the window flipped, and swish
// replaced by its slopes at h2 and h1; h1 is recomputed at the warp's own pixels.
//
// Bytes: x read, s written, h2 written if requested; backward ds, x, h2 read, dx written. Reads through the window
// repeat 1.9 times, from L2 after the first. Every warp reads the weights, from L2 and L1.
// Per output pixel: tensor FLOP 2 C hidden (2 + 1), backward 2 C hidden (2 + 2); fp32 FLOP 50 hidden; special functions
// hidden (2 + 1). Shared memory for C = 32, 64, 128: 47, 62, 92 KB, backward 57, 80, 126 KB.
// No atomics: the order of summation does not depend on the position in the batch.
#include <cstdint>

#include "inverted_residual_steps.h"
#include "launchers.h"

namespace vf {
namespace {

using namespace tile;

// swish; the words hold eight adjacent channels of two pixels, the layout of the left operand.
__device__ __forceinline__ void activate(FragmentA (&left)[2], const FourWords (&pixels)[2]) {
  VF_UNROLL
  for (int half = 0; half < 2; ++half) {
    VF_UNROLL
    for (int j = 0; j < 4; ++j) {
      Values<Bf16> values = to_values(Word<Bf16>{half_of_pair(pixels[half].v[j])});
      VF_UNROLL
      for (int e = 0; e < 2; ++e) values.v[e] = swish_of_half(values.v[e]);
      left[j / 2].v[half + j % 2 * 2] = to_word(values).bits;
    }
  }
}

// Multiplies by 2 swish'(h); `half_h` is h / 2. Both hold the same channels of the same pixels in each lane.
__device__ __forceinline__ void multiply_by_slope(FragmentA (&left)[2], const FourWords (&pixels)[2],
                                                  const Sums& half_h) {
  VF_UNROLL
  for (int half = 0; half < 2; ++half) {
    VF_UNROLL
    for (int j = 0; j < 4; ++j) {
      Values<Bf16> values = to_values(Word<Bf16>{pixels[half].v[j]});
      VF_UNROLL
      for (int e = 0; e < 2; ++e) values.v[e] = times_twice_slope_of_half(values.v[e], half_h.pair(half, j).v[e]);
      left[j / 2].v[half + j % 2 * 2] = to_word(values).bits;
    }
  }
}

template <int C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) inverted_residual_kernel(const Arguments a) {
  VF_DYNAMIC_SHARED(ForwardShared<C>, shared);
  const Place at(a);
  const Runs runs(a, at);
  Output<C> output(a.bias, at.lane);
  load_source<C>(a, at, shared->source);
  const OwnPixels own(a, at);
  const auto* weights = reinterpret_cast<const ForwardChunk<C>*>(a.weight);
  VF_ROLL
  for (int first = 0; first < a.hidden; first += kChunk, ++weights) {
    __syncthreads();  // the source is loaded, and no warp still reads the previous chunk
    fill_hidden<C, true>(a, at, runs, first, *weights, *shared);
    __syncthreads();
    FourWords h2[2];
    Window(weights->window, at, shared->hidden).transpose(h2, at.lane, shared->middle[at.warp]);
    VF_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (a.h2 != nullptr) own.write(half, h2[half], a.h2 + first + at.lane % 4 * 8, at.first, a.W, a.hidden);
    }
    FragmentA left[2];
    activate(left, h2);
    output.add(weights->more[0], left, at.lane);
  }
  output.write(a, at, own);
}

template <int C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) inverted_residual_backward_kernel(const Arguments a) {
  VF_DYNAMIC_SHARED(BackwardShared<C>, shared);
  const Place at(a);
  const Runs runs(a, at);
  const OwnPixels own(a, at);
  Output<C> output(nullptr, at.lane);
  load_source<C>(a, at, shared->both.source);
  load_own<C>(a, at, shared->x[at.warp]);
  const auto* weights = reinterpret_cast<const BackwardChunk<C>*>(a.weight);
  VF_ROLL
  for (int first = 0; first < a.hidden; first += kChunk, ++weights) {
    __syncthreads();  // as above
    fill_hidden<C, false>(a, at, runs, first, *weights, shared->both);
    __syncthreads();
    FourWords sums[2];
    Window(weights->window, at, shared->both.hidden).transpose(sums, at.lane, shared->both.middle[at.warp]);
    Sums h1;
    own_hidden<C>(h1, shared->x[at.warp], *weights, at.lane);
    FragmentA left[2];
    multiply_by_slope(left, sums, h1);
    output.add(weights->more[0], left, at.lane);
  }
  output.write(a, at, own);
}

unsigned grid_over(int64_t N, int H, int W) {
  return static_cast<unsigned>(N * ((H - 1) / kRows + 1) * ((W - 1) / kColumns + 1));
}

template <int C>
void launch(const Arguments& a, int64_t N, cudaStream_t cuda_stream) {
  const unsigned grid = grid_over(N, a.H, a.W);
  if (a.x == nullptr) {
    VF_LAUNCH(inverted_residual_kernel<C>, grid, kThreads, sizeof(ForwardShared<C>), cuda_stream, a);
  } else {
    VF_LAUNCH(inverted_residual_backward_kernel<C>, grid, kThreads, sizeof(BackwardShared<C>), cuda_stream, a);
  }
}

void launch_channels(const Arguments& a, int64_t N, int C, cudaStream_t cuda_stream) {
  if (N * a.H * a.W == 0) return;
  if (C == 32) launch<32>(a, N, cuda_stream);
  if (C == 64) launch<64>(a, N, cuda_stream);
  if (C == 128) launch<128>(a, N, cuda_stream);
}

}  // namespace

void launch_inverted_residual(const Bf16* x, const Bf16* weight, const Bf16* project_bias, int64_t N, int H, int W,
                              int C, int hidden, Bf16* s, Bf16* h2, cudaStream_t cuda_stream) {
  launch_channels({x, weight, project_bias, s, h2, nullptr, H, W, hidden}, N, C, cuda_stream);
}

void launch_inverted_residual_backward(const Bf16* ds, const Bf16* x, const Bf16* h2, const Bf16* weight_t, int64_t N,
                                       int H, int W, int C, int hidden, Bf16* dx, cudaStream_t cuda_stream) {
  auto* read_only = const_cast<Bf16*>(h2);
  launch_channels({ds, weight_t, nullptr, dx, read_only, x, H, W, hidden}, N, C, cuda_stream);
}

}  // namespace vf
