// Runs the kernel part of a .cu file on the CPU: the words of CUDA that our kernels use, as C++20. Included before it.
//
// Blocks run one after another, the CUDA threads of a block in turns (fibers.h) from barrier to barrier; to
// ThreadSanitizer they are threads that only barriers order, so that it sees a missing one. What a block shares is memory of its own, of the exact size, so that
// AddressSanitizer sees a step beside it, and NaN when the block begins, so that results show what was never written.
// What a GPU would refuse, or answer by chance, ends the program with a sentence.
//
// Stricter than a GPU: warp functions take whole warps only. More lenient: they order memory as __syncwarp() does, and
// threads that wait at different __syncthreads() meet.
//
// VF_THREADS_NEVER_WAIT, defined beforehand: the threads of a block run one after another too, which is faster;
// nothing that waits or is shared exists, so a kernel that needs it does not compile.
// VF_DROP_BARRIER in the environment, as "depthwise_swish.cu:12": the barrier on that line is ignored, to show that it
// is missed. VF_MAX_SHARED_KB, defined beforehand: for kernels that are not for every GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define VF_UNROLL  // of csrc/math.h: here it would only make the compiler slow

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Undefined behaviour aborts, which Python's faulthandler reports; a plain exit would end the tests without a word.
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1"; }

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

using std::max;
using std::min;

namespace emulation {

inline void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "CUDA emulation: %s\n", what);
    std::abort();
  }
}

inline void check_launch(dim3 grid, dim3 block) {
  require(grid.x >= 1 && grid.x <= 0x7fffffffu, "grid.x is outside 1..2^31-1");
  require(grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535, "grid.y or grid.z is outside 1..65535");
  require(block.x >= 1 && block.y >= 1 && block.z >= 1 && block.z <= 64 && block.x * block.y * block.z <= 1024,
          "a block has more than 1024 threads, or none");
}

// Sets `index` to every point of `extent` in turn, x the fastest.
template <class Body>
void for_each(const dim3& extent, dim3& index, const Body& body) {
  for (index.z = 0; index.z < extent.z; ++index.z) {
    for (index.y = 0; index.y < extent.y; ++index.y) {
      for (index.x = 0; index.x < extent.x; ++index.x) body();
    }
  }
}

}  // namespace emulation

#ifdef VF_THREADS_NEVER_WAIT
namespace emulation {

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  check_launch(grid, block);
  require(shared_bytes == 0, "shared memory is asked for by a kernel whose threads never wait");
  gridDim = grid;
  blockDim = block;
  for_each(grid, blockIdx, [&] { for_each(block, threadIdx, [&] { kernel(arguments...); }); });
}

}  // namespace emulation
#else
#include "block_emulation.h"
#endif

#define VF_LAUNCH(kernel, grid, block, shared_bytes, cuda_stream, ...) \
  ((void)(cuda_stream), emulation::launch(kernel, grid, block, shared_bytes, __VA_ARGS__))
