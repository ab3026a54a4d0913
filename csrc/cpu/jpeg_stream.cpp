// The check of JPEG files as torch.ops.vaebm_fast.jpeg_stream_fault.
#include "jpeg_stream.h"

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>

namespace vf {
namespace {

std::string check_file(const at::Tensor& bytes) {
  TORCH_CHECK(bytes.scalar_type() == at::kByte && bytes.is_contiguous(), "bytes must be uint8 and contiguous.");
  return jpeg_stream_fault(bytes.const_data_ptr<uint8_t>(), bytes.numel());
}

}  // namespace
}  // namespace vf

TORCH_LIBRARY_FRAGMENT(vaebm_fast, m) {
  m.def("jpeg_stream_fault(Tensor bytes) -> str", torch::dispatch(c10::DispatchKey::CPU, &vf::check_file));
}
