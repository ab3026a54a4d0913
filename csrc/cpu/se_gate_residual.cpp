// se_gate_residual and its backward on CPU tensors, image by image, so that the pixels read for the sum are still in
// cache for the second pass.
//
// Sums over pixels run over chunks of a fixed length in float, four pixels at a time, and over the chunks in double:
// the bits depend neither on the number of threads nor on the batch, and the error does not grow with the image.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../math.h"
#include "clones.h"

namespace vf {
namespace {

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;
constexpr int64_t kChunk = 64;  // pixels
constexpr int64_t kElementsPerTask = 1 << 14;

int64_t pixels_per_task(int64_t C) { return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, C)); }

// sum[c] += sum_p term(p C + c)
template <class Term>
VF_HD void add_pixels(int64_t pixels, int64_t C, float* __restrict__ sum, const Term& term) {
  int64_t i = 0;
  for (; i + 4 * C <= pixels * C && C > 0; i += 4 * C) {
    for (int64_t c = 0; c < C; ++c) {
      sum[c] += (term(i + c) + term(i + C + c)) + (term(i + 2 * C + c) + term(i + 3 * C + c));
    }
  }
  for (; i < pixels * C; i += C) {
    for (int64_t c = 0; c < C; ++c) sum[c] += term(i + c);
  }
}

VF_CLONES void add_values(const float* s, int64_t pixels, int64_t C, float* sum) {
  add_pixels(pixels, C, sum, [s](int64_t i) { return s[i]; });
}

VF_CLONES void add_products(const float* dy, const float* s, int64_t pixels, int64_t C, float* sum) {
  add_pixels(pixels, C, sum, [dy, s](int64_t i) { return dy[i] * s[i]; });
}

// y = skip + gate s
VF_CLONES void gate_pixels(const float* s, const float* skip, const float* gate, int64_t pixels, int64_t C,
                           float* __restrict__ y) {
  for (int64_t i = 0; i < pixels * C; i += C) {
    for (int64_t c = 0; c < C; ++c) y[i + c] = skip[i + c] + gate[c] * s[i + c];
  }
}

// ds = shift + gate dy
VF_CLONES void gradient_pixels(const float* dy, const float* gate, const float* shift, int64_t pixels, int64_t C,
                               float* __restrict__ ds) {
  for (int64_t i = 0; i < pixels * C; i += C) {
    for (int64_t c = 0; c < C; ++c) ds[i + c] = shift[c] + gate[c] * dy[i + c];
  }
}

// y = W x + b, W [out, in]; 16 independent sums, which the compiler vectorises.
VF_CLONES void linear(const float* weight, const float* bias, const float* x, int64_t in, int64_t out, float* y) {
  for (int64_t o = 0; o < out; ++o, weight += in) {
    float sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= in; i += 16) {
      for (int lane = 0; lane < 16; ++lane) sums[lane] += weight[i + lane] * x[i + lane];
    }
    for (int lane = 0; i + lane < in; ++lane) sums[lane] += weight[i + lane] * x[i + lane];
    for (int half = 8; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    y[o] = bias[o] + sums[0];
  }
}

// dx = W^T dy, W [out, in]
VF_CLONES void linear_transposed(const float* weight, const float* dy, int64_t in, int64_t out,
                                 float* __restrict__ dx) {
  std::fill_n(dx, in, 0.0f);
  for (int64_t o = 0; o < out; ++o, weight += in) {
    for (int64_t i = 0; i < in; ++i) dx[i] += weight[i] * dy[o];
  }
}

// The sums over the pixels of an image; add(first pixel, pixels, sum) adds some of them to sum [C].
template <class Add>
std::vector<double> sum_over_pixels(int64_t pixels, int64_t C, const Add& add) {
  const int64_t chunks = (pixels + kChunk - 1) / kChunk, chunks_per_task = (pixels_per_task(C) + kChunk - 1) / kChunk;
  const at::Tensor partial = at::zeros({chunks, C}, at::kFloat);
  float* partial_sums = partial.mutable_data_ptr<float>();
  at::parallel_for(0, chunks, chunks_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      add(chunk * kChunk, std::min(kChunk, pixels - chunk * kChunk), partial_sums + chunk * C);
    }
  });
  std::vector<double> sums(C);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t c = 0; c < C; ++c) sums[c] += partial_sums[chunk * C + c];
  }
  return sums;
}

// One image per thread if there are enough images; else one after another, each split over all threads.
template <class Run>
void for_each_image(int64_t N, const Run& run) {
  const auto run_some = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) run(n);
  };
  if (N < at::get_num_threads()) return run_some(0, N);
  at::parallel_for(0, N, 1, run_some);
}

std::vector<float> means_of(const std::vector<double>& sums, int64_t count) {
  std::vector<float> means(sums.size());
  for (size_t c = 0; c < sums.size(); ++c) means[c] = static_cast<float>(sums[c] / count);
  return means;
}

// hidden = relu(W_in mean + b_in), gate = sigmoid(W_out hidden + b_out) of one image.
struct Gate {
  at::Tensor weight_in, bias_in, weight_out, bias_out;  // contiguous

