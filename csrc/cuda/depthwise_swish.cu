// depthwise_swish and its backward on a GPU, NHWC.
//
// A cell is a pixel, or the 2x2 pixels that upsampling makes from one. A block owns 32 words of channels (a word: one
// float or two bf16) of 16 adjacent cells, or of 8 in the upsampled forms, in a band of 8 to 64 rows. A thread owns one
// word of 4 adjacent cells (2 where it gathers an upsampled gradient); when it upsamples, of one of their two rows.
// Grid: x covers channels, strips, bands, images, in this order.
//
// The block steps down its band. Each source row is read once, activated once and put into shared memory. From there
// each thread adds it to all output rows that it reaches, which are in registers, so a shared load serves K rows. While
// a row is added, the loads of the next are in flight.
//
// Bytes: source read 1.25 (1 + (K - 1) / rows) times for K = 5, from L2 beyond the first; target written once; backward
// h read once. FLOP: 2 K^2 per output, 2 ((K + 1) / 2)^2 per upsampled pixel. Special functions: 2 per source element
// that is read, backward 2 per output. Shared memory: two steps of rows in fp32, 2.5 to 20 KB.
// The order of summation does not depend on the tile, so the bits do not depend on the batch.
#include <cstdint>

#include "depthwise_window.h"
#include "launchers.h"
#include "storage.h"
#include "swish.h"

namespace vf {
namespace {

constexpr int kThreads = 32 * depthwise::kWarps;
constexpr int kBlocksPerSm = 3;          // limits a thread to 168 registers: its sums, taps and inputs
constexpr int64_t kEnoughBlocks = 1024;  // several waves on any GPU

using depthwise::Form;
using depthwise::kWarps;
using depthwise::Range;
using depthwise::Strip;
using depthwise::Window;

// NHWC: source [N, H, W, C]; target [N, phases * cell_rows, phases * cell_columns, C], and slope_of likewise.
template <class T>
struct Arguments {
  const T* source;
  const T* weight;    // [K, K, C]
  const T* bias;      // [C]; null backward
  const T* slope_of;  // null forward
  T* target;
  int C, H, W, cell_rows, cell_columns;
  int rows, tiles_deep, tiles_across, tiles_down;  // of a band; of an image
};

// Where a thread works.
struct Place {
  int64_t n;
  int top, bottom, left;  // the block's band and strip, in cells
  int channel;            // the first of the thread's word
  bool has_channel;       // false: the thread reads and writes nothing
  int lane, warp, group, phase;
};

template <class Win, class T>
__device__ Place find_place(const Arguments<T>& a) {
  Place at;
  at.lane = static_cast<int>(threadIdx.x % 32);
  at.warp = static_cast<int>(threadIdx.x / 32);
  at.group = at.warp % Strip<Win>::kGroups;
  at.phase = at.warp / Strip<Win>::kGroups;
  int index = static_cast<int>(blockIdx.x);
  at.channel = (index % a.tiles_deep * 32 + at.lane) * kPerWord<T>;
  at.has_channel = at.channel < a.C;
  index /= a.tiles_deep;
  at.left = index % a.tiles_across * Strip<Win>::kWidth;
  index /= a.tiles_across;
  at.top = index % a.tiles_down * a.rows;
  at.bottom = min(at.top + a.rows, a.cell_rows);
  at.n = index / a.tiles_down;
  return at;
}

template <class T, class Win>
struct Taps {
  Values<T> v[Win::kTaps][Win::kPhases][Win::kTaps];  // row, column phase, column

  __device__ Taps(const Arguments<T>& a, const Place& at) {
    VF_UNROLL
    for (int y = 0; y < Win::kTaps; ++y) {
      VF_UNROLL
      for (int p = 0; p < Win::kPhases; ++p) {
        VF_UNROLL
        for (int x = 0; x < Win::kTaps; ++x) v[y][p][x] = sum(Win::entries(at.phase, y), Win::entries(p, x), a, at);
      }
    }
  }

 private:
  __device__ static Values<T> sum(Range rows, Range columns, const Arguments<T>& a, const Place& at) {
    Values<T> tap{};
    VF_ROLL
    for (int y = rows.begin; y < rows.end; ++y) {
      for (int x = columns.begin; x < columns.end; ++x) {
        const T* from = a.weight + (int64_t{y} * Win::kK + x) * a.C + at.channel;
        const Values<T> entry = to_values(load_word(from, at.has_channel));
        VF_UNROLL
        for (int c = 0; c < kPerWord<T>; ++c) tap.v[c] += entry.v[c];
      }
    }
    return tap;
  }
};

// Steps down the source, as many rows at a time as a cell is high. fetch() reads the thread's part of the next step
// into registers; put() activates it into shared memory.
template <class T, class Win>
struct Rows {
  static constexpr int kFetches = Strip<Win>::kFetches;
  using Shared = Values<T>[Win::kStride][Strip<Win>::kColumns][32];

