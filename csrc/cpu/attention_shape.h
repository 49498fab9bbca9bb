// What forward and backward of attention are given, and how their scratch memory is cut up.
//
// B samples, H heads, N tokens, D features of a head.
#pragma once

#include "attention_products.h"

namespace vatt::attention {

constexpr float LOG2E = 1.44269504f;

struct Shape {
  int64_t B, H, N, D;
};

// A tensor (B, N, H, D) whose last axis is contiguous, by its strides in elements.
template <class T>
struct Tokens {
  T* data;
  int64_t batch, row, head;
  T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// What is added to the scaled scores: fp32, broadcast to (B, H, N, N) by strides of 0; no bias when data is null.
struct Bias {
  const float* data;
  int64_t batch, head, query, key;
  const float* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// Cuts one thread's memory into arrays of 64-byte alignment; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * sizeof(T), 64);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// `n` tokens in pieces of equal length, a multiple of WIDTH and at most `longest`.
constexpr int64_t piece(int64_t n, int64_t longest) { return round_up(ceil_div(n, ceil_div(n, longest)), WIDTH); }

}  // namespace vatt::attention
