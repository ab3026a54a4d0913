// Kernels are launched through VF_LAUNCH, because `<<<>>>` is the one part of CUDA that no C++ compiler reads. The
// tests define it otherwise and so run the same kernels on a CPU.
#pragma once

typedef struct CUstream_st* cudaStream_t;  // the same declaration as in the CUDA headers, which host code need not have

#ifdef __CUDACC__
#define VF_LAUNCH(kernel, grid, block, shared_bytes, cuda_stream, ...) \
  kernel<<<grid, block, shared_bytes, cuda_stream>>>(__VA_ARGS__)
#endif