  int y, x;       // of the next row to fetch, and of the thread's first column
  const T* from;  // that pixel; it may lie outside the image
  Word<T> words[Win::kStride][kFetches];

  __device__ Rows(const Arguments<T>& a, const Place& at)
      : y(Win::kStride * at.top - Win::kOrigin),
        x(Win::kStride * at.left - Win::kOrigin + at.warp),
        from(a.source + ((at.n * a.H + y) * a.W + x) * a.C + at.channel) {}

  __device__ void fetch(const Arguments<T>& a, const Place& at) {
    VF_UNROLL
    for (int r = 0; r < Win::kStride; ++r) {
      const bool exists = 0 <= y && y < a.H && at.has_channel;
      VF_UNROLL
      for (int i = 0; i < kFetches; ++i) {
        const bool inside = 0 <= x + i * kWarps && x + i * kWarps < a.W;
        words[r][i] = load_word(from + int64_t{i * kWarps} * a.C, exists && inside);
      }
      ++y;
      from += int64_t{a.W} * a.C;
    }
  }

  __device__ void put(const Place& at, Shared& shared) const {
    VF_UNROLL
    for (int r = 0; r < Win::kStride; ++r) {
      VF_UNROLL
      for (int i = 0; i < kFetches; ++i) {
        const int column = i * kWarps + at.warp;
        if (column >= Strip<Win>::kColumns) continue;
        Values<T> values = to_values(words[r][i]);
        if (Win::kForward) {
          VF_UNROLL
          for (int c = 0; c < kPerWord<T>; ++c) values.v[c] = swish(values.v[c]);  // swish(0) = 0 outside the image
        }
        shared[r][column][at.lane] = values;
      }
    }
  }
};

// The cells that a thread sums: slot s holds those that began at a step congruent to s modulo kInFlight.
template <class T, class Win>
struct Sums {
  static constexpr int kCells = Strip<Win>::kCells;
  Values<T> v[Win::kInFlight][Win::kPhases][kCells]{};

  __device__ void start(int slot, const Values<T>& bias) {
    VF_UNROLL
    for (int p = 0; p < Win::kPhases; ++p) {
      VF_UNROLL
      for (int t = 0; t < kCells; ++t) v[slot][p][t] = bias;
    }
  }

  // The step that starts `slot`: f steps ago another began, which is now at its taps kStride f and on.
  __device__ void add(int slot, const typename Rows<T, Win>::Shared& rows, const Taps<T, Win>& taps, const Place& at) {
    VF_UNROLL
    for (int r = 0; r < Win::kStride; ++r) {
      VF_UNROLL
      for (int i = 0; i < Strip<Win>::kInputs; ++i) {
        const Values<T> input = rows[r][Win::kStride * kCells * at.group + i][at.lane];
        VF_UNROLL
        for (int f = 0; f < Win::kInFlight; ++f) {
          add_input(v[(slot + Win::kInFlight - f) % Win::kInFlight], i, input, taps.v[Win::kStride * f + r]);
        }
      }
    }
  }

 private:
  __device__ static void add_input(Values<T> (&sums)[Win::kPhases][kCells], int i, const Values<T>& input,
                                   const Values<T> (&taps)[Win::kPhases][Win::kTaps]) {
    VF_UNROLL
    for (int p = 0; p < Win::kPhases; ++p) {
      VF_UNROLL
      for (int t = 0; t < kCells; ++t) {
        const int e = i - p * Win::kShift - Win::kStride * t;
        if (e < 0 || e >= Win::kTaps) continue;
        VF_UNROLL
        for (int c = 0; c < kPerWord<T>; ++c) sums[p][t].v[c] = fmaf(input.v[c], taps[p][e].v[c], sums[p][t].v[c]);
      }
    }
  }
};

// Steps down the output: each step completes one row of cells; only rows from `top` to before `bottom` are written.
template <class T, class Win>
struct Output {
  static constexpr int kCells = Strip<Win>::kCells;

  int row, count;  // count: the thread's cells inside the image, from the left; none if 0 or less
  int64_t first;   // the element where they begin, in that row
  Word<T> slope_of[kCells];

