// Macros for launches and shared memory, the parts of CUDA that a C++ compiler cannot parse. The tests define them
// differently and so run the same kernels on a CPU.
//
// VF_LAUNCH(kernel, grid, block, shared_bytes, cuda_stream, arguments...): `kernel` is a name without commas.
// VF_SHARED(Type, name): one object of the block; give arrays a name by `using`.
// VF_DYNAMIC_SHARED(Type, name): a Type* to the shared_bytes of the launch, 16-byte aligned; once per kernel.
// Shared memory starts uninitialised; a thread's writes are visible to others after __syncthreads().
#pragma once

typedef struct CUstream_st* cudaStream_t;  // the same declaration as in the CUDA headers, which host code need not have

#ifdef __CUDACC__
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace vf {

// A kernel must request more than 48 KB of dynamic shared memory once per device; each kernel uses one size.
inline void allow_shared_bytes(const void* kernel, size_t shared_bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  if (shared_bytes <= (48 << 10)) return;
  int device = 0, most = 0;
  cudaGetDevice(&device);
  const std::lock_guard lock(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  const int bytes = static_cast<int>(shared_bytes);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) {
    const std::string why = cudaGetErrorString(cudaGetLastError());
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    throw std::runtime_error("A block of this kernel needs " + std::to_string(bytes) + " bytes of shared memory, and " +
                             "GPU " + std::to_string(device) + " gives it at most " + std::to_string(most) + " (" +
                             why + "); take another backend, or an A100, H100 or later.");
  }
  allowed.emplace(kernel, device);
}

}  // namespace vf

#define VF_LAUNCH(kernel, grid, block, shared_bytes, cuda_stream, ...) \
  (vf::allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes), \
   kernel<<<grid, block, shared_bytes, cuda_stream>>>(__VA_ARGS__))
#define VF_SHARED(Type, name) __shared__ Type name
#define VF_DYNAMIC_SHARED(Type, name)                          \
  extern __shared__ __align__(16) unsigned char vf_dynamic[]; \
  Type* name = reinterpret_cast<Type*>(vf_dynamic)
#endif
