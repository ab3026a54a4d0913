// inverted_residual and its backward on a GPU: a whole block in one kernel, on tensor cores. NHWC, bf16, fp32 sums.
//
// A block owns 8 x 16 output pixels of one image and all channels; 8 warps, of which each owns 2 x 8 of these pixels.
// Grid: x covers tiles across, tiles down, images, in this order. The hidden channels pass by in chunks of 32:
//   1. All warps: the hidden activations of the chunk at the 12 x 20 pixels that the 5x5 window reads, by tensor cores
//      from the source tile in shared memory, back into shared memory.
//   2. Each warp: the window at its own pixels in fp32, then the products with the second weight by tensor cores, into
//      sums that stay in registers from the first chunk to the last.
// Backward the same: ds stands for x, each weight for the other one's transpose, the window is flipped, the slope of
// swish at h2 and at h1 for swish; h1 is computed again, at the warp's own pixels. The parts of all this are in
// inverted_residual_tile.h.
//
// Bytes: x read, s written, h2 written where wanted; backward ds, x, h2 read, dx written; what is read through the
// window 1.9 times, from L2 beyond the first. Weights are read by every block, from L2 and L1.
// Per output pixel: tensor FLOP 2 C hidden (2 + 1), backward 2 C hidden (2 + 2); fp32 FLOP 50 hidden; special functions
// 2 hidden (2 + 1). Shared memory for C = 32, 64, 128: 45, 60, 90 KB, backward 55, 78, 124 KB.
// No atomics: an output is summed in one order, whatever its place in the batch.
#include <cstdint>

#include "inverted_residual_tile.h"
#include "launchers.h"

namespace vf {
namespace {

using namespace tile;

template <int C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) inverted_residual_kernel(const Arguments a) {
  VF_DYNAMIC_SHARED(ForwardShared<C>, shared);
  const Place at(a);
  Output<C> output(a.project_bias, at.lane);
  load_source<C>(a, at, shared->source);
  VF_ROLL
  for (int first = 0; first < a.hidden; first += kChunk) {
    __syncthreads();  // the source is there, and nobody reads the chunk before any more
    fill_hidden<C, true>(a, at, first, *shared);
    __syncthreads();
    const Window<true> h2(a, at, first, shared->hidden);
    if (a.h2 != nullptr) h2.write_h2(a, at, first);
    FragmentA left[2];
    h2.to_left(left, at, shared->middle[at.warp]);
    output.add(a, first, left, at.lane);
  }
  output.write(a, at);
}

// left *= swish'(h): both hold the same channels of the same pixels in each lane.
__device__ __forceinline__ void multiply_by_slope(FragmentA (&left)[2], const Sums& h) {
  VF_UNROLL
  for (int half = 0; half < 2; ++half) {
    VF_UNROLL
    for (int j = 0; j < 4; ++j) {
      uint32_t& word = left[j / 2].v[half + j % 2 * 2];
      Values<Bf16> values = to_values(Word<Bf16>{word});
      VF_UNROLL
      for (int e = 0; e < 2; ++e) values.v[e] *= swish_slope(h.pair(half, j).v[e]);
      word = to_word(values).bits;
    }
  }
}

template <int C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) inverted_residual_backward_kernel(const Arguments a) {
  VF_DYNAMIC_SHARED(BackwardShared<C>, shared);
  const Place at(a);
  Output<C> output(nullptr, at.lane);
  load_source<C>(a, at, shared->both.source);
  load_own<C>(a, at, shared->x[at.warp]);
  VF_ROLL
  for (int first = 0; first < a.hidden; first += kChunk) {
    __syncthreads();  // as above
    fill_hidden<C, false>(a, at, first, shared->both);
    __syncthreads();
    FragmentA left[2];
    Window<false>(a, at, first, shared->both.hidden).to_left(left, at, shared->both.middle[at.warp]);
    Sums h1[1];
    const uint32_t* const rows[1] = {shared->x[at.warp][at.lane % 16]};
    start_hidden<C>(h1, rows, a.expand_weight + int64_t{first} * C, a.expand_bias + first, at.lane);
    multiply_by_slope(left, h1[0]);
    output.add(a, first, left, at.lane);
  }
  output.write(a, at);
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

void launch_inverted_residual(const Bf16* x, const Bf16* expand_weight, const Bf16* expand_bias,
                              const Bf16* depthwise_weight, const Bf16* depthwise_bias, const Bf16* project_weight,
                              const Bf16* project_bias, int64_t N, int H, int W, int C, int hidden, Bf16* s, Bf16* h2,
                              cudaStream_t cuda_stream) {
  Arguments a{};
  a.source = x;
  a.in_weight = expand_weight;
  a.taps = depthwise_weight;
  a.out_weight = project_weight;
  a.target = s;
  a.h2 = h2;
  a.expand_bias = expand_bias;
  a.depthwise_bias = depthwise_bias;
  a.project_bias = project_bias;
  a.H = H, a.W = W, a.hidden = hidden;
  launch_channels(a, N, C, cuda_stream);
}

void launch_inverted_residual_backward(const Bf16* ds, const Bf16* x, const Bf16* h2, const Bf16* expand_weight,
                                       const Bf16* expand_weight_t, const Bf16* expand_bias,
                                       const Bf16* depthwise_weight, const Bf16* project_weight_t, int64_t N, int H,
                                       int W, int C, int hidden, Bf16* dx, cudaStream_t cuda_stream) {
  Arguments a{};
  a.source = ds;
  a.in_weight = project_weight_t;
  a.taps = depthwise_weight;
  a.out_weight = expand_weight_t;
  a.target = dx;
  a.h2 = const_cast<Bf16*>(h2);  // read only
  a.expand_bias = expand_bias;
  a.x = x;
  a.expand_weight = expand_weight;
  a.H = H, a.W = W, a.hidden = hidden;
  launch_channels(a, N, C, cuda_stream);
}

}  // namespace vf