  __device__ Output(const Arguments<T>& a, const Place& at)
      : row(at.top - (Win::kInFlight - 1) - at.phase * Win::kShift) {
    const int left = at.left + at.group * kCells;
    const int64_t y = (at.n * a.cell_rows + row) * Win::kPhases + at.phase;
    count = at.has_channel ? a.cell_columns - left : 0;
    first = (y * a.cell_columns + left) * Win::kPhases * a.C + at.channel;
  }

  __device__ bool has(int cell, const Place& at) const { return at.top <= row && row < at.bottom && cell < count; }

  // Backward: loads the inputs whose slopes write() needs early, to hide the latency.
  __device__ void fetch(const Arguments<T>& a, const Place& at) {
    if (!Win::kForward) {
      VF_UNROLL
      for (int t = 0; t < kCells; ++t) slope_of[t] = load_word(a.slope_of + first + int64_t{t} * a.C, has(t, at));
    }
  }

  __device__ void write(const Arguments<T>& a, const Place& at, const Values<T> (&sums)[Win::kPhases][kCells]) {
    VF_UNROLL
    for (int t = 0; t < kCells; ++t) {
      VF_UNROLL
      for (int p = 0; p < Win::kPhases; ++p) {
        Values<T> values = sums[p][t];
        if (!Win::kForward) {
          const Values<T> h = to_values(slope_of[t]);
          VF_UNROLL
          for (int c = 0; c < kPerWord<T>; ++c) values.v[c] *= swish_slope(h.v[c]);
        }
        if (has(t, at)) store_word(to_word(values), a.target + first + int64_t{t * Win::kPhases + p} * a.C);
      }
    }
    ++row;
    first += int64_t{Win::kPhases * Win::kPhases} * a.cell_columns * a.C;
  }
};

template <class T, class Win>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) depthwise_swish_kernel(const Arguments<T> a) {
  using Buffers = typename Rows<T, Win>::Shared[2];
  VF_SHARED(Buffers, buffers);
  const Place at = find_place<Win>(a);
  const Taps<T, Win> taps(a, at);
  const Values<T> bias = to_values(load_word(a.bias + at.channel, Win::kForward && at.has_channel));
  Sums<T, Win> sums;
  Output<T, Win> output(a, at);
  Rows<T, Win> rows(a, at);
  rows.fetch(a, at);
  rows.put(at, buffers[0]);
  const int steps = at.bottom - at.top + Win::kInFlight - 1 + Win::kShift;
  for (int first = 0;; first += Win::kInFlight) {
    VF_UNROLL
    for (int slot = 0; slot < Win::kInFlight; ++slot) {
      const int step = first + slot;
      if (step == steps) return;
      const bool more = step + 1 < steps;
      if (more) rows.fetch(a, at);
      output.fetch(a, at);
      __syncthreads();  // this step's rows are in their buffer, and no thread still reads the other buffer
      sums.start(slot, bias);
      sums.add(slot, buffers[step % 2], taps, at);
      if (more) rows.put(at, buffers[(step + 1) % 2]);
      output.write(a, at, sums.v[(slot + 1) % Win::kInFlight]);
    }
  }
}

// Any odd K, and channels that are not whole words, slowly: one thread per output, every tap from global memory.
template <class T, bool kForward>
__global__ void __launch_bounds__(kThreads, 8)
    depthwise_swish_any_window_kernel(const Arguments<T> a, int K, int scale, int64_t numel) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= numel) return;
  const int rows = kForward ? scale * a.H : a.cell_rows, columns = kForward ? scale * a.W : a.cell_columns;
  const int c = static_cast<int>(index % a.C), j = static_cast<int>(index / a.C % columns);
  const int i = static_cast<int>(index / a.C / columns % rows);
  const int64_t n = index / a.C / columns / rows;
  float sum = kForward ? to_float(a.bias[c]) : 0.0f;
  for (int k = 0; k < K; ++k) {
    for (int l = 0; l < K; ++l) {
      const float tap = to_float(a.weight[(int64_t{k} * K + l) * a.C + c]);
      // Forward the one pixel of the upsampled image; backward the pixels that read the one of the output.
      const int top = kForward ? i + k - K / 2 : scale * i + K / 2 - k, bottom = kForward ? top + 1 : top + scale;
      const int left = kForward ? j + l - K / 2 : scale * j + K / 2 - l, right = kForward ? left + 1 : left + scale;
      for (int y = max(top, 0); y < min(bottom, kForward ? rows : a.H); ++y) {
        for (int x = max(left, 0); x < min(right, kForward ? columns : a.W); ++x) {
          const int64_t pixel = kForward ? (n * a.H + y / scale) * a.W + x / scale : (n * a.H + y) * a.W + x;
          const float value = to_float(a.source[pixel * a.C + c]);
          sum = fmaf(tap, kForward ? swish(value) : value, sum);
        }
      }
    }
  }
  if (!kForward) sum *= swish_slope(to_float(a.slope_of[index]));
  a.target[index] = to_element<T>(sum);
}

