// Counter-based noise of one element: the definition that every backend reproduces bit for bit.
//
// Element e of draw k of an image depends only on (seed, k, stream, e). Philox4x32-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011) takes key (seed lo, seed hi) and counter (e / 4, k, stream, 0); its
// four words belong to elements 4 (e / 4) .. + 3. Normals are two Box-Muller pairs: words (0, 1) and words (2, 3).
#pragma once

#include "math.h"
#include "quad.h"

namespace vf {

// Identifies one noise vector: an image's seed, a draw, a stream.
struct NoiseKey {
  uint32_t seed_lo, seed_hi, draw, stream;
};

VF_HD NoiseKey noise_key(int64_t seed, int64_t draw, uint32_t stream) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(draw), stream};
}

struct Product {
  uint32_t hi, lo;
};

VF_HD Product wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return {__umulhi(a, b), a * b};
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
#endif
}

// The words of elements 4 quad .. 4 quad + 3.
VF_HD Quad<uint32_t> philox_words(const NoiseKey& key, uint32_t quad) {
  uint32_t c0 = quad, c1 = key.draw, c2 = key.stream, c3 = 0;
  uint32_t k0 = key.seed_lo, k1 = key.seed_hi;
  VF_UNROLL
  for (int round = 0; round < 10; ++round) {
    const Product p0 = wide_product(0xD2511F53u, c0);
    const Product p1 = wide_product(0xCD9E8D57u, c2);
    c0 = p1.hi ^ c1 ^ k0;
    c1 = p1.lo;
    c2 = p0.hi ^ c3 ^ k1;
    c3 = p0.lo;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

struct NormalPair {
  float z0, z1;
};

// Two standard normals from two words: sqrt(-2 log u) (cos, sin)(2 pi b / 2^32) with u = a / 2^32 + 2^-33 in (0, 1].
VF_HD NormalPair box_muller(uint32_t a, uint32_t b) {
  const float u = add(mul(static_cast<float>(a), 0x1p-32f), 0x1p-33f);
  const float r = square_root(mul(-2.0f, log_of_unit(u)));
  const CosSin angle = cos_sin_of_turns(b);
  return {mul(r, angle.cosine), mul(r, angle.sine)};
}

// The normals of elements 4 quad .. 4 quad + 3.
VF_HD Quad<float> philox_normal(const NoiseKey& key, uint32_t quad) {
  const Quad<uint32_t> words = philox_words(key, quad);
  const NormalPair first = box_muller(words.v[0], words.v[1]);
  const NormalPair second = box_muller(words.v[2], words.v[3]);
  return {{first.z0, first.z1, second.z0, second.z1}};
}

}  // namespace vf
