// Pixels to [-1, 1], 16 at a time; floats are only converted.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace vatt {

typedef std::uint8_t Pixels16 __attribute__((vector_size(16)));
typedef std::int32_t Integers16 __attribute__((vector_size(64)));
typedef std::uint32_t Bits16 __attribute__((vector_size(64)));
typedef std::uint16_t Halves16 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));

// Two roundings, as in the specification: this file's users are compiled without contraction to a fused multiply-add.
inline float unit(std::uint8_t pixel) { return static_cast<float>(pixel) * (2.0f / 255.0f) - 1.0f; }
inline float unit(float x) { return x; }
inline float unit(bfloat16 x) { return widen(x); }

template <typename In, typename Out>
inline void convert16(const In* __restrict in, Out* __restrict out) {
  for (int i = 0; i < 16; ++i) narrow(unit(in[i]), out[i]);
}

inline Floats16 unit16(const std::uint8_t* in) {
  Pixels16 pixels;
  std::memcpy(&pixels, in, 16);
  return __builtin_convertvector(__builtin_convertvector(pixels, Integers16), Floats16) * (2.0f / 255.0f) - 1.0f;
}

inline void convert16(const std::uint8_t* in, float* out) {
  const Floats16 values = unit16(in);
  std::memcpy(out, &values, 64);
}

// To the nearest, ties to even; there is no NaN among pixels.
inline void convert16(const std::uint8_t* in, bfloat16* out) {
  const Floats16 values = unit16(in);
  Bits16 bits;
  std::memcpy(&bits, &values, 64);
  const Halves16 halves = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves16);
  std::memcpy(out, &halves, 32);
}

// `exist` pixels of a run of `width`; 0, the middle of the range, behind them.
template <typename In, typename Out>
inline void read_run(const In* in, std::int64_t exist, std::int64_t width, Out* out) {
  std::int64_t i = 0;
  for (; i + 16 <= exist; i += 16) convert16(in + i, out + i);
  for (; i < exist; ++i) narrow(unit(in[i]), out[i]);
  if (i < width) std::memset(static_cast<void*>(out + i), 0, (width - i) * sizeof(Out));
}

}  // namespace vatt
