// Small matrix products C (+)= A B on the vector units, from packed operands in cache.
//
// A word is 32 bits: one fp32 (Single), or two neighbouring bf16 along the inner axis (Pairs), whose products one
// instruction sums in fp32. Everything below is written for words, so both formats share it. With K the inner length in words:
//   A        M rows of K words, `lda` words apart
//   B        panels of WIDTH columns: panel p holds K rows of WIDTH words, one after the other
//   C        fp32, M rows `ldc` apart
#pragma once

#include <algorithm>

#include "attention_vector.h"

namespace vatt::attention {

typedef uint32_t Word;

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;  // 24 of 32 registers accumulate
#else
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;  // 12 of 16
#endif
constexpr int WIDTH = TILE_VECTORS * LANES;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Single {
  static constexpr int depth = 1;  // elements in a word
  static Vector multiply_add(Vector c, Word a, Vector b) {
    float x;
    std::memcpy(&x, &a, 4);
    return x * b + c;
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int depth = 2;
  static Vector multiply_add(Vector c, Word a, Vector b) {
    return (Vector)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
  }
};
#endif

// Not inlined: among a caller's variables the accumulators would not all stay in registers.
template <class Format, int M, int V>
__attribute__((noinline)) void tile(const Word* a, int64_t lda, const Word* b, int64_t K, float* c, int64_t ldc,
                                    bool accumulate) {
  Vector sums[M][V] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vector columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = load_as<Vector>(b + k * WIDTH + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Word row = a[m * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][v] = Format::multiply_add(sums[m][v], row, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* at = c + m * ldc + v * LANES;
      store_as(at, accumulate ? load_as<Vector>(at) + sums[m][v] : sums[m][v]);
    }
}

// `rows` <= TILE_ROWS rows of C in `vectors` <= TILE_VECTORS vectors of one panel.
template <class Format, int V = TILE_VECTORS>
inline void tiles(int64_t rows, int64_t vectors, const Word* a, int64_t lda, const Word* b, int64_t K, float* c, int64_t ldc,
                  bool accumulate) {
  if constexpr (V > 1)
    if (vectors < V) {
      tiles<Format, V / 2>(rows, V / 2 < vectors ? V / 2 : vectors, a, lda, b, K, c, ldc, accumulate);
      if (vectors > V / 2)
        tiles<Format, V / 2>(rows, vectors - V / 2, a, lda, b + V / 2 * LANES, K, c + V / 2 * LANES, ldc, accumulate);
      return;
    }
  switch (rows) {
    case 6: return tile<Format, 6, V>(a, lda, b, K, c, ldc, accumulate);
    case 5: return tile<Format, 5, V>(a, lda, b, K, c, ldc, accumulate);
    case 4: return tile<Format, 4, V>(a, lda, b, K, c, ldc, accumulate);
    case 3: return tile<Format, 3, V>(a, lda, b, K, c, ldc, accumulate);
    case 2: return tile<Format, 2, V>(a, lda, b, K, c, ldc, accumulate);
    case 1: return tile<Format, 1, V>(a, lda, b, K, c, ldc, accumulate);
  }
}

// C (+)= A B for `vectors` * LANES columns. The inner axis is summed in runs, whose sums are then added: rounding errors of a
// long chain of additions grow with its length.
template <class Format>
inline void multiply(int64_t rows, int64_t vectors, const Word* a, int64_t lda, const Word* b, int64_t K, float* c,
                     int64_t ldc, bool accumulate) {
  constexpr int64_t RUN = 256;
  for (int64_t v = 0; v < vectors; v += TILE_VECTORS, b += K * WIDTH, c += WIDTH)
    for (int64_t r = 0; r < rows; r += TILE_ROWS)
      for (int64_t k = 0; k < K; k += RUN)
        tiles<Format>(std::min<int64_t>(rows - r, TILE_ROWS), std::min<int64_t>(vectors - v, TILE_VECTORS), a + r * lda + k, lda,
                      b + k * WIDTH, std::min(K - k, RUN), c + r * ldc, ldc, accumulate || k > 0);
}

// Rows of a packed tensor lie kilobytes apart, where no processor guesses the next one; what will be read is asked for in time.
template <class T>
inline void fetch_row(const T* x, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / (int64_t)sizeof(T)) __builtin_prefetch(x + d);
}
constexpr int64_t AHEAD = 16;

// Rows of D numbers, `stride` apart, as words along D; `padded` - n rows of zeros after them.
template <class Format, class T>
inline void pack_rows(const T* x, int64_t stride, int64_t n, int64_t padded, int64_t D, Word* to) {
  const int64_t K = D / Format::depth;
  for (int64_t i = 0; i < n; ++i) {
    fetch_row(x + (i + AHEAD) * stride, D);
    if constexpr (sizeof(T) * Format::depth == sizeof(Word))
      for (int64_t k = 0; k < K; k += LANES) store_as(to + i * K + k, load_as<Vector>(x + i * stride + k * Format::depth));
    else
      for (int64_t d = 0; d < D; d += LANES) store_as(to + i * K + d, widen(x + i * stride + d));
  }
  std::memset(to + n * K, 0, (padded - n) * K * sizeof(Word));
}

// The same rows as panels: words along n, columns along D, `K` >= ceil(n / depth) steps; what is missing is 0.
template <class Format, class T>
inline void pack_panels(const T* x, int64_t stride, int64_t n, int64_t K, int64_t D, Word* to) {
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t i = 0; i < Format::depth; ++i) fetch_row(x + (k * Format::depth + i + AHEAD) * stride, D);
    for (int64_t d = 0; d < D; d += LANES) {
      Word* at = to + d / WIDTH * K * WIDTH + k * WIDTH + d % WIDTH;
      if constexpr (Format::depth == 1) {
        store_as(at, k < n ? widen(x + k * stride + d) : Vector{});
      } else {
        const Vector low = 2 * k < n ? widen(x + 2 * k * stride + d) : Vector{};
        const Vector high = 2 * k + 1 < n ? widen(x + (2 * k + 1) * stride + d) : Vector{};
        store_as(at, (Bits)low >> 16 | (Bits)high);
      }
    }
  }
}

