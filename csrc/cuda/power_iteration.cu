// power_iteration on a GPU, fp32.
//
// With t = W v unnormalised, the next v is normalize(W't / |t|). The division comes last, so one pass over a row of W
// gives its t and adds t times the row to the next v, while the row is in registers. T iterations are 2 T + 2 launches:
//   power_pass_kernel, T + 1 times. A block owns 8, 16 or 32 rows of one matrix, its strip: t = W v for them, then the
//     sum of t times these rows. The first pass uses u for t; the last one computes no sum.
//   power_gather_kernel, T times, between two passes. A block owns 128 columns: adds the sums of all strips to x = W't.
//   power_normalise_kernel. A block owns u, or v, of a matrix.
// A block that needs the norm of t or x adds the sums of squares that the previous launch's blocks stored, one each.
// Grid: x covers strips (groups of columns; u and v), then matrices.
//
// Bytes: 4 M K for each pass; sums of strips are written and read once, 1/32 to 1/8 of that each, mostly in L2. FLOP:
// 4 M K for each iteration. Shared memory: at most 0.2 KB, gather 4 KB. A matrix with more than 9216 columns is read
// twice per iteration, in panels of so many.
// No atomics: the order of all sums depends only on M and K, not on the position in the batch.
#include <cstdint>

#include "../quad.h"
#include "launchers.h"

namespace vf {
namespace {

constexpr int kGatherWarps = 8, kGatherColumns = 128;
constexpr int kNormaliseWarps = 8;

// Columns that a block processes at once; a thread owns kQuads quads of them.
template <int kWarps, int kQuads>
constexpr int kColumns = 32 * kWarps * 4 * kQuads;
constexpr int kWidest = kColumns<8, 9>;  // 9216

struct Problem {
  const float* weight;  // [B, M, K]
  float* t;             // [B, M]: u at first, then W v
  float* x;             // [B, K]: W't / |t|
  float* sums;          // [B, strips, K]: W't of a strip
  float* t_squares;     // [B, strips]
  float* x_squares;     // [B, groups]
  int M, K, strip_rows, strips, groups;
  float eps;
  bool whole;  // every row is whole quads, aligned in all tensors
};

// What a pass does with the columns from `first` on. dots: compute t from v (else t is given). adds: add to the t of
// earlier columns. sums: compute W't.
struct Pass {
  int first;
  bool dots, adds, sums;
};

// Lane 32 / kRows r ends with the sum of x[r] over the warp; with one row, all lanes do. Every step halves the rows per
// lane, which takes fewer shuffles than one row after another.
template <int kRows>
__device__ __forceinline__ float sum_over_warp(float (&x)[kRows]) {
  VF_UNROLL
  for (int rows = kRows / 2, mask = 16; mask > 0; rows /= 2, mask /= 2) {
    if (rows == 0) x[0] += __shfl_xor_sync(~0u, x[0], mask);
    VF_UNROLL
    for (int r = 0; r < rows; ++r) {
      const bool upper = (threadIdx.x & mask) != 0;
      const float given = __shfl_xor_sync(~0u, upper ? x[r] : x[r + rows], mask);
      x[r] = (upper ? x[r + rows] : x[r]) + given;
    }
  }
  return x[0];
}

// max(|x|, eps) from stored sums of squares, computed by a whole block; the same bits in every thread.
template <int kWarps>
__device__ float norm_of(const float* squares, int count, float eps, float (&parts)[kWarps]) {
  float mine[1] = {0.0f};
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 32 * kWarps) mine[0] += squares[i];
  const float sum_of_warp = sum_over_warp(mine);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum_of_warp;
  __syncthreads();
  float sum = 0.0f;
  VF_UNROLL
  for (int w = 0; w < kWarps; ++w) sum += parts[w];
  const float norm = square_root(sum);
  return norm < eps ? eps : norm;  // a NaN stays one, as it would not in fmaxf
}

// A thread's part of a row: every 32 kWarps-th quad.
template <int kWarps, int kQuads>
struct Share {
  Quad<float> quads[kQuads]{};

  __device__ static int offset(int j) { return 4 * (static_cast<int>(threadIdx.x) + j * 32 * kWarps); }

  // Of the `count` elements at `from`.
  template <bool kWhole>
  __device__ __forceinline__ void load(const float* from, int count) {
    VF_UNROLL
    for (int j = 0; j < kQuads; ++j) quads[j] = load_quad(from + offset(j), count - offset(j), kWhole);
  }

  __device__ __forceinline__ void store(float* to, int count, bool whole) const {
    VF_UNROLL
    for (int j = 0; j < kQuads; ++j) store_quad(quads[j], count - offset(j), whole, to + offset(j));
  }

  __device__ __forceinline__ float& element(int i) { return quads[i / 4].v[i % 4]; }
};

// Rows of W, one after another in memory, and their products.
template <int kWarps, int kQuads, int kRows>
struct Rows {
  using Row = Share<kWarps, kQuads>;
  using Parts = float[kRows][kWarps];
  Row rows[kRows];

