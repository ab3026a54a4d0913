// The Python module vaebm_fast._C, whose import registers the kernels.
//
// vaebm_fast/ops/<op>.py defines each op's schema; torch then checks the signatures of its kernels.
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddIntConstant(module, "with_cuda", VAEBM_WITH_CUDA) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
