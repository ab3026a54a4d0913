// Compiles the file VF_KERNELS once per instruction set, into vf::avx512, vf::avx2 and vf::portable; vf::isa() selects
// one on this machine. GCC on x86-64 builds AVX-512 and AVX2; other targets have only the portable one.
//
// For explicitly vectorised code; loops that the compiler vectorises use VF_CLONES of clones.h.
#pragma once

#include <ATen/Version.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#define VF_INLINE inline __attribute__((always_inline))
#define VF_UNROLL_FULLY _Pragma("GCC unroll 32")

namespace vf {

enum class Isa { portable, avx2, avx512 };

// Follows torch's choice, so ATEN_CPU_CAPABILITY=avx2 or =default narrows these kernels together with torch's.
inline Isa isa() {
  static const Isa widest = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? Isa::avx512 : capability == "AVX2" ? Isa::avx2 : Isa::portable;
  }();
  return widest;
}

}  // namespace vf

#define VF_LANES 4
#define VF_FMA(a, b, c) ((a) * (b) + (c))
namespace vf::portable {
namespace {
#include "vector.h"
#include VF_KERNELS
}  // namespace
}  // namespace vf::portable
#undef VF_LANES
#undef VF_FMA

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define VF_LANES 8
#define VF_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
namespace vf::avx2 {
namespace {
#include "vector.h"
#include VF_KERNELS
}  // namespace
}  // namespace vf::avx2
#undef VF_LANES
#undef VF_FMA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq")
#define VF_LANES 16
#define VF_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
namespace vf::avx512 {
namespace {
#include "vector.h"
#include VF_KERNELS
}  // namespace
}  // namespace vf::avx512
#undef VF_LANES
#undef VF_FMA
#pragma GCC pop_options
#else
namespace vf {
namespace avx2 = portable;
namespace avx512 = portable;
}  // namespace vf
#endif

// The function of this name in VF_KERNELS for the best instruction set of this machine.
#define VF_BEST(function)                                  \
  (vf::isa() == vf::Isa::avx512 ? vf::avx512::function     \
   : vf::isa() == vf::Isa::avx2 ? vf::avx2::function       \
                                : vf::portable::function)