  // Zeros beyond `count` rows.
  template <bool kWhole>
  __device__ __forceinline__ void load(const float* from, int64_t pitch, int count, int columns) {
    VF_UNROLL
    for (int r = 0; r < kRows; ++r) rows[r].template load<kWhole>(from + r * pitch, r < count ? columns : 0);
  }

  // t = rows v, the same bits in every thread. No thread may still be reading `parts`.
  __device__ __forceinline__ void multiply(Row& v, Parts& parts, float (&t)[kRows]) {
    VF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      t[r] = 0.0f;
      VF_UNROLL
      for (int i = 0; i < 4 * kQuads; ++i) t[r] = fmaf(rows[r].element(i), v.element(i), t[r]);
    }
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const float sum = sum_over_warp(t);
    if (lane % (32 / kRows) == 0) parts[lane / (32 / kRows)][warp] = sum;
    __syncthreads();
    VF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      t[r] = 0.0f;
      VF_UNROLL
      for (int w = 0; w < kWarps; ++w) t[r] += parts[r][w];
    }
  }

  // sums += t'rows
  __device__ __forceinline__ void add_to(Row& sums, const float (&t)[kRows]) {
    VF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      VF_UNROLL
      for (int i = 0; i < 4 * kQuads; ++i) sums.element(i) = fmaf(rows[r].element(i), t[r], sums.element(i));
    }
  }
};

template <int kWarps, int kQuads, int kRows>
__global__ void __launch_bounds__(32 * kWarps) power_pass_kernel(const Problem p, const Pass pass) {
  using Block = Rows<kWarps, kQuads, kRows>;
  using NormParts = float[kWarps];
  using DotParts = typename Block::Parts[2];
  VF_SHARED(NormParts, norm_parts);
  VF_SHARED(DotParts, dot_parts);
  const int64_t index = blockIdx.x, b = index / p.strips;
  const int begin = static_cast<int>(index % p.strips) * p.strip_rows, end = min(begin + p.strip_rows, p.M);
  const int columns = min(p.K - pass.first, kColumns<kWarps, kQuads>);
  typename Block::Row v, sums;
  if (pass.dots) {
    const float* x = p.x + b * p.K + pass.first;
    p.whole ? v.template load<true>(x, columns) : v.template load<false>(x, columns);
    const float norm = norm_of<kWarps>(p.x_squares + b * p.groups, p.groups, p.eps, norm_parts);
    VF_UNROLL
    for (int i = 0; i < 4 * kQuads; ++i) v.element(i) /= norm;
  }
  float square = 0.0f;  // sum of squares of the elements that thread 0 wrote
  VF_ROLL
  for (int row = begin, buffer = 0; row < end; row += kRows, buffer ^= 1) {
    Block block;
    const float* from = p.weight + (b * p.M + row) * p.K + pass.first;
    float* const t_in_memory = p.t + b * p.M + row;
    p.whole ? block.template load<true>(from, p.K, end - row, columns)
            : block.template load<false>(from, p.K, end - row, columns);
    float t[kRows];
    if (pass.dots) {
      block.multiply(v, dot_parts[buffer], t);  // alternating: past this barrier, all have read the other buffer
      VF_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (threadIdx.x > 0 || row + r >= end) continue;
        const float sum = pass.adds ? t_in_memory[r] + t[r] : t[r];
        t_in_memory[r] = sum;
        square = fmaf(sum, sum, square);
      }
    } else {
      VF_UNROLL
      for (int r = 0; r < kRows; ++r) t[r] = row + r < end ? t_in_memory[r] : 0.0f;
    }
    if (pass.sums) block.add_to(sums, t);
  }
  if (pass.dots && threadIdx.x == 0) p.t_squares[index] = square;
  if (pass.sums) sums.store(p.sums + index * p.K + pass.first, columns, p.whole);
}

// The sum over strips first, first + kGatherWarps, ..
template <bool kWhole>
__device__ __forceinline__ Quad<float> sum_of_strips(const Problem& p, int64_t b, int column, int first) {
  Quad<float> sum{};
  for (int strip = first; strip < p.strips; strip += kGatherWarps) {
    const float* from = p.sums + (b * p.strips + strip) * p.K + column;
    const Quad<float> part = load_quad(from, p.K - column, kWhole);
    VF_UNROLL
    for (int i = 0; i < 4; ++i) sum.v[i] += part.v[i];
  }
  return sum;
}

// x = W't / |t| from the sums of the strips, or W'u.
__global__ void __launch_bounds__(32 * kGatherWarps) power_gather_kernel(const Problem p, bool t_is_u) {
  using NormParts = float[kGatherWarps];
  using Quads = Quad<float>[kGatherWarps][32];
  VF_SHARED(NormParts, norm_parts);
  VF_SHARED(Quads, quads);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t index = blockIdx.x, b = index / p.groups;
  const int column = static_cast<int>(index % p.groups) * kGatherColumns + 4 * lane;
  Quad<float> sum = p.whole ? sum_of_strips<true>(p, b, column, warp) : sum_of_strips<false>(p, b, column, warp);
  quads[warp][lane] = sum;
  float norm = 1.0f;
  if (!t_is_u) norm = norm_of<kGatherWarps>(p.t_squares + b * p.strips, p.strips, p.eps, norm_parts);
  __syncthreads();
  if (warp > 0) return;
  float square[1] = {0.0f};
  VF_UNROLL
  for (int i = 0; i < 4; ++i) {
    VF_UNROLL
    for (int w = 1; w < kGatherWarps; ++w) sum.v[i] += quads[w][lane].v[i];
    sum.v[i] /= norm;
    square[0] = fmaf(sum.v[i], sum.v[i], square[0]);
  }
  store_quad(sum, p.K - column, p.whole, p.x + b * p.K + column);
  const float sum_of_squares = sum_over_warp(square);
  if (lane == 0) p.x_squares[index] = sum_of_squares;
}

