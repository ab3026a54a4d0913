// A kernel with one fault, which the emulation or a sanitiser must report: `faults <name>`. With "none" the program
// exits with 0, its result being right.
#include "cuda_emulation.h"
//
#include "../../../csrc/cuda/launch.h"

#include <cstring>
#include <vector>

namespace {

constexpr int kThreads = 64, kBlocks = 3;

struct Fault {
  int read_beyond = 0, shared_beyond = 0, dynamic_beyond = 0, own_beyond = 0;  // elements
  bool writes_half = false, lane_returns = false, half_mask = false, half_waits_twice = false;
};

// out[i] = in[kThreads - 1 - i] of each block, once through either kind of shared memory.
__global__ void reverse_kernel(const float* in, float* out, Fault fault) {
  using Values = float[kThreads];
  VF_SHARED(Values, values);
  VF_DYNAMIC_SHARED(float, more_values);
  const int t = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  float* shared = values;  // or the compiler itself would see the step beyond
  if (fault.lane_returns && t == 7) return;
  if (fault.half_waits_twice && t < 16) __syncwarp();
  if (!fault.writes_half || blockIdx.x == 0 || t < kThreads / 2) {
    shared[t + fault.shared_beyond] = in[first + t + fault.read_beyond];
  }
  __syncthreads();
  float own[1];
  own[fault.own_beyond] = shared[kThreads - 1 - t];
  more_values[t + fault.dynamic_beyond] = own[fault.own_beyond];
  __syncwarp(fault.half_mask ? 0xffffu : 0xffffffffu);
  out[first + t] = more_values[t];
}

int run(const Fault& fault, int blocks, int threads, size_t shared_bytes) {
  std::vector<float> in(kBlocks * kThreads), out(in.size(), -1.0f);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  VF_LAUNCH(reverse_kernel, blocks, threads, shared_bytes, cudaStream_t{}, in.data(), out.data(), fault);
  for (size_t i = 0; i < in.size(); ++i) {
    if (out[i] != in[i / kThreads * kThreads + kThreads - 1 - i % kThreads]) {
      std::fprintf(stderr, "out[%zu] is %f\n", i, out[i]);
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  const auto is = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  const size_t bytes = kThreads * sizeof(float);
  Fault fault;
  if (is("reads beyond")) fault.read_beyond = 1;
  if (is("writes beyond shared memory")) fault.shared_beyond = 1;
  if (is("writes beyond dynamic shared memory")) fault.dynamic_beyond = 1;
  if (is("writes beyond an array of its own")) fault.own_beyond = 1;
  if (is("writes before shared memory")) fault.shared_beyond = -1;
  if (is("leaves shared memory unwritten")) fault.writes_half = true;
  if (is("lane returned")) fault.lane_returns = true;
  if (is("half mask")) fault.half_mask = true;
  if (is("half a warp waits twice")) fault.half_waits_twice = true;
  if (is("small warp")) return run(fault, kBlocks, 48, bytes);
  if (is("shared memory")) return run(fault, kBlocks, kThreads, 163 << 10);
  if (is("threads")) return run(fault, kBlocks, 1025, bytes);
  return run(fault, kBlocks, kThreads, bytes);
}
