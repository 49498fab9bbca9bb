// Gradients of attention from the log-sum-exp of its rows. With P the weights, S the scores and row(x) the sum over D:
//
//     dV = (M P)^T dO     dP = M (dO V^T)     dS = P (dP - row(dO O))     dQ = scale dS K     dK = scale dS^T Q
//
// where M, if there is dropout, is 0 or 1 / (1 - rate) for each weight.
// (Dao et al., "FlashAttention", 2022, appendix B.) A head is one unit of work, so nothing is summed across threads and the
// result is the same for any number of them. Scores are computed as S^T = K Q^T, keys in rows: P^T and dS^T then are the
// left-hand sides of dV and dK as they stand, and dS^T is the right-hand side of dQ^T = K^T dS^T.
#pragma once

#include "attention_dropout.h"

namespace vatt::attention {

template <class T, class Format>
class Backward {
 public:
  struct Inputs {
    Tokens<const T> q, k, v, out, grad;
    const float* lse;  // (B, H, N), as forward left it
    Bias bias;
    Dropout dropout;
    float scale;
  };
  struct Outputs {
    Tokens<T> q, k, v;
    float* bias;  // (B, H, N, N), or null
  };

  Backward(Shape shape, Inputs inputs, Outputs outputs) : shape_(shape), in_(inputs), out_(outputs) {}

  int64_t units() const { return shape_.B * shape_.H; }
  int64_t scratch() const { return Memory(nullptr, shape_).bytes; }

  void run(int64_t first, int64_t last, void* scratch) const {
    const Memory memory(scratch, shape_);
    for (int64_t unit = first; unit < last; ++unit) head(memory, unit / shape_.H, unit % shape_.H);
  }

 private:
  static constexpr int64_t depth = Format::depth;
  static constexpr int64_t LONGEST = depth == 2 ? 512 : 384;  // queries of a piece; with a block of keys they fit the L2 cache
  static constexpr int64_t KEYS = 48;                         // keys of a block: whole strips, whole words, whole vectors
  static_assert(KEYS % TILE_ROWS == 0 && KEYS % depth == 0 && TILE_ROWS % depth == 0);

  static constexpr int64_t KEPT = round_up(KEYS, 4 * LANES);  // drawn for a block of keys

  struct Memory {
    int64_t piece, keys, ldk, ldp;
    Word *k_rows, *v_rows, *k_columns, *q_panels, *do_panels, *q_inner, *do_inner, *p_rows, *ds_rows, *ds_panels, *packing;
    float *lse, *delta, *dk, *dv, *dq_columns, *kept, *kept_rows;
    int64_t bytes;

    Memory(void* base, Shape shape) : piece(attention::piece(shape.N, LONGEST)), keys(round_up(shape.N, KEYS)) {
      const int64_t D = shape.D, columns = round_up(D, WIDTH);
      ldk = round_up(keys / depth, LANES), ldp = piece / depth + LANES;
      Arena arena(base);
      k_rows = arena.take<Word>(keys * D / depth), v_rows = arena.take<Word>(keys * D / depth);
      k_columns = arena.take<Word>(columns * ldk);
      q_panels = arena.take<Word>(piece * D / depth), do_panels = arena.take<Word>(piece * D / depth);
      q_inner = arena.take<Word>(piece / depth * columns), do_inner = arena.take<Word>(piece / depth * columns);
      p_rows = arena.take<Word>(TILE_ROWS * ldp), ds_rows = arena.take<Word>(TILE_ROWS * ldp);
      ds_panels = arena.take<Word>(KEYS / depth * piece);
      packing = arena.take<Word>(ldk * columns > piece * D / depth ? ldk * columns : piece * D / depth);
      lse = arena.take<float>(piece), delta = arena.take<float>(piece);
      dk = arena.take<float>(keys * D), dv = arena.take<float>(keys * D);
      dq_columns = arena.take<float>(D * piece);
      kept = arena.take<float>(KEYS * piece), kept_rows = arena.take<float>(LANES * KEPT);
      bytes = arena.used();
    }
  };

