// What our kernels say through macros, because `<<<>>>` and memory that a block shares are the parts of CUDA that no
// C++ compiler reads. The tests define them otherwise and so run the same kernels on a CPU.
//
// VF_LAUNCH(kernel, grid, block, shared_bytes, cuda_stream, arguments...): `kernel` is a name without commas.
// VF_SHARED(Type, name): one object of the block; give arrays a name by `using`.
// VF_DYNAMIC_SHARED(Type, name): a Type* to the shared_bytes of the launch, 16-byte aligned; once per kernel.
// Shared memory begins as garbage; one thread's writes are another's after __syncthreads().
#pragma once

typedef struct CUstream_st* cudaStream_t;  // the same declaration as in the CUDA headers, which host code need not have

#ifdef __CUDACC__
namespace vf {

// Beyond 48 KB a kernel must ask for its dynamic shared memory; should that fail, so does the launch, which is checked.
template <class Kernel>
void allow_shared_bytes(Kernel* kernel, size_t shared_bytes) {
  if (shared_bytes > (48 << 10)) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
}

}  // namespace vf

#define VF_LAUNCH(kernel, grid, block, shared_bytes, cuda_stream, ...) \
  (vf::allow_shared_bytes(kernel, shared_bytes), kernel<<<grid, block, shared_bytes, cuda_stream>>>(__VA_ARGS__))
#define VF_SHARED(Type, name) __shared__ Type name
#define VF_DYNAMIC_SHARED(Type, name)                          \
  extern __shared__ __align__(16) unsigned char vf_dynamic[]; \
  Type* name = reinterpret_cast<Type*>(vf_dynamic)
#endif
