// GELU(x + bias) in its exact (erf) form and its derivative, over rows [first, last).
#pragma once

#include <cstdint>
#include <vector>

#include "numbers.h"

namespace vatt {

struct Normal {
  float distribution;  // Phi(z)
  float density;       // phi(z)
};

// Abramowitz and Stegun 7.1.26: erfc(x) = (a1 t + ... + a5 t^5) e^(-x^2) with t = 1 / (1 + p x), off by less than 1.5e-7;
// x = |z| / sqrt 2. The same exponential gives the density, so a derivative costs one.
inline Normal normal(float z) {
  const float x = std::fabs(z) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * x);
  const float e = exp_nonpositive(-x * x);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * e;  // Phi(-|z|)
  return {z > 0.0f ? 1.0f - tail : tail, 0.39894228f * e};
}

// The bias in fp32; zeros where there is none.
template <typename Element>
std::vector<float> widened_bias(const Element* bias, std::int64_t columns) {
  std::vector<float> wide(columns);
  for (std::int64_t c = 0; c < columns; ++c) wide[c] = bias ? widen(bias[c]) : 0.0f;
  return wide;
}

template <typename Element>
void bias_gelu_forward(const Element* x, const float* bias, Element* y, std::int64_t first, std::int64_t last,
                       std::int64_t columns) {
  for (std::int64_t row = first; row < last; ++row) {
    const Element* __restrict in = x + row * columns;
    Element* __restrict out = y + row * columns;
    for (std::int64_t c = 0; c < columns; ++c) {
      const float z = widen(in[c]) + bias[c];
      narrow(z * normal(z).distribution, out[c]);
    }
  }
}

// dx = grad * GELU'(x + bias); into `sum` (columns) the sum of dx over the rows.
template <typename Element>
void bias_gelu_backward(const Element* grad, const Element* x, const float* bias, Element* dx, float* __restrict sum,
                        std::int64_t first, std::int64_t last, std::int64_t columns) {
  for (std::int64_t c = 0; c < columns; ++c) sum[c] = 0.0f;
  for (std::int64_t row = first; row < last; ++row) {
    const Element* __restrict in = x + row * columns;
    const Element* __restrict dy = grad + row * columns;
    Element* __restrict out = dx + row * columns;
    for (std::int64_t c = 0; c < columns; ++c) {
      const float z = widen(in[c]) + bias[c];
      const Normal n = normal(z);
      const float dz = widen(dy[c]) * (n.distribution + z * n.density);
      narrow(dz, out[c]);
      sum[c] += dz;
    }
  }
}

}  // namespace vatt
