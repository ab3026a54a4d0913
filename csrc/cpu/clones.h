// Vector width chosen at run time: GCC compiles a VF_CLONES function for AVX-512, AVX2 and the default target, and the
// loader picks the widest that the machine supports. The bits are the same: -ffp-contract=off prevents fma in all.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VF_CLONES
#endif
