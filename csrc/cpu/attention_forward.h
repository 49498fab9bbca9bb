// out = Dropout(softmax(scale q k^T + bias)) v, and the log2 of the sum of e^score of each row for backward.
//
// A head's keys and values are packed once. Then TILE_ROWS queries at a time meet a piece of the keys: their scores stay in the
// first-level cache until they are probabilities and multiplied with the values. Sequences longer than a piece carry the row's
// maximum and sum along (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
#pragma once

#include "attention_dropout.h"

namespace vatt::attention {

template <class T, class Format>
class Forward {
 public:
  static constexpr int64_t QUERIES = 16 * TILE_ROWS;  // a unit of work: so many queries of one head

  struct Inputs {
    Tokens<const T> q, k, v;
    Bias bias;
    Dropout dropout;
    float scale;
  };

  // lse is (B, H, N).
  Forward(Shape shape, Inputs inputs, Tokens<T> out, float* lse) : shape_(shape), in_(inputs), out_(out), lse_(lse) {}

  int64_t blocks() const { return ceil_div(shape_.N, QUERIES); }
  int64_t units() const { return shape_.B * shape_.H * blocks(); }

  int64_t scratch() const { return Memory(nullptr, shape_).bytes; }

  // Units first to last - 1 in order, in `scratch()` bytes of memory. A unit's results do not depend on the range it is in.
  void run(int64_t first, int64_t last, void* scratch) const {
    const Memory memory(scratch, shape_);
    int64_t packed = -1;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t head = unit / blocks(), b = head / shape_.H, h = head % shape_.H;
      if (head != packed) pack(memory, b, h);
      packed = head;
      const int64_t q0 = unit % blocks() * QUERIES;
      attend(memory, b, h, q0, shape_.N - q0 < QUERIES ? shape_.N - q0 : QUERIES);
    }
  }

 private:
  static constexpr int64_t LONGEST = 1024;  // keys and values of a piece fit the second-level cache at D = 64

  struct Memory {
    int64_t piece, lds;
    Word *queries, *keys, *values, *weights;
    float *scores, *sums, *maximum, *total, *kept;
    int64_t bytes;

    Memory(void* base, Shape shape) : piece(attention::piece(shape.N, LONGEST)) {
      const int64_t keys_padded = ceil_div(shape.N, piece) * piece, columns = round_up(shape.D, WIDTH);
      lds = piece + LANES;  // rows of scores do not fall onto the same cache sets
      Arena arena(base);
      queries = arena.take<Word>(QUERIES * shape.D / Format::depth);
      keys = arena.take<Word>(keys_padded * shape.D / Format::depth);
      values = arena.take<Word>(keys_padded / Format::depth * columns);
      scores = arena.take<float>(TILE_ROWS * lds);
      weights = Format::depth == 1 ? reinterpret_cast<Word*>(scores) : arena.take<Word>(TILE_ROWS * lds / Format::depth);
      sums = arena.take<float>(QUERIES * shape.D);
      maximum = arena.take<float>(QUERIES);
      total = arena.take<float>(QUERIES);
      kept = arena.take<float>(piece + 4 * LANES);
      bytes = arena.used();
    }
  };

  void pack(const Memory& memory, int64_t b, int64_t h) const {
    const int64_t N = shape_.N, D = shape_.D;
    for (int64_t i = 0; i < N; i += WIDTH) {  // through a panel's rows
      const int64_t n = N - i < WIDTH ? N - i : WIDTH;
      Word rows[WIDTH * 128];
      pack_rows<Format>(in_.k.at(b, h) + i * in_.k.row, in_.k.row, n, n, D, rows);
      transpose_rows<Format>(rows, n, D, memory.keys + i * D / Format::depth);
    }
    for (int64_t i = 0; i < N; i += memory.piece) {
      const int64_t n = N - i < memory.piece ? N - i : memory.piece;
      pack_panels<Format>(in_.v.at(b, h) + i * in_.v.row, in_.v.row, n, ceil_div(n, Format::depth), D,
                          memory.values + i / Format::depth * round_up(D, WIDTH));
    }
  }