// t and x of a matrix divided by their norms, in place.
__global__ void __launch_bounds__(32 * kNormaliseWarps) power_normalise_kernel(const Problem p) {
  using NormParts = float[kNormaliseWarps];
  VF_SHARED(NormParts, norm_parts);
  const int64_t b = blockIdx.x / 2;
  const bool is_t = blockIdx.x % 2 == 0;
  const int size = is_t ? p.M : p.K, count = is_t ? p.strips : p.groups;
  const float* squares = is_t ? p.t_squares : p.x_squares;
  float* const vector = (is_t ? p.t : p.x) + b * size;
  const float norm = norm_of<kNormaliseWarps>(squares + b * count, count, p.eps, norm_parts);
  for (int i = static_cast<int>(threadIdx.x); i < size; i += 32 * kNormaliseWarps) vector[i] /= norm;
}

int ceil_div(int a, int b) { return (a - 1) / b + 1; }  // for a, b > 0

unsigned blocks(int64_t per_matrix, int64_t B) { return static_cast<unsigned>(per_matrix * B); }

template <int kWarps, int kQuads, int kRows>
void launch_columns(const Problem& p, const Pass& pass, int64_t B, cudaStream_t cuda_stream) {
  const auto kernel = power_pass_kernel<kWarps, kQuads, kRows>;
  VF_LAUNCH(kernel, blocks(p.strips, B), 32 * kWarps, 0, cuda_stream, p, pass);
}

// A thread's rows take at most 64 registers.
void launch_pass(const Problem& p, const Pass& pass, int64_t B, cudaStream_t cuda_stream) {
  if (p.K <= kColumns<1, 2>) return launch_columns<1, 2, 8>(p, pass, B, cuda_stream);
  if (p.K <= kColumns<4, 2>) return launch_columns<4, 2, 4>(p, pass, B, cuda_stream);
  if (p.K <= kColumns<8, 4>) return launch_columns<8, 4, 2>(p, pass, B, cuda_stream);
  if (p.K <= kWidest) return launch_columns<8, 9, 1>(p, pass, B, cuda_stream);
  // t needs all columns before any W't can be summed.
  for (int first = 0; pass.dots && first < p.K; first += kWidest) {
    launch_columns<8, 9, 1>(p, {first, true, first > 0, false}, B, cuda_stream);
  }
  for (int first = 0; pass.sums && first < p.K; first += kWidest) {
    launch_columns<8, 9, 1>(p, {first, false, false, true}, B, cuda_stream);
  }
}

// Few strips to add, but at least 33 from 257 rows on.
int strip_rows(int M) { return M > 1024 ? 32 : M > 512 ? 16 : 8; }

}  // namespace

int64_t power_iteration_scratch(int64_t B, int M, int K) {
  const int64_t strips = ceil_div(M, strip_rows(M));
  return B * (strips * (K + 1) + ceil_div(K, kGatherColumns));
}

void launch_power_iteration(const float* weight, int64_t B, int M, int K, int64_t iterations, float eps,
                            float* scratch, float* u, float* v, cudaStream_t cuda_stream) {
  if (B == 0 || iterations == 0) return;
  Problem p{};
  p.weight = weight, p.t = u, p.x = v, p.sums = scratch;
  p.M = M, p.K = K, p.eps = eps;
  p.strip_rows = strip_rows(M), p.strips = ceil_div(M, p.strip_rows), p.groups = ceil_div(K, kGatherColumns);
  p.t_squares = p.sums + B * p.strips * K;
  p.x_squares = p.t_squares + B * p.strips;
  const auto address = reinterpret_cast<uintptr_t>(weight) | reinterpret_cast<uintptr_t>(v) |
                       reinterpret_cast<uintptr_t>(scratch);
  p.whole = K % 4 == 0 && address % sizeof(Quad<float>) == 0;
  for (int64_t i = 0; i < iterations; ++i) {
    launch_pass(p, {0, i > 0, false, true}, B, cuda_stream);
    VF_LAUNCH(power_gather_kernel, blocks(p.groups, B), 32 * kGatherWarps, 0, cuda_stream, p, i == 0);
  }
  launch_pass(p, {0, true, false, false}, B, cuda_stream);
  VF_LAUNCH(power_normalise_kernel, blocks(2, B), 32 * kNormaliseWarps, 0, cuda_stream, p);
}

}  // namespace vf
