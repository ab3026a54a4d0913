// pointwise and its backward on CPU tensors: tiles for the threads; pointwise_kernels.h computes a tile.
#include "pointwise.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string_view>

#include "../checks.h"

#define VF_KERNELS "pointwise_kernels.h"
#include "each_isa.h"

namespace vf::pointwise {
namespace {

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits a product into tiles: rows first, because a tile packs its rows; panels only if threads would idle.
struct Cut {
  int64_t tiles_down, tiles_across;

  explicit Cut(const Product& product) {
    const int64_t threads = at::get_num_threads(), panels = ceil_div(product.N, kPanel);
    tiles_down = ceil_div(product.M, kTileRows);
    tiles_across = tiles_down % threads == 0 || tiles_down > 8 * threads ? 1 : std::min(threads, panels);
  }

  Tile tile(int64_t index, const Product& product) const {
    const int64_t row = index / tiles_across, column = index % tiles_across, panels = ceil_div(product.N, kPanel);
    return {row * kTileRows, std::min((row + 1) * kTileRows, product.M), column * panels / tiles_across,
            (column + 1) * panels / tiles_across};
  }
};

void run(const Product& product) {
  if (product.M * product.N == 0) return;
  const Cut cut(product);
  const auto run_tile = isa() == Isa::avx512 ? avx512::run_tile
                        : isa() == Isa::avx2 ? avx2::run_tile
                                             : portable::run_tile;
  at::parallel_for(0, cut.tiles_down * cut.tiles_across, 1, [&](int64_t begin, int64_t end) {
    at::Tensor scratch = at::empty({scratch_floats(product.K)}, at::kFloat);
    for (int64_t index = begin; index < end; ++index) {
      run_tile(product, cut.tile(index, product), scratch.mutable_data_ptr<float>());
    }
  });
}

const float* pointer(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

Activation activation_of(std::string_view name) {
  TORCH_CHECK_VALUE(name == "none" || name == "swish" || name == "elu", "activation is '", name,
                    "'; it must be none, swish or elu.");
  return name == "none" ? Activation::none : name == "swish" ? Activation::swish : Activation::elu;
}

at::Tensor pointwise_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_t,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                         std::string_view activation) {
  const Activation f = activation_of(activation);
  TORCH_CHECK_VALUE(weight_t.dim() == 3, "weight_t must be [ceil(Cin / 16), Cout, 16]; it is ", weight_t.sizes(), ".");
  const int64_t Cout = weight_t.size(1);
  check_pointwise_arguments(x, "x", weight, Cout);
  if (bias) check_tensor(*bias, "bias", {Cout}, x);
  check_like(residual, "residual", Cout, x);
  const int64_t N = x.size(0), Cin = x.size(1), H = x.size(2), W = x.size(3);
  const at::Tensor source = x.contiguous(kLayout), packed = weight.contiguous();
  const at::Tensor start = bias ? bias->contiguous() : at::Tensor();
  const at::Tensor added = residual ? residual->contiguous(kLayout) : at::Tensor();
  at::Tensor y = at::empty({N, Cout, H, W}, x.options(), kLayout);
  run({pointer(source), pointer(packed), pointer(start), pointer(added), nullptr, y.mutable_data_ptr<float>(),
       N * H * W, Cin, Cout, f});
  return y;
}

at::Tensor pointwise_backward_cpu(const at::Tensor& dy, const at::Tensor& weight_t, int64_t Cin,
                                  const std::optional<at::Tensor>& x, std::string_view activation) {
  const Activation f = activation_of(activation);
  TORCH_CHECK_VALUE(x.has_value() == (f != Activation::none), "activation is '", activation, "' and x is ",
                    x ? "" : "not ",
                    "given; x is the input before its activation: pass it for swish and elu only.");
  check_pointwise_arguments(dy, "dy", weight_t, Cin);
  check_like(x, "x", Cin, dy);
  const int64_t N = dy.size(0), Cout = dy.size(1), H = dy.size(2), W = dy.size(3);
  const at::Tensor source = dy.contiguous(kLayout), packed = weight_t.contiguous();
  const at::Tensor slope_of = x ? x->contiguous(kLayout) : at::Tensor();
  at::Tensor dx = at::empty({N, Cin, H, W}, dy.options(), kLayout);
  run({pointer(source), pointer(packed), nullptr, nullptr, pointer(slope_of), dx.mutable_data_ptr<float>(), N * H * W,
       Cout, Cin, f});
  return dx;
}

}  // namespace
}  // namespace vf::pointwise

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("pointwise", &vf::pointwise::pointwise_cpu);
  m.impl("pointwise_backward", &vf::pointwise::pointwise_backward_cpu);
}