  void head(const Memory& memory, int64_t b, int64_t h) const {
    const int64_t N = shape_.N, D = shape_.D;
    pack_rows<Format>(in_.k.at(b, h), in_.k.row, N, memory.keys, D, memory.k_rows);
    pack_rows<Format>(in_.v.at(b, h), in_.v.row, N, memory.keys, D, memory.v_rows);
    pack_panels<Format>(in_.k.at(b, h), in_.k.row, N, memory.ldk, D, memory.packing);
    transpose_panels(memory.packing, memory.ldk, D, memory.k_columns);
    for (int64_t q0 = 0; q0 < N; q0 += memory.piece) {
      const int64_t queries = N - q0 < memory.piece ? N - q0 : memory.piece;
      pack_queries(memory, b, h, q0, queries);
      if (in_.bias.data || shape_.N <= KEYS) sum_delta(memory, b, h, q0, queries);
      for (int64_t k0 = 0; k0 < N; k0 += KEYS) {
        if (in_.dropout.on()) draw(memory, b, h, q0, queries, k0);
        for (int64_t r = 0; r < KEYS && k0 + r < N; r += TILE_ROWS) strip(memory, b, h, q0, queries, k0, r);
        const int64_t inner = ceil_div(round_up(N - k0 < KEYS ? N - k0 : KEYS, TILE_ROWS), depth);
        for (int64_t q = 0; q < queries; q += WIDTH)
          multiply<Format>(D, ceil_div(queries - q < WIDTH ? queries - q : WIDTH, LANES), memory.k_columns + k0 / depth,
                           memory.ldk, memory.ds_panels + q * (KEYS / depth), inner, memory.dq_columns + q, memory.piece,
                           k0 > 0);
      }
      write_queries(memory, b, h, q0, queries);
    }
    write(out_.k.at(b, h), out_.k.row, memory.dk, in_.scale);
    write(out_.v.at(b, h), out_.v.row, memory.dv, 1.0f);
  }

  void pack_queries(const Memory& memory, int64_t b, int64_t h, int64_t q0, int64_t queries) const {
    const int64_t D = shape_.D, inner = ceil_div(queries, depth);
    const T *q = in_.q.at(b, h) + q0 * in_.q.row, *grad = in_.grad.at(b, h) + q0 * in_.grad.row;
    const T* out = in_.out.at(b, h) + q0 * in_.out.row;
    pack_rows<Format>(q, in_.q.row, queries, queries, D, memory.packing);
    transpose_rows<Format>(memory.packing, queries, D, memory.q_panels);
    pack_rows<Format>(grad, in_.grad.row, queries, queries, D, memory.packing);
    transpose_rows<Format>(memory.packing, queries, D, memory.do_panels);
    pack_panels<Format>(q, in_.q.row, queries, inner, D, memory.q_inner);
    pack_panels<Format>(grad, in_.grad.row, queries, inner, D, memory.do_inner);
    const float* lse = in_.lse + (b * shape_.H + h) * shape_.N + q0;
    for (int64_t i = 0; i < round_up(queries, LANES); ++i) {
      // A query that is only padding has weights 2^-inf.
      memory.lse[i] = i < queries ? lse[i] : __builtin_inff();
      Vector dot{};
      fetch_row(out + (i + AHEAD) * in_.out.row, D);
      if (i < queries)
        for (int64_t d = 0; d < D; d += LANES) dot += widen(grad + i * in_.grad.row + d) * widen(out + i * in_.out.row + d);
      memory.delta[i] = sum(dot);
    }
  }

  // The dropout of a block of keys, one key's queries after the other's: drawn query by query, as the counter runs, and turned.
  void draw(const Memory& memory, int64_t b, int64_t h, int64_t q0, int64_t queries, int64_t k0) const {
    const int64_t keys = std::min(KEYS, shape_.N - k0);
    for (int64_t q = 0; q < queries; q += LANES) {
      const int64_t n = std::min<int64_t>(LANES, queries - q);
      for (int64_t i = 0; i < n; ++i) in_.dropout.draw(shape_, b, h, q0 + q + i, k0, keys, memory.kept_rows + i * KEPT);
      transpose(reinterpret_cast<const Word*>(memory.kept_rows), KEPT, n, round_up(keys, LANES),
                [&](int64_t, int64_t k, Bits words) { store_as(memory.kept + k * memory.piece + q, words); });
    }
  }

