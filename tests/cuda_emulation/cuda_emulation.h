// Runs the kernel part of a .cu file on the CPU: the words of CUDA that our kernels use, as C++20. The compiler
// includes it first (-include). A launch that a GPU would refuse ends the program.
//
// Blocks run one after another, and so do the threads of a block: enough for kernels whose threads never wait.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

inline void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "CUDA emulation: %s\n", what);
    std::abort();
  }
}

template <class Body>
void for_each(const dim3& extent, dim3& index, const Body& body) {
  for (index.z = 0; index.z < extent.z; ++index.z) {
    for (index.y = 0; index.y < extent.y; ++index.y) {
      for (index.x = 0; index.x < extent.x; ++index.x) body();
    }
  }
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, Arguments... arguments) {
  require(grid.x >= 1 && grid.x <= 0x7fffffffu, "grid.x is outside 1..2^31-1");
  require(grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535, "grid.y or grid.z is outside 1..65535");
  require(block.x >= 1 && block.y >= 1 && block.z >= 1 && block.z <= 64 && block.x * block.y * block.z <= 1024,
          "a block has more than 1024 threads, or none");
  gridDim = grid;
  blockDim = block;
  for_each(grid, blockIdx, [&] { for_each(block, threadIdx, [&] { kernel(arguments...); }); });
}

}  // namespace emulation

#define VF_LAUNCH(kernel, grid, block, shared_bytes, cuda_stream, ...) \
  ((void)(shared_bytes), (void)(cuda_stream), emulation::launch(kernel, grid, block, __VA_ARGS__))