// A matrix of words, `n` rows of K columns `ld` apart (K a multiple of LANES), transposed: put(i, k, v) gets column k of the
// rows i to i + LANES - 1. Rows from n to the next multiple of LANES are zeros.
template <class Put>
inline void transpose(const Word* rows, int64_t ld, int64_t n, int64_t K, Put put) {
  for (int64_t i = 0; i < n; i += LANES)
    for (int64_t k = 0; k < K; k += LANES) {
      Bits square[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) square[r] = i + r < n ? load_as<Bits>(rows + (i + r) * ld + k) : Bits{};
      transpose(square);
#pragma GCC unroll 16
      for (int c = 0; c < LANES; ++c) put(i, k + c, square[c]);
    }
}

// Packed rows (pack_rows) of D numbers as panels with words along D and the rows as columns: the right-hand side of x rows^T.
template <class Format>
inline void transpose_rows(const Word* rows, int64_t n, int64_t D, Word* panels) {
  const int64_t K = D / Format::depth;
  transpose(rows, K, n, K, [=](int64_t i, int64_t k, Bits words) {
    store_as(panels + i / WIDTH * K * WIDTH + k * WIDTH + i % WIDTH, words);
  });
}

// Panels (pack_panels) as D rows of K words, words along n: the left-hand side of x^T y. K is a multiple of LANES.
inline void transpose_panels(const Word* panels, int64_t K, int64_t D, Word* rows) {
  for (int64_t d = 0; d < D; d += WIDTH)
    transpose(panels + d * K, WIDTH, K, D - d < WIDTH ? D - d : WIDTH,
              [=](int64_t k, int64_t c, Bits words) { store_as(rows + (d + c) * K + k, words); });
}

}  // namespace vatt::attention
