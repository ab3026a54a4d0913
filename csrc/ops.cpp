// The schema of every op, and the Python module vaebm_fast._C whose import registers them.
//
// cpu/<op>.cpp and cuda/bindings.cpp implement them; vaebm_fast/ops/<op>.py is the public interface.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(vaebm_fast, m) {
  // seeds int64 [N] (the bits of a uint64), draw int64 [] or [1] (its low 32 bits) -> [N, numel]
  m.def("philox_words(Tensor seeds, Tensor draw, int stream, int numel) -> Tensor");   // int32: the bits of a uint32
  m.def("philox_normal(Tensor seeds, Tensor draw, int stream, int numel) -> Tensor");  // float32

  // h [N, C, H, W], weight [K, K, C], bias [C] -> [N, C, H, W], or [N, C, 2H, 2W] upsampled; channels_last
  // float32, on CUDA also bfloat16; all tensors share one type
  m.def("depthwise_swish(Tensor h, Tensor weight, Tensor bias, bool upsample) -> Tensor");
  // dy in the shape of that output -> the gradient for h
  m.def("depthwise_swish_backward(Tensor dy, Tensor h, Tensor weight, bool upsample) -> Tensor");

  // x [N, Cin, H, W], weight and weight_t from pack_pointwise, bias [Cout], residual in the shape of the result
  // -> [N, Cout, H, W]; channels_last float32; activation of x: none, swish or elu
  m.def(
      "pointwise(Tensor x, Tensor weight, Tensor weight_t, Tensor? bias, Tensor? residual, str activation) "
      "-> Tensor");
  // dy in the shape of that output, x if it was activated -> the gradient for x [N, Cin, H, W]
  m.def("pointwise_backward(Tensor dy, Tensor weight_t, int Cin, Tensor? x, str activation) -> Tensor");

  // x [N, C, H, W], weight [hidden / 32, 64 C + 1920] and weight_t [hidden / 32, 96 C + 1920] of
  // ops/inverted_residual.py, bias [C], bfloat16, channels_last; CUDA only -> s like x, and for the backward h2
  // [N, hidden, H, W], or [0] without with_h2
  m.def(
      "inverted_residual(Tensor x, Tensor weight, Tensor weight_t, Tensor bias, bool with_h2) "
      "-> (Tensor s, Tensor h2)");
  // ds -> the gradient for x
  m.def("inverted_residual_backward(Tensor ds, Tensor x, Tensor h2, Tensor weight_t) -> Tensor");

  // weight [B, M, K], u [B, M], v [B, K], float32 -> (u, v) after the iterations
  m.def("power_iteration(Tensor weight, Tensor u, Tensor v, int iterations, float eps) -> (Tensor, Tensor)");

  // y, skip [N, C, H, W], shift [C] -> swish(y + shift + skip_scale skip); du -> the gradient for y
  m.def("energy_epilogue(Tensor y, Tensor? skip, float skip_scale, Tensor? shift) -> Tensor");
  m.def("energy_epilogue_backward(Tensor du, Tensor y, Tensor? skip, float skip_scale, Tensor? shift) -> Tensor");

  // y, skip, shift as above, weight [C], bias [1] -> energy [N]; denergy [N] -> the gradient for y
  m.def(
      "energy_head(Tensor y, Tensor? skip, float skip_scale, Tensor? shift, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "energy_head_backward(Tensor denergy, Tensor y, Tensor? skip, float skip_scale, Tensor? shift, Tensor weight) "
      "-> Tensor");

  // s, skip [N, C, H, W], weights [hidden, C] [hidden] [C, hidden] [C] -> y, and for the backward hidden [N, hidden],
  // gate [N, C]; dy -> the gradient for s
  m.def(
      "se_gate_residual(Tensor s, Tensor skip, Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out) "
      "-> (Tensor y, Tensor hidden, Tensor gate)");
  m.def(
      "se_gate_residual_backward(Tensor dy, Tensor s, Tensor hidden, Tensor gate, Tensor weight_in, Tensor weight_out) "
      "-> Tensor");

  // parameters [N, 2 L, H, W] (none: zeros), eps [N, L, H, W] -> z, log_p [N] or [0]; dz, dlog_p [N] -> the gradients,
  // dparameters [0] without parameters
  m.def(
      "gaussian_latent(Tensor? parameters, Tensor eps, float temperature, bool with_log_p) "
      "-> (Tensor z, Tensor log_p)");
  m.def(
      "gaussian_latent_backward(Tensor dz, Tensor? dlog_p, Tensor? parameters, Tensor eps, float temperature) "
      "-> (Tensor dparameters, Tensor deps)");

  // logits [N, 2 C, H, W], eps_x [N, C, H, W] -> x, log_p [N] or [0]; dx, dlog_p [N] -> the gradients
  m.def("pixel_head(Tensor logits, Tensor eps_x, bool with_log_p) -> (Tensor x, Tensor log_p)");
  m.def(
      "pixel_head_backward(Tensor dx, Tensor? dlog_p, Tensor logits, Tensor eps_x) -> (Tensor dlogits, Tensor deps_x)");

  // eps and gradient float32 [N, D], seeds, draw and stream as above; nonfinite_at int64 [N]: -1, or the first draw
  // after which an image is not finite
  m.def(
      "langevin_update(Tensor(a!) eps, Tensor gradient, Tensor seeds, Tensor draw, Tensor(b!) nonfinite_at, "
      "int stream, float step_size, bool prior) -> ()");

  // From begin to the matching end, CPU tensors use blocks that are kept when freed; release_memory frees them.
  m.def("reuse_memory(bool begin) -> ()");
  m.def("release_memory() -> int");  // bytes
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddIntConstant(module, "with_cuda", VAEBM_WITH_CUDA) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
