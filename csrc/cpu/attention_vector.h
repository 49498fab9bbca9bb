// Vectors of fp32 in GCC's vector extensions, so that one source serves AVX-512, AVX2 and what has neither: arithmetic
// is written with operators, and only what these cannot say (rounding to bf16, scaling by a power of two) is per ISA.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vatt::attention {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
  uint16_t bits;
};

template <class V, class T>
inline V load_as(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
inline void store_as(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline Vector broadcast(float x) { return x - Vector{}; }

inline Integers lane_numbers() {
  Integers v{};
  for (int i = 0; i < LANES; ++i) v[i] = i;
  return v;
}

// The second operand where either is not a number, so that a NaN in `x` is kept by larger(limit, x).
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float sum(Vector v) {
  for (int step = LANES / 2; step > 0; step /= 2) v += __builtin_shuffle(v, lane_numbers() ^ step);
  return v[0];
}

inline float largest(Vector v) {
  for (int step = LANES / 2; step > 0; step /= 2) v = larger(v, __builtin_shuffle(v, lane_numbers() ^ step));
  return v[0];
}

// The first `count` lanes of v, `other` in the rest.
inline Vector first_lanes(Vector v, int64_t count, float other) {
  return lane_numbers() < (int32_t)count ? v : broadcast(other);
}

// LANES numbers of a tensor as fp32, exactly.
inline Vector widen(const float* from) { return load_as<Vector>(from); }

inline Vector widen(const BFloat16* from) {
#if defined(__AVX512F__)
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(from)), 16);
#else
  return (Vector)(__builtin_convertvector(load_as<Halves>(from), Bits) << 16);
#endif
}

// Rounded to the nearest bf16, ties to even; one bf16 in the low half of each 32-bit lane.
inline Bits rounded(Vector v) {
#if defined(__AVX512BF16__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const Bits bits = (Bits)v, carried = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? carried : (bits >> 16 | 0x40u);
#endif
}

inline void narrow(float* to, Vector v) { store_as(to, v); }

inline void narrow(BFloat16* to, Vector v) {
#if defined(__AVX512BF16__)
  store_as(to, _mm512_cvtneps_pbh((__m512)v));
#else
  store_as(to, __builtin_convertvector(rounded(v), Halves));
#endif
}

// 2^x for x <= 127, within 1 unit in the last place and exactly 1 for 0; 0 below 2^-126 (or a denormal), NaN for NaN. The
// polynomial is the one of degree 6 with the least relative error on [-1/2, 1/2] among those that are 1 at 0.
inline Vector exp2(Vector x) {
  x = larger(broadcast(-200.0f), x);
#if defined(__AVX512F__)
  const Vector whole = (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vector shifted = x + 0x1.8p23f, whole = shifted - 0x1.8p23f;
#endif
  const Vector f = x - whole;
  Vector p = broadcast(1.5353362e-4f);
  p = p * f + 1.3398875e-3f;
  p = p * f + 9.61843692e-3f;
  p = p * f + 5.55033237e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (Vector)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  const Vector scaled = (Vector)((Integers)p + ((Integers)shifted << 23));
  return x < -126.0f ? broadcast(0.0f) : scaled;
#endif
}

template <int STEP>
inline void exchange(Bits (&rows)[LANES]) {
  const Integers lane = lane_numbers(), high = lane & STEP;
  const Integers from_first = high ? LANES + lane - STEP : lane, from_second = high ? LANES + lane : lane + STEP;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & STEP)) {
      const Bits a = rows[i], b = rows[i + STEP];
      rows[i] = __builtin_shuffle(a, b, from_first);
      rows[i + STEP] = __builtin_shuffle(a, b, from_second);
    }
  if constexpr (STEP > 1) exchange<STEP / 2>(rows);
}

// A square of LANES x LANES 32-bit words, rows to columns.
inline void transpose(Bits (&rows)[LANES]) { exchange<LANES / 2>(rows); }

}  // namespace vatt::attention
