// The counter of `vatt.kernels.counter`: Philox 4x32 with seven rounds, for many positions at once.
#pragma once

#include <cstdint>

namespace vatt {

// Everything of a counter but its position; the key is the seed's low and high word.
struct Draw {
  std::uint32_t sample, step, stream, low, high;
};

constexpr int ROUNDS = 7;
// Positions drawn at a time: their words stay in the first level of cache.
constexpr std::int64_t BLOCK = 256;

inline void philox(std::uint32_t position, const Draw& draw, std::uint32_t& w0, std::uint32_t& w1, std::uint32_t& w2,
                   std::uint32_t& w3) {
  std::uint32_t c0 = position, c1 = draw.sample, c2 = draw.step, c3 = draw.stream, k0 = draw.low, k1 = draw.high;
#pragma GCC unroll 8
  for (int round = 0; round < ROUNDS; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<std::uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  w0 = c0, w1 = c1, w2 = c2, w3 = c3;
}

// Word j of position `first` + i into words[4 i + j], for the BLOCK positions from `first`.
inline void draw_block(std::uint32_t first, const Draw& draw, std::uint32_t* __restrict words) {
  for (std::int64_t i = 0; i < BLOCK; ++i)
    philox(first + static_cast<std::uint32_t>(i), draw, words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
}

}  // namespace vatt
