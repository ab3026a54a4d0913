// NHWC images of normals; a pixel's 2 C parameters are C means, then C log sigmas. Splits images into blocks of pixels
// for the threads, separates a block's parameters into plain arrays for the kernels, and sums log densities.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vf {

constexpr double kLogTwoPi = 1.8378770664093453;

// `x` if its images are NHWC, with any stride between images (as in views of flat noise), else a channels_last copy.
inline at::Tensor nhwc_images(const at::Tensor& x) {
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  const bool fits = (C == 1 || x.stride(1) == 1) && (W == 1 || x.stride(3) == C) && (H == 1 || x.stride(2) == W * C);
  return fits ? x : x.contiguous(at::MemoryFormat::ChannelsLast);
}

// Image n of a tensor from `nhwc_images` or at::empty in channels_last.
inline const float* image_of(const at::Tensor& x, int64_t n) { return x.const_data_ptr<float>() + n * x.stride(0); }
inline float* mutable_image_of(const at::Tensor& x, int64_t n) { return x.mutable_data_ptr<float>() + n * x.stride(0); }

struct PixelBlocks {
  int64_t N, C, pixels;     // C: of a mean, half of the parameters' channels
  int64_t size, per_image;  // pixels of a block, blocks of an image; the same for any batch and number of threads

  explicit PixelBlocks(const at::Tensor& eps) : N(eps.size(0)), C(eps.size(1)), pixels(eps.size(2) * eps.size(3)) {
    constexpr int64_t kElements = 2048;  // 8 KB per array
    size = std::max<int64_t>(1, kElements / std::max<int64_t>(1, C));
    per_image = (pixels + size - 1) / size;
  }

  // run(n, block, first pixel, pixels, scratch of 2 * size * C floats)
  template <class Run>
  void for_each(const Run& run) const {
    constexpr int64_t kBlocksPerTask = 4;
    at::parallel_for(0, N * per_image, kBlocksPerTask, [&](int64_t begin, int64_t end) {
      const at::Tensor scratch = at::empty({2 * size * C}, at::kFloat);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t first = index % per_image * size;
        run(index / per_image, index, first, std::min(size, pixels - first), scratch.mutable_data_ptr<float>());
      }
    });
  }

  // log_p[n] = constant C pixels - the sum of the image's blocks.
  void write_log_p(const std::vector<double>& sums, double constant, const at::Tensor& log_p) const {
    float* out = log_p.mutable_data_ptr<float>();
    for (int64_t n = 0; n < N; ++n) {
      double value = constant * static_cast<double>(C * pixels);
      for (int64_t block = 0; block < per_image; ++block) value -= sums[n * per_image + block];
      out[n] = static_cast<float>(value);
    }
  }
};

// [pixels, 2 C] into two consecutive [pixels, C]; zeros if there are no parameters.
inline void split_parameters(const float* parameters, int64_t pixels, int64_t C, float* halves) {
  if (parameters == nullptr) {
    std::fill_n(halves, 2 * pixels * C, 0.0f);
    return;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    std::copy_n(parameters + 2 * p * C, C, halves + p * C);
    std::copy_n(parameters + (2 * p + 1) * C, C, halves + (pixels + p) * C);
  }
}

// The inverse.
inline void join_parameters(const float* halves, int64_t pixels, int64_t C, float* parameters) {
  for (int64_t p = 0; p < pixels; ++p) {
    std::copy_n(halves + p * C, C, parameters + 2 * p * C);
    std::copy_n(halves + (pixels + p) * C, C, parameters + (2 * p + 1) * C);
  }
}

}  // namespace vf
