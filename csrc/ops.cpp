// The schema of every op, and the Python module vaebm_fast._C whose import registers them.
//
// cpu/<op>.cpp and cuda/bindings.cpp implement them; vaebm_fast/ops/<op>.py is their public face.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(vaebm_fast, m) {
  // seeds int64 [N] (the bits of a uint64), draw int64 [] or [1] (its low 32 bits) -> [N, numel]
  m.def("philox_words(Tensor seeds, Tensor draw, int stream, int numel) -> Tensor");   // int32: the bits of a uint32
  m.def("philox_normal(Tensor seeds, Tensor draw, int stream, int numel) -> Tensor");  // float32

  // h [N, C, H, W], weight [K, K, C], bias [C] -> [N, C, H, W], or [N, C, 2H, 2W] upsampled; channels_last
  // float32, on CUDA bfloat16 too; all of one
  m.def("depthwise_swish(Tensor h, Tensor weight, Tensor bias, bool upsample) -> Tensor");
  // dy in the shape of that output -> the gradient for h
  m.def("depthwise_swish_backward(Tensor dy, Tensor h, Tensor weight, bool upsample) -> Tensor");
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