  void open(const std::vector<float>& mean, float* hidden, float* gate) const {
    const int64_t width = weight_in.size(0), C = weight_in.size(1);
    linear(weight_in.const_data_ptr<float>(), bias_in.const_data_ptr<float>(), mean.data(), C, width, hidden);
    for (int64_t j = 0; j < width; ++j) hidden[j] = hidden[j] < 0 ? 0 : hidden[j];
    linear(weight_out.const_data_ptr<float>(), bias_out.const_data_ptr<float>(), hidden, width, C, gate);
    for (int64_t c = 0; c < C; ++c) gate[c] = 1 / (1 + std::exp(-gate[c]));
  }
};

// The gradient for the mean of one image, from that for its gate.
std::vector<float> mean_gradient(const at::Tensor& weight_in, const at::Tensor& weight_out, const float* hidden,
                                 const float* gate, const std::vector<double>& dgate) {
  const int64_t width = weight_in.size(0), C = weight_in.size(1);
  std::vector<float> dlogit(C), dhidden(width), dmean(C);
  for (int64_t c = 0; c < C; ++c) dlogit[c] = static_cast<float>(dgate[c] * gate[c] * (1 - gate[c]));
  linear_transposed(weight_out.const_data_ptr<float>(), dlogit.data(), width, C, dhidden.data());
  for (int64_t j = 0; j < width; ++j) dhidden[j] = hidden[j] > 0 ? dhidden[j] : 0;
  linear_transposed(weight_in.const_data_ptr<float>(), dhidden.data(), C, width, dmean.data());
  return dmean;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> se_gate_residual_cpu(
    const at::Tensor& s, const at::Tensor& skip, const at::Tensor& weight_in, const at::Tensor& bias_in,
    const at::Tensor& weight_out, const at::Tensor& bias_out) {
  check_image(s, "s");
  check_tensor(skip, "skip", s.sizes(), s);
  check_gate_weights(s, weight_in, weight_out);
  const int64_t N = s.size(0), C = s.size(1), pixels = s.size(2) * s.size(3), width = weight_in.size(0);
  check_tensor(bias_in, "bias_in", {width}, s);
  check_tensor(bias_out, "bias_out", {C}, s);
  const Gate layers{weight_in.contiguous(), bias_in.contiguous(), weight_out.contiguous(), bias_out.contiguous()};
  const at::Tensor source = s.contiguous(kLayout), added = skip.contiguous(kLayout);
  at::Tensor y = at::empty(s.sizes(), s.options(), kLayout);
  at::Tensor hidden = at::empty({N, width}, s.options()), gate = at::empty({N, C}, s.options());
  for_each_image(N, [&](int64_t n) {
    const int64_t offset = n * pixels * C;
    const float *from = source.const_data_ptr<float>() + offset, *skipped = added.const_data_ptr<float>() + offset;
    float *to = y.mutable_data_ptr<float>() + offset, *opened = gate.mutable_data_ptr<float>() + n * C;
    const std::vector<double> sums = sum_over_pixels(pixels, C, [&](int64_t first, int64_t count, float* sum) {
      add_values(from + first * C, count, C, sum);
    });
    layers.open(means_of(sums, pixels), hidden.mutable_data_ptr<float>() + n * width, opened);
    at::parallel_for(0, pixels, pixels_per_task(C), [&](int64_t begin, int64_t end) {
      gate_pixels(from + begin * C, skipped + begin * C, opened, end - begin, C, to + begin * C);
    });
  });
  return {y, hidden, gate};
}

at::Tensor se_gate_residual_backward_cpu(const at::Tensor& dy, const at::Tensor& s, const at::Tensor& hidden,
                                         const at::Tensor& gate, const at::Tensor& weight_in,
                                         const at::Tensor& weight_out) {
  check_image(s, "s");
  check_tensor(dy, "dy", s.sizes(), s);
  check_gate_weights(s, weight_in, weight_out);
  const int64_t N = s.size(0), C = s.size(1), pixels = s.size(2) * s.size(3), width = weight_in.size(0);
  check_tensor(hidden, "hidden", {N, width}, s);
  check_tensor(gate, "gate", {N, C}, s);
  const at::Tensor source = s.contiguous(kLayout), gradient = dy.contiguous(kLayout);
  const at::Tensor first = weight_in.contiguous(), second = weight_out.contiguous();
  const at::Tensor active = hidden.contiguous(), opened = gate.contiguous();
  at::Tensor ds = at::empty(s.sizes(), s.options(), kLayout);
  for_each_image(N, [&](int64_t n) {
    const int64_t offset = n * pixels * C;
    const float *from = source.const_data_ptr<float>() + offset, *dfrom = gradient.const_data_ptr<float>() + offset;
    const float *h = active.const_data_ptr<float>() + n * width, *g = opened.const_data_ptr<float>() + n * C;
    float* to = ds.mutable_data_ptr<float>() + offset;
    const std::vector<double> dgate = sum_over_pixels(pixels, C, [&](int64_t begin, int64_t count, float* sum) {
      add_products(dfrom + begin * C, from + begin * C, count, C, sum);
    });
    std::vector<float> shift = mean_gradient(first, second, h, g, dgate);
    for (float& value : shift) value /= static_cast<float>(pixels);
    at::parallel_for(0, pixels, pixels_per_task(C), [&](int64_t begin, int64_t end) {
      gradient_pixels(dfrom + begin * C, g, shift.data(), end - begin, C, to + begin * C);
    });
  });
  return ds;
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_IMPL(vaebm_fast, CPU, m) {
  m.impl("se_gate_residual", &vf::se_gate_residual_cpu);
  m.impl("se_gate_residual_backward", &vf::se_gate_residual_backward_cpu);
}
