// Storage types, float or bf16, and the words that threads move: 32 bits, one float or two bf16.
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

// The bits of a word: one register, for either type.
template <class T>
struct Word {
  uint32_t bits;
};

// A word's elements in fp32, also moved at once.
template <class T>
struct alignas(4 * kPerWord<T>) Values {
  float v[kPerWord<T>];
};

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(Bf16 a) { return float_of(static_cast<uint32_t>(a.bits) << 16); }

__device__ __forceinline__ Values<float> to_values(Word<float> word) { return {{float_of(word.bits)}}; }
__device__ __forceinline__ Values<Bf16> to_values(Word<Bf16> word) {
  return {{float_of(word.bits << 16), float_of(word.bits & 0xffff0000u)}};
}

__device__ __forceinline__ Word<float> to_word(const Values<float>& values) { return {bits_of(values.v[0])}; }
__device__ __forceinline__ Word<Bf16> to_word(const Values<Bf16>& values) {
  return {bf16_pair(values.v[0], values.v[1])};
}

// The nearest value of type T.
template <class T>
__device__ T to_element(float a);
template <>
__device__ __forceinline__ float to_element(float a) {
  return a;
}
template <>
__device__ __forceinline__ Bf16 to_element(float a) {
  return {static_cast<uint16_t>(bf16_pair(a, 0.0f))};
}

typedef uint32_t __attribute__((may_alias)) WordInMemory;

// The word at `from`; zeros without a read unless `exists`.
template <class T>
__device__ __forceinline__ Word<T> load_word(const T* from, bool exists) {
  return {exists ? *reinterpret_cast<const WordInMemory*>(from) : 0};
}

template <class T>
__device__ __forceinline__ void store_word(Word<T> word, T* to) {
  *reinterpret_cast<WordInMemory*>(to) = word.bits;
}

// Four words that move at once, 16-byte aligned in memory.
struct __attribute__((may_alias, aligned(16))) FourWords {
  uint32_t v[4];
};

// The four words at `from`; zeros without a read unless `exists`.
__device__ __forceinline__ FourWords load_four_words(const Bf16* from, bool exists) {
  FourWords words{};
  if (exists) words = *reinterpret_cast<const FourWords*>(from);
  return words;
}

// Two words, 8-byte aligned.
struct __attribute__((may_alias, aligned(8))) TwoWords {
  uint32_t v[2];
};

template <class T>
__device__ __forceinline__ TwoWords load_two_words(const T* from) {
  return *reinterpret_cast<const TwoWords*>(from);
}

template <class T>
__device__ __forceinline__ TwoWords load_two_words(const T* from, bool exists) {
  return exists ? load_two_words(from) : TwoWords{};
}

template <class T>
__device__ __forceinline__ void store_two_words(const TwoWords& words, T* to) {
  *reinterpret_cast<TwoWords*>(to) = words;
}

template <class T>
__device__ __forceinline__ void store_four_words(const FourWords& words, T* to) {
  *reinterpret_cast<FourWords*>(to) = words;
}

// Whether rows of C elements are whole words, and aligned, in all these tensors.
template <class... T>
bool are_whole_words(int C, const T*... tensors) {
  return ((C % kPerWord<T> == 0 && reinterpret_cast<uintptr_t>(tensors) % 4 == 0) && ...);
}

}  // namespace vf