  struct Tiles {
    alignas(64) float scores[TILE_ROWS][WIDTH], dp[TILE_ROWS][WIDTH];
    int64_t vectors;
    float factor;  // of the scores, for the exponent of 2
  };

  // S^T and dO V^T of TILE_ROWS keys, `rows` of them real, and up to WIDTH queries.
  void multiply_tiles(const Memory& memory, int64_t b, int64_t h, int64_t query, int64_t left, const Word* q_panel,
                      const Word* do_panel, int64_t key, int64_t rows, Tiles& tiles) const {
    const int64_t K = shape_.D / depth;
    tiles.vectors = ceil_div(std::min<int64_t>(left, WIDTH), LANES);
    multiply<Format>(TILE_ROWS, tiles.vectors, memory.k_rows + key * K, K, q_panel, K, tiles.scores[0], WIDTH, false);
    multiply<Format>(TILE_ROWS, tiles.vectors, memory.v_rows + key * K, K, do_panel, K, tiles.dp[0], WIDTH, false);
    tiles.factor = in_.scale * LOG2E;
    if (in_.bias.data) {
      add_bias(tiles.scores, b, h, query, left, key, rows, tiles.factor);
      tiles.factor = 1.0f;
    }
  }

  // row(P dP), the same as row(dO O) but for rounding: where a query sees one key, or few, dS is 0, or small, by cancellation.
  // It takes two products more, so it is for a bias (which may hide keys) and for short sequences.
  void sum_delta(const Memory& memory, int64_t b, int64_t h, int64_t q0, int64_t queries) const {
    const int64_t K = shape_.D / depth;
    std::fill(memory.delta, memory.delta + round_up(queries, LANES), 0.0f);
    for (int64_t key = 0; key < shape_.N; key += TILE_ROWS) {
      if (in_.dropout.on() && key % KEYS == 0) draw(memory, b, h, q0, queries, key);
      const int64_t rows = std::min<int64_t>(TILE_ROWS, shape_.N - key);
      for (int64_t q = 0; q < queries; q += WIDTH) {
        Tiles tiles;
        multiply_tiles(memory, b, h, q0 + q, queries - q, memory.q_panels + q * K, memory.do_panels + q * K, key, rows, tiles);
        for (int64_t c = 0; c < tiles.vectors * LANES; c += LANES) {
          const Vector lse = load_as<Vector>(memory.lse + q + c);
          Vector delta = load_as<Vector>(memory.delta + q + c);
          for (int64_t i = 0; i < rows; ++i) {
            Vector dp = load_as<Vector>(tiles.dp[i] + c);
            if (in_.dropout.on()) dp *= load_as<Vector>(memory.kept + (key % KEYS + i) * memory.piece + q + c);
            delta += exp2(load_as<Vector>(tiles.scores[i] + c) * tiles.factor - lse) * dp;
          }
          store_as(memory.delta + q + c, delta);
        }
      }
    }
  }

