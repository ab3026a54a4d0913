// What tensors are stored in, float or bf16, and how a thread moves it: in words of 32 bits, one float or two bf16.
// Arithmetic is fp32 throughout.
#pragma once

#include "../math.h"
#include "ptx.h"

namespace vf {

struct Bf16 {
  uint16_t bits;
};

template <class T>
constexpr int kPerWord = 4 / sizeof(T);

template <class T>
struct alignas(4) Word {
  T v[kPerWord<T>];
};

// The elements of a word in fp32, moved at once too.
template <class T>
struct alignas(4 * kPerWord<T>) Values {
  float v[kPerWord<T>];
};

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(Bf16 a) { return float_of(static_cast<uint32_t>(a.bits) << 16); }

template <class T>
__device__ __forceinline__ Values<T> to_values(const Word<T>& word) {
  Values<T> values;
  VF_UNROLL
  for (int c = 0; c < kPerWord<T>; ++c) values.v[c] = to_float(word.v[c]);
  return values;
}

__device__ __forceinline__ Word<float> to_word(const Values<float>& values) { return {{values.v[0]}}; }

__device__ __forceinline__ Word<Bf16> to_word(const Values<Bf16>& values) {
  const uint32_t pair = bf16_pair(values.v[0], values.v[1]);
  return {{{static_cast<uint16_t>(pair)}, {static_cast<uint16_t>(pair >> 16)}}};
}

template <class T>
__device__ __forceinline__ T to_element(float a) {
  return to_word(Values<T>{{a}}).v[0];
}

// The word at `from`; its elements after the first `left` are zero and not read. `whole`: all words of the tensor are
// aligned, and `left` is a multiple of a word, or below 1.
template <class T>
__device__ __forceinline__ Word<T> load_word(const T* from, int left, bool whole) {
  Word<T> word{};
  if (kPerWord<T> == 1 || whole) {
    if (left > 0) word = *reinterpret_cast<const Word<T>*>(from);
  } else {
    VF_UNROLL
    for (int c = 0; c < kPerWord<T>; ++c) {
      if (c < left) word.v[c] = from[c];
    }
  }
  return word;
}

// Its counterpart: elements after the first `left` are not written.
template <class T>
__device__ __forceinline__ void store_word(const Word<T>& word, T* to, int left, bool whole) {
  if (kPerWord<T> == 1 || whole) {
    if (left > 0) *reinterpret_cast<Word<T>*>(to) = word;
  } else {
    VF_UNROLL
    for (int c = 0; c < kPerWord<T>; ++c) {
      if (c < left) to[c] = word.v[c];
    }
  }
}

}  // namespace vf
