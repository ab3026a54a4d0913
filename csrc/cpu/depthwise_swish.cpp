// depthwise_swish and its backward on CPU tensors: tiles for the threads; depthwise_swish_kernels.h computes a tile.
#include "depthwise_swish.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"

#define VF_KERNELS "depthwise_swish_kernels.h"
#include "each_isa.h"

namespace vf::depthwise {
namespace {

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits an image's cells into tiles. The ring of a 5x5 window takes 170 KB of the L2 cache at 128 columns and 64
// channels, or at 64 and 128. Channels are split evenly, in whole cache lines; rows only if threads would idle.
struct Cut {
  int64_t columns, channels, rows;  // of a tile
  int64_t tiles_across, tiles_deep, tiles_down;

  Cut(int64_t N, const Image& image) {
    columns = std::min<int64_t>(image.cell_columns, 128);
    tiles_across = ceil_div(image.cell_columns, columns);
    const int64_t threads = at::get_num_threads(), others = N * tiles_across;
    tiles_deep = ceil_div(image.C, columns > 64 ? 64 : 128);
    if (others * tiles_deep % threads != 0) tiles_deep = ceil_div(tiles_deep, threads) * threads;
    channels = ceil_div(ceil_div(image.C, tiles_deep), 16) * 16;
    tiles_deep = ceil_div(image.C, channels);
    rows = std::min(image.cell_rows, std::max<int64_t>(8, ceil_div(image.cell_rows * others * tiles_deep, threads)));
    tiles_down = ceil_div(image.cell_rows, rows);
  }

  Tile tile(int64_t index, const Image& image) const {
    const int64_t channel = index % tiles_deep * channels, left = index / tiles_deep % tiles_across * columns;
    const int64_t top = index / tiles_deep / tiles_across * rows;
    return {top,     std::min(top + rows, image.cell_rows),
            left,    std::min(left + columns, image.cell_columns),
            channel, std::min(channels, image.C - channel)};
  }
};

// Runs the window over N contiguous images; `image` is the first.
void run_batch(int64_t N, const Image& image, const Window& window) {
  const int64_t source_size = image.H * image.W * image.C;
  const int64_t target_size = image.cell_rows * image.cell_columns * window.phases * window.phases * image.C;
  if (N * target_size == 0) return;
  const Cut cut(N, image);
  const int64_t tiles = cut.tiles_across * cut.tiles_deep * cut.tiles_down;
  const auto run_tile = isa() == Isa::avx512 ? avx512::run_tile
                        : isa() == Isa::avx2 ? avx2::run_tile
                                             : portable::run_tile;
  at::parallel_for(0, N * tiles, 1, [&](int64_t begin, int64_t end) {
    at::Tensor scratch = at::empty({scratch_floats(window, cut.columns, cut.channels)}, at::kFloat);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / tiles;
      Image here = image;
      here.source += n * source_size;
      here.target += n * target_size;
      if (here.slope_of != nullptr) here.slope_of += n * target_size;
      run_tile(here, cut.tile(index % tiles, image), window, scratch.mutable_data_ptr<float>());
    }
  });
}

at::Tensor depthwise_swish_cpu(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, bool upsample) {
  check_depthwise_arguments(h, weight);
  check_depthwise_bias(h, bias);
  const int64_t N = h.size(0), C = h.size(1), H = h.size(2), W = h.size(3), scale = upsample ? 2 : 1;
  const int K = static_cast<int>(weight.size(0));
  const at::Tensor source = h.contiguous(kLayout), packed = weight.contiguous(), start = bias.contiguous();
  at::Tensor y = at::empty({N, C, scale * H, scale * W}, h.options(), kLayout);
  const Image image{source.const_data_ptr<float>(), packed.const_data_ptr<float>(), start.const_data_ptr<float>(),
                    nullptr, y.mutable_data_ptr<float>(), C, H, W, H, W};
  run_batch(N, image, upsample ? upsampling_window(K) : plain_window(K, false));
  return y;
}

at::Tensor depthwise_swish_backward_cpu(const at::Tensor& dy, const at::Tensor& h, const at::Tensor& weight,
                                        bool upsample) {
  check_depthwise_arguments(h, weight);
  check_depthwise_gradient(dy, h, upsample);
  const int64_t N = h.size(0), C = h.size(1), H = h.size(2), W = h.size(3);
  const int K = static_cast<int>(weight.size(0));
  const at::Tensor source = dy.contiguous(kLayout), packed = weight.contiguous(), slope_of = h.contiguous(kLayout);
  at::Tensor dh = at::empty({N, C, H, W}, h.options(), kLayout);
  const Image image{source.const_data_ptr<float>(), packed.const_data_ptr<float>(), nullptr,
                    slope_of.const_data_ptr<float>(), dh.mutable_data_ptr<float>(), C, dy.size(2), dy.size(3), H, W};
  run_batch(N, image, upsample ? transposed_upsampling_window(K) : plain_window(K, true));
  return dh;
}

}  // namespace
}  // namespace vf::depthwise

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("depthwise_swish", &vf::depthwise::depthwise_swish_cpu);
  m.impl("depthwise_swish_backward", &vf::depthwise::depthwise_swish_backward_cpu);
}