  void attend(const Memory& memory, int64_t b, int64_t h, int64_t q0, int64_t queries) const {
    const int64_t N = shape_.N, D = shape_.D;
    pack_rows<Format>(in_.q.at(b, h) + q0 * in_.q.row, in_.q.row, queries, queries, D, memory.queries);
    for (int64_t i = 0; i < queries; ++i) memory.maximum[i] = -__builtin_inff(), memory.total[i] = 0.0f;
    for (int64_t k0 = 0; k0 < N; k0 += memory.piece) {
      const int64_t keys = N - k0 < memory.piece ? N - k0 : memory.piece;
      const Word* panels = memory.values + k0 / Format::depth * round_up(D, WIDTH);
      for (int64_t r = 0; r < queries; r += TILE_ROWS) {
        const int64_t rows = queries - r < TILE_ROWS ? queries - r : TILE_ROWS;
        multiply<Format>(rows, ceil_div(keys, LANES), memory.queries + r * D / Format::depth, D / Format::depth,
                         memory.keys + k0 * D / Format::depth, D / Format::depth, memory.scores, memory.lds, false);
        for (int64_t i = 0; i < rows; ++i) soften(memory, b, h, q0, r, i, k0, keys);
        multiply<Format>(rows, D / LANES, memory.weights, memory.lds / Format::depth, panels, ceil_div(keys, Format::depth),
                         memory.sums + r * D, D, k0 > 0);
      }
    }
    for (int64_t i = 0; i < queries; ++i) {
      const float share = 1.0f / memory.total[i];
      for (int64_t d = 0; d < D; d += LANES)
        narrow(out_.at(b, h) + (q0 + i) * out_.row + d, load_as<Vector>(memory.sums + i * D + d) * share);
      lse_[(b * shape_.H + h) * N + q0 + i] = memory.maximum[i] + __builtin_log2f(memory.total[i]);
    }
  }

  // Row i of a strip: its scores become weights 2^(score - maximum), zeros behind the last key.
  void soften(const Memory& memory, int64_t b, int64_t h, int64_t q0, int64_t r, int64_t i, int64_t k0, int64_t keys) const {
    float* scores = memory.scores + i * memory.lds;
    float factor = in_.scale * LOG2E;
    if (in_.bias.data) {
      const float* bias = in_.bias.at(b, h) + (q0 + r + i) * in_.bias.query + k0 * in_.bias.key;
      for (int64_t k = 0; k < keys; ++k) scores[k] = scores[k] * factor + bias[k * in_.bias.key] * LOG2E;
      factor = 1.0f;
    }
    const float before = memory.maximum[r + i], none = -__builtin_inff();
    const int64_t full = keys / LANES * LANES, rest = keys - full;
    Vector high = broadcast(before);
    for (int64_t k = 0; k < full; k += LANES) high = larger(high, load_as<Vector>(scores + k) * factor);
    if (rest) high = larger(high, first_lanes(load_as<Vector>(scores + full) * factor, rest, none));
    const float maximum = largest(high);
    Vector total{};
    if (in_.dropout.on()) in_.dropout.draw(shape_, b, h, q0 + r + i, k0, keys, memory.kept);
    const auto weigh = [&](Vector score, int64_t k) {
      Vector weight = exp2(score);
      total += weight;
      if (in_.dropout.on()) weight *= load_as<Vector>(memory.kept + k);
      if constexpr (Format::depth == 1)
        store_as(scores + k, weight);
      else
        narrow(reinterpret_cast<BFloat16*>(memory.weights + i * memory.lds / Format::depth) + k, weight);
    };
    for (int64_t k = 0; k < full; k += LANES) weigh(load_as<Vector>(scores + k) * factor - maximum, k);
    if (rest) weigh(first_lanes(load_as<Vector>(scores + full) * factor - maximum, rest, none), full);
    const float shrink = exp2(broadcast(before - maximum))[0];
    memory.maximum[r + i] = maximum;
    memory.total[r + i] = memory.total[r + i] * shrink + sum(total);
    if (k0 > 0)
      for (int64_t d = 0; d < shape_.D; d += LANES) {
        float* at = memory.sums + (r + i) * shape_.D + d;
        store_as(at, load_as<Vector>(at) * shrink);
      }
  }

  Shape shape_;
  Inputs in_;
  Tokens<T> out_;
  float* lse_;
};

}  // namespace vatt::attention