int ceil_div(int a, int b) { return (a - 1) / b + 1; }  // for a, b > 0

template <int K, Form kForm, class T>
void launch_window(Arguments<T> a, int64_t N, cudaStream_t cuda_stream) {
  using Win = Window<K, kForm>;
  a.tiles_deep = ceil_div(a.C, 32 * kPerWord<T>);
  a.tiles_across = ceil_div(a.cell_columns, Strip<Win>::kWidth);
  const int64_t columns = N * a.tiles_deep * a.tiles_across;
  a.rows = 64;
  while (a.rows > 8 && columns * ceil_div(a.cell_rows, a.rows) < kEnoughBlocks) a.rows /= 2;
  a.tiles_down = ceil_div(a.cell_rows, a.rows);
  const auto kernel = depthwise_swish_kernel<T, Win>;
  VF_LAUNCH(kernel, static_cast<unsigned>(columns * a.tiles_down), kThreads, 0, cuda_stream, a);
}

template <bool kForward, class T>
void launch_any_window(const Arguments<T>& a, int64_t N, int K, int scale, cudaStream_t cuda_stream) {
  const int64_t numel = N * (kForward ? scale * scale : 1) * a.cell_rows * a.cell_columns * a.C;
  const auto kernel = depthwise_swish_any_window_kernel<T, kForward>;
  const auto blocks = static_cast<unsigned>((numel + kThreads - 1) / kThreads);
  VF_LAUNCH(kernel, blocks, kThreads, 0, cuda_stream, a, K, scale, numel);
}

}  // namespace

template <class T>
void launch_depthwise_swish(const T* h, const T* weight, const T* bias, bool upsample, int64_t N, int H, int W, int C,
                            int K, T* y, cudaStream_t cuda_stream) {
  if (N * H * W * C == 0) return;
  const bool whole = are_whole_words(C, h, weight, bias, y);
  const Arguments<T> a{h, weight, bias, nullptr, y, C, H, W, H, W, 0, 0, 0, 0};
  if (whole && K == 3) {
    upsample ? launch_window<3, Form::upsample>(a, N, cuda_stream) : launch_window<3, Form::plain>(a, N, cuda_stream);
  } else if (whole && K == 5) {
    upsample ? launch_window<5, Form::upsample>(a, N, cuda_stream) : launch_window<5, Form::plain>(a, N, cuda_stream);
  } else {
    launch_any_window<true>(a, N, K, upsample ? 2 : 1, cuda_stream);
  }
}

template <class T>
void launch_depthwise_swish_backward(const T* dy, const T* h, const T* weight, bool upsample, int64_t N, int H, int W,
                                     int C, int K, T* dh, cudaStream_t cuda_stream) {
  if (N * H * W * C == 0) return;
  const int scale = upsample ? 2 : 1;
  const bool whole = are_whole_words(C, dy, h, weight, dh);
  const Arguments<T> a{dy, weight, nullptr, h, dh, C, scale * H, scale * W, H, W, 0, 0, 0, 0};
  if (whole && K == 3) {
    upsample ? launch_window<3, Form::upsample_backward>(a, N, cuda_stream)
             : launch_window<3, Form::plain_backward>(a, N, cuda_stream);
  } else if (whole && K == 5) {
    upsample ? launch_window<5, Form::upsample_backward>(a, N, cuda_stream)
             : launch_window<5, Form::plain_backward>(a, N, cuda_stream);
  } else {
    launch_any_window<false>(a, N, K, scale, cuda_stream);
  }
}

#define VF_INSTANTIATE(T)                                                                                           \
  template void launch_depthwise_swish(const T*, const T*, const T*, bool, int64_t, int, int, int, int, T*,          \
                                       cudaStream_t);                                                                \
  template void launch_depthwise_swish_backward(const T*, const T*, const T*, bool, int64_t, int, int, int, int, T*, \
                                                cudaStream_t);
VF_INSTANTIATE(float)
VF_INSTANTIATE(Bf16)

}  // namespace vf
