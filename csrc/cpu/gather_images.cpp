// gather_images on CPU tensors: rows are copied, or mirrored five pixels of three channels at a time.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "clones.h"

namespace vf {
namespace {

constexpr int64_t kBytesPerTask = 1 << 15;
constexpr int64_t kLine = 64;  // bytes of a cache line

// to[x] = from[pixels - 1 - x]; both rows have this number of pixels, and nothing beside them is touched.
VF_CLONES void mirror_gray(const uint8_t* __restrict__ from, int64_t pixels, uint8_t* __restrict__ to) {
  for (int64_t x = 0; x < pixels; ++x) to[x] = from[pixels - 1 - x];
}

VF_CLONES void mirror_rgb(const uint8_t* __restrict__ from, int64_t pixels, uint8_t* __restrict__ to) {
  int64_t x = 0;
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
  // One shuffle of 16 bytes for five pixels. The byte before them is read too, and written behind them, where the next
  // pixel comes; so at least one pixel must be left.
  using Bytes = uint8_t __attribute__((vector_size(16)));
  for (; x + 6 <= pixels; x += 5) {
    Bytes five;
    std::memcpy(&five, from + 3 * (pixels - 5 - x) - 1, 16);
    five = __builtin_shufflevector(five, five, 13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, 0);
    std::memcpy(to + 3 * x, &five, 16);
  }
#endif
  for (; x < pixels; ++x) {
    for (int64_t c = 0; c < 3; ++c) to[3 * x + c] = from[3 * (pixels - 1 - x) + c];
  }
}

// Every entry of `values` must be within 0..last.
void check_within(const at::Tensor& values, const char* name, int64_t last) {
  const int64_t* each = values.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < values.numel(); ++n) {
    TORCH_CHECK_VALUE(0 <= each[n] && each[n] <= last, name, "[", n, "] is ", each[n], "; it must be within 0..", last,
                      ".");
  }
}

at::Tensor gather_images_cpu(const at::Tensor& images, const at::Tensor& index, const at::Tensor& flip,
                             const at::Tensor& top, const at::Tensor& left, int64_t size) {
  check_gather_arguments(images, index, flip, top, left, size);
  const int64_t N = index.size(0), M = images.size(0), H = images.size(1), W = images.size(2), C = images.size(3);
  const at::Tensor chosen = index.contiguous(), flips = flip.contiguous(), rows = top.contiguous(),
                   columns = left.contiguous();
  check_within(chosen, "index", M - 1);
  check_within(rows, "top", H - size);
  check_within(columns, "left", W - size);
  at::Tensor out = at::empty({N, size, size, C}, images.options());
  const int64_t bytes = size * C;  // of a row of the result
  const uint8_t* from = images.const_data_ptr<uint8_t>();
  const bool* flipped = flips.const_data_ptr<bool>();
  const int64_t *image = chosen.const_data_ptr<int64_t>(), *y = rows.const_data_ptr<int64_t>(),
                *x = columns.const_data_ptr<int64_t>();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const auto mirror = C == 3 ? mirror_rgb : mirror_gray;
  const int64_t pitch = W * C;  // of the source's rows
  at::parallel_for(0, N, std::max<int64_t>(1, kBytesPerTask / (size * bytes)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t row = 0; row < size; ++row) {
        const uint8_t* source = from + ((image[n] * H + y[n] + row) * W + x[n]) * C;
        uint8_t* target = to + (n * size + row) * bytes;
        if (flipped[n]) {
          // A row is read backwards, and so the machine would not see the next one coming.
          for (int64_t ahead = 0; row + 1 < size && ahead < bytes; ahead += kLine) {
            __builtin_prefetch(source + pitch + ahead);
          }
          mirror(source, size, target);
        } else {
          std::memcpy(target, source, bytes);
        }
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("gather_images", &vf::gather_images_cpu);
}