  // TILE_ROWS keys against all queries of the piece: dV and dK of the strip, and its rows of dS^T for dQ.
  void strip(const Memory& memory, int64_t b, int64_t h, int64_t q0, int64_t queries, int64_t k0, int64_t r) const {
    const int64_t D = shape_.D, K = D / depth, key = k0 + r, inner = ceil_div(queries, depth);
    const int64_t rows = std::min<int64_t>(TILE_ROWS, shape_.N - key);
    for (int64_t q = 0; q < queries; q += WIDTH) {
      Tiles tiles;
      multiply_tiles(memory, b, h, q0 + q, queries - q, memory.q_panels + q * K, memory.do_panels + q * K, key, rows, tiles);
      Word* panel = memory.ds_panels + q * (KEYS / depth) + r / depth * WIDTH;
      for (int64_t c = 0; c < tiles.vectors * LANES; c += LANES) {
        const Vector lse = load_as<Vector>(memory.lse + q + c), delta = load_as<Vector>(memory.delta + q + c);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i += depth) {
          Bits words{};
#pragma GCC unroll 2
          for (int j = i; j < i + depth; ++j) {
            Vector p{}, ds{};  // a key that is only padding
            if (j < rows) {
              p = exp2(load_as<Vector>(tiles.scores[j] + c) * tiles.factor - lse);
              ds = load_as<Vector>(tiles.dp[j] + c);
              if (in_.dropout.on()) {
                const Vector kept = load_as<Vector>(memory.kept + (r + j) * memory.piece + q + c);
                ds = p * (ds * kept - delta);
                p *= kept;
              } else {
                ds = p * (ds - delta);
              }
            }
            if (out_.bias) store_as(tiles.dp[j] + c, ds);
            if constexpr (depth == 1) {
              store_as(memory.p_rows + j * memory.ldp + q + c, p);
              store_as(memory.ds_rows + j * memory.ldp + q + c, ds);
              words = (Bits)ds;
            } else {
              narrow(reinterpret_cast<BFloat16*>(memory.p_rows + j * memory.ldp) + q + c, p);
              const Bits half = rounded(ds);
              store_as(reinterpret_cast<BFloat16*>(memory.ds_rows + j * memory.ldp) + q + c, __builtin_convertvector(half, Halves));
              words |= half << (16 * (j - i));
            }
          }
          store_as(panel + i / depth * WIDTH + c, words);
        }
      }
      if (out_.bias) write_bias(tiles.dp, b, h, q0 + q, queries - q, key, rows);
    }
    const bool more = q0 > 0;
    multiply<Format>(rows, D / LANES, memory.p_rows, memory.ldp, memory.do_inner, inner, memory.dv + key * D, D, more);
    multiply<Format>(rows, D / LANES, memory.ds_rows, memory.ldp, memory.q_inner, inner, memory.dk + key * D, D, more);
  }

  void add_bias(float (&scores)[TILE_ROWS][WIDTH], int64_t b, int64_t h, int64_t query, int64_t left, int64_t key, int64_t rows,
                float factor) const {
    const Bias& bias = in_.bias;
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = bias.at(b, h) + query * bias.query + (key + i) * bias.key;
      for (int64_t c = 0; c < WIDTH && c < left; ++c) scores[i][c] = scores[i][c] * factor + from[c * bias.query] * LOG2E;
    }
  }

  void write_bias(const float (&ds)[TILE_ROWS][WIDTH], int64_t b, int64_t h, int64_t query, int64_t left, int64_t key,
                  int64_t rows) const {
    const int64_t N = shape_.N;
    float* to = out_.bias + ((b * shape_.H + h) * N + query) * N + key;
    for (int64_t c = 0; c < WIDTH && c < left; ++c)
      for (int64_t i = 0; i < rows; ++i) to[c * N + i] = ds[i][c];
  }

  void write_queries(const Memory& memory, int64_t b, int64_t h, int64_t q0, int64_t queries) const {
    T* to = out_.q.at(b, h) + q0 * out_.q.row;
    const Word* columns = reinterpret_cast<const Word*>(memory.dq_columns);
    for (int64_t i = 0; i < queries; i += LANES)
      transpose(columns + i, memory.piece, shape_.D, LANES, [&](int64_t d, int64_t c, Bits words) {
        if (i + c < queries) narrow(to + (i + c) * out_.q.row + d, (Vector)words * in_.scale);
      });
  }

  void write(T* to, int64_t row, const float* from, float factor) const {
    for (int64_t i = 0; i < shape_.N; ++i)
      for (int64_t d = 0; d < shape_.D; d += LANES)
        narrow(to + i * row + d, load_as<Vector>(from + i * shape_.D + d) * factor);
  }

  Shape shape_;
  Inputs in_;
  Outputs out_;
};

}  // namespace vatt::attention
