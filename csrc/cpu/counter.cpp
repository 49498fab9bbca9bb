// `vatt_native::words`, `keep_mask` and `dropout` on a CPU: threads around philox.h.
//
// B samples of `rows` rows of `columns` elements, contiguous; which word an element takes is said in `vatt.kernels.dropout`.
// The Python side has checked dtypes and shapes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "numbers.h"
#include "philox.h"

namespace vatt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::int64_t scalar(const Tensor& x) { return *static_cast<const std::int64_t*>(x.const_data_ptr()); }

// Calls work(first element of x, count, words of these elements) for every run of elements, over all threads.
template <typename Work>
void for_words(std::int64_t elements, std::int64_t columns, const Tensor& seed, const Tensor& step, const Tensor& sample_id,
               std::int64_t stream, const Work& work) {
  const std::int64_t samples = sample_id.numel();
  if (elements == 0) return;
  const std::int64_t* ids = static_cast<const std::int64_t*>(sample_id.const_data_ptr());
  const std::uint64_t key = static_cast<std::uint64_t>(scalar(seed));
  const Draw base{0, static_cast<std::uint32_t>(scalar(step)), static_cast<std::uint32_t>(stream),
                  static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)};
  // Where four divides the columns, the rows of a sample follow each other in the counter too: one long row.
  const std::int64_t width = columns % 4 == 0 ? elements / samples : columns, rows = elements / samples / width;
  const std::int64_t groups = (width + 3) / 4, blocks = (groups + BLOCK - 1) / BLOCK;
  torch::stable::parallel_for(0, samples * rows * blocks, std::max<std::int64_t>(1, 16 / blocks), [&](std::int64_t begin, std::int64_t end) {
    alignas(64) std::uint32_t words[4 * BLOCK];
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t block = unit % blocks, row = unit / blocks;  // row: over all samples
      Draw draw = base;
      draw.sample = static_cast<std::uint32_t>(ids[row / rows]);
      draw_block(static_cast<std::uint32_t>(row % rows * groups + block * BLOCK), draw, words);
      const std::int64_t column = 4 * BLOCK * block;
      work(row * width + column, std::min(4 * BLOCK, width - column), static_cast<const std::uint32_t*>(words));
    }
  });
}

// int64 (B, count): the words of each sample, from position 0.
Tensor words(const Tensor& seed, const Tensor& step, const Tensor& sample_id, std::int64_t stream, std::int64_t count) {
  Tensor out = torch::stable::new_empty(sample_id, {sample_id.numel(), count}, ScalarType::Long);
  std::int64_t* to = static_cast<std::int64_t*>(out.mutable_data_ptr());
  for_words(out.numel(), count, seed, step, sample_id, stream,
            [&](std::int64_t at, std::int64_t n, const std::uint32_t* drawn) {
              for (std::int64_t i = 0; i < n; ++i) to[at + i] = drawn[i];
            });
  return out;
}

Tensor keep_mask(torch::headeronly::IntHeaderOnlyArrayRef shape, std::int64_t threshold, const Tensor& seed, const Tensor& step,
                 const Tensor& sample_id, std::int64_t stream) {
  Tensor mask = torch::stable::new_empty(sample_id, shape, ScalarType::Bool);
  std::uint8_t* to = static_cast<std::uint8_t*>(mask.mutable_data_ptr());
  const std::uint32_t least = static_cast<std::uint32_t>(threshold);
  for_words(mask.numel(), shape[shape.size() - 1], seed, step, sample_id, stream,
            [&](std::int64_t at, std::int64_t n, const std::uint32_t* drawn) {
              for (std::int64_t i = 0; i < n; ++i) to[at + i] = drawn[i] >= least;
            });
  return mask;
}

// x where it is kept, over the rate of keeping; elsewhere x times 0, so that a NaN is not lost.
template <typename Element>
void drop(const Tensor& x, Tensor& y, float kept, std::uint32_t least, const Tensor& seed, const Tensor& step,
          const Tensor& sample_id, std::int64_t stream) {
  const Element* from = static_cast<const Element*>(x.const_data_ptr());
  Element* to = static_cast<Element*>(y.mutable_data_ptr());
  for_words(x.numel(), x.size(x.dim() - 1), seed, step, sample_id, stream,
            [=](std::int64_t at, std::int64_t n, const std::uint32_t* __restrict drawn) {
              const Element* __restrict in = from + at;
              Element* __restrict out = to + at;
              for (std::int64_t i = 0; i < n; ++i) narrow(widen(in[i]) * (drawn[i] >= least ? 1.0f : 0.0f) / kept, out[i]);
            });
}

Tensor dropout(const Tensor& x, double rate, std::int64_t threshold, const Tensor& seed, const Tensor& step,
               const Tensor& sample_id, std::int64_t stream) {
  Tensor y = torch::stable::empty_like(x);
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? &drop<bfloat16> : &drop<float>;
  run(x, y, static_cast<float>(1.0 - rate), static_cast<std::uint32_t>(threshold), seed, step, sample_id, stream);
  return y;
}

}  // namespace
}  // namespace vatt

STABLE_TORCH_LIBRARY_FRAGMENT(vatt_native, m) {
  m.def("words(Tensor seed, Tensor step, Tensor sample_id, int stream, int count) -> Tensor");
  m.def("keep_mask(int[] shape, int threshold, Tensor seed, Tensor step, Tensor sample_id, int stream) -> Tensor");
  m.def("dropout(Tensor x, float rate, int threshold, Tensor seed, Tensor step, Tensor sample_id, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vatt_native, CPU, m) {
  m.impl("words", TORCH_BOX(&vatt::words));
  m.impl("keep_mask", TORCH_BOX(&vatt::keep_mask));
  m.impl("dropout", TORCH_BOX(&vatt::dropout));
}
