// The weights' dropout, drawn from the counter: see kernels/counter.py and kernels/dropout.py, whose numbers these are.
//
// Row r of a sample is its (row of the batch, head, query) in order; the weight of key k takes word k % 4 of the counter
// (r ceil(N / 4) + k / 4, sample id, step, stream).
#pragma once

#include "attention_shape.h"

namespace vatt::attention {

typedef uint64_t Longs __attribute__((vector_size(4 * LANES)));

// The products of the even lanes, whole.
inline Longs multiply_even(Bits a, uint32_t b) {
#if defined(__AVX512F__)
  return (Longs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)b));
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)b));
#else
  return ((Longs)a & 0xFFFFFFFFu) * b;
#endif
}

struct Products {
  Bits high, low;
};

inline Products multiply_words(Bits a, uint32_t b) {
  const Longs even = multiply_even(a, b), odd = multiply_even((Bits)((Longs)a >> 32), b), upper = Longs{} + 0xFFFFFFFF00000000u;
  return {(Bits)((even >> 32) | (odd & upper)), (Bits)((even & ~upper) | (odd << 32))};
}

// a[0], b[0], a[1], b[1], ...: the first half in `first`.
inline void interleave(Bits a, Bits b, Bits& first, Bits& second) {
  const Integers lane = lane_numbers(), from = (lane >> 1) + (lane & 1) * LANES;
  first = __builtin_shuffle(a, b, from), second = __builtin_shuffle(a, b, from + LANES / 2);
}

struct Dropout {
  float rate;  // 0 is no dropout, and the rest is not read
  uint32_t threshold, step, stream;
  uint64_t seed;
  const int64_t* sample_id;
  int64_t rows_per_sample;

  bool on() const { return rate > 0.0f; }

  // 0 or 1 / (1 - rate) for the keys from `key`, a multiple of 4, up to the next multiple of 4 * LANES after `count` of them.
  void draw(Shape shape, int64_t b, int64_t h, int64_t query, int64_t key, int64_t count, float* to) const {
    const int64_t row = ((b % rows_per_sample) * shape.H + h) * shape.N + query;
    const uint32_t sample = (uint32_t)sample_id[b / rows_per_sample];
    const float kept = 1.0f / (1.0f - rate);
    for (int64_t k = 0; k < count; k += 4 * LANES) {
      Bits c0 = (Bits)lane_numbers() + (uint32_t)(row * ceil_div(shape.N, 4) + (key + k) / 4);
      Bits c1 = Bits{} + sample, c2 = Bits{} + step, c3 = Bits{} + stream;
      uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
      for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const Products p0 = multiply_words(c0, 0xD2511F53u), p1 = multiply_words(c2, 0xCD9E8D57u);
        c0 = p1.high ^ c1 ^ k0, c1 = p1.low, c2 = p0.high ^ c3 ^ k1, c3 = p0.low;
      }
      Bits even[2], odd[2], words[4];
      interleave(c0, c2, even[0], even[1]), interleave(c1, c3, odd[0], odd[1]);
      interleave(even[0], odd[0], words[0], words[1]), interleave(even[1], odd[1], words[2], words[3]);
      for (int i = 0; i < 4; ++i) store_as(to + k + i * LANES, words[i] >= threshold ? broadcast(kept) : Vector{});
    }
  }
};

}  // namespace vatt::attention
