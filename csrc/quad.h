// Four adjacent elements, which a thread moves in one access if alignment allows. C++17 and CUDA, no torch headers.
#pragma once

#include <cstdint>

#include "math.h"

namespace vf {

// Aligned so that one 16-byte access moves it.
template <class T>
struct alignas(16) Quad {
  T v[4];
};

// The first `count` elements at `from`, then zeros; reads nothing if count <= 0. whole: count is a multiple of four and
// `from` is aligned.
template <class T>
VF_HD Quad<T> load_quad(const T* from, int64_t count, bool whole) {
  Quad<T> values{};
  if (whole) {
    if (count > 0) values = *reinterpret_cast<const Quad<T>*>(from);
    return values;
  }
  VF_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (j < count) values.v[j] = from[j];
  }
  return values;
}

template <class T>
VF_HD void store_quad(const Quad<T>& values, int64_t count, bool whole, T* to) {
  if (whole) {
    if (count > 0) *reinterpret_cast<Quad<T>*>(to) = values;
    return;
  }
  VF_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (j < count) to[j] = values.v[j];
  }
}

}  // namespace vf
