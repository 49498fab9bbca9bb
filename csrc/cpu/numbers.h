// fp32 arithmetic that a compiler can turn into vector instructions: bf16 conversions, exp, and what is built on it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace vatt {

struct bfloat16 {
  std::uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void narrow(float value, float& out) { out = value; }
// To the nearest, ties to even; a NaN stays one.
inline void narrow(float value, bfloat16& out) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (bits >> 16) | 0x40u;
  out.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// e^x for x <= 0, 1.2 units in the last place; below -87 the result is e^-87, which is as good as 0 here.
inline float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.98756915e-4f;
  p = p * r + 1.39819994e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.0e-1f;
  p = p * (r * r) + r + 1.0f;
  const std::int32_t exponent = (static_cast<std::int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, 4);
  return p * scale;
}

}  // namespace vatt
