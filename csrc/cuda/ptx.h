// Every hand-written PTX instruction, one function each. Only nvcc compiles their bodies; tests on a CPU use
// tests/csrc/emulation/ptx_emulation.h.
#pragma once

#include <cstdint>

namespace vf {

// 2^x to 2 ulp; results below 2^-126 become zero.
__device__ float exp2_approx(float x);

// 1/x to 1 ulp; an x or a result below 2^-126 counts as zero.
__device__ float reciprocal_approx(float x);

// tanh x to a relative 2^-11.
__device__ float tanh_approx(float x);

// The bits of two bf16, rounded to nearest even, lo in the lower half.
__device__ uint32_t bf16_pair(float lo, float hi);

// Half of both; exact except for the last bit of numbers below 2^-125.
__device__ uint32_t half_of_pair(uint32_t pair);

// The elements of a matrix that lane l of a warp holds, two bf16 per word, the left or upper one in the lower half:
// A [16, 16]: v[i] is row l / 4 + 8 (i % 2), columns 2 (l % 4) + 8 (i / 2) and the next.
// B [16, 8]:  v[i] is rows 2 (l % 4) + 8 i and the next, column l / 4.
// C [16, 8]:  v[i] is row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2, in fp32.
struct FragmentA {
  uint32_t v[4];
};
struct FragmentB {
  uint32_t v[2];
};
struct FragmentC {
  float v[4];
};

// c += a b, by all 32 lanes of a warp together. 16 x 8 x 16 multiply-adds.
__device__ void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b);

// Four 8x8 matrices of bf16 from shared memory, by all 32 lanes together. Lane l gives the address of row l % 8 of
// matrix l / 8, 16-byte aligned. Word i of the result is matrix i: row l / 4, columns 2 (l % 4) and the next.
// With the quadrants of a row-major [16, 16] as matrices (upper left, lower left, upper right, lower right) that is A.
__device__ FragmentA load_matrices(const void* row);

// The same, each matrix transposed: word i is column l / 4 of matrix i, rows 2 (l % 4) and the next.
__device__ FragmentA load_matrices_transposed(const void* row);

#ifdef __CUDACC__
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t bf16_pair(float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}

__device__ __forceinline__ uint32_t half_of_pair(uint32_t pair) {
  uint32_t half;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(half) : "r"(pair), "r"(0x3f003f00u), "r"(0x80008000u));  // 0.5, -0
  return half;
}

__device__ __forceinline__ void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  asm volatile(  // otherwise the compiler might move it into divergent code
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));
}

// These read memory that the compiler does not see, hence volatile and "memory".
__device__ __forceinline__ FragmentA load_matrices(const void* row) {
  FragmentA m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.v[0]), "=r"(m.v[1]), "=r"(m.v[2]), "=r"(m.v[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
  return m;
}

__device__ __forceinline__ FragmentA load_matrices_transposed(const void* row) {
  FragmentA m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.v[0]), "=r"(m.v[1]), "=r"(m.v[2]), "=r"(m.v[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
  return m;
}
#endif

}  // namespace vf
