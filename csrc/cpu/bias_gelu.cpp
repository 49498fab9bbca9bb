// `vatt_native::bias_gelu` and its backward on a CPU: threads around bias_gelu.h.
//
// x is contiguous, its last axis as long as the bias, fp32 or bf16; the Python side has checked that.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bias_gelu.h"

namespace vatt {
namespace {

using torch::stable::Tensor;

// Rows one partial sum of the bias gradient covers: a constant, so that the sum is the same for any number of threads.
constexpr std::int64_t ROWS = 64;

template <typename Work>
void for_element(const Tensor& x, const Work& work) {
  if (x.scalar_type() == torch::headeronly::ScalarType::BFloat16)
    work(bfloat16{});
  else
    work(float{});
}

template <typename Element>
const Element* read(const Tensor& x) {
  return static_cast<const Element*>(x.const_data_ptr());
}

template <typename Element>
std::vector<float> bias_of(const std::optional<Tensor>& bias, std::int64_t columns) {
  return widened_bias<Element>(bias ? read<Element>(*bias) : nullptr, columns);
}

Tensor forward(const Tensor& x, const std::optional<Tensor>& bias) {
  const std::int64_t columns = x.size(x.dim() - 1), rows = x.numel() / columns;
  Tensor y = torch::stable::empty_like(x);
  for_element(x, [&](auto element) {
    using Element = decltype(element);
    const std::vector<float> wide = bias_of<Element>(bias, columns);
    torch::stable::parallel_for(0, rows, ROWS / 8, [&](std::int64_t first, std::int64_t last) {
      bias_gelu_forward(read<Element>(x), wide.data(), static_cast<Element*>(y.mutable_data_ptr()), first, last, columns);
    });
  });
  return y;
}

// (dx, fp32 sums of dx over groups of ROWS rows)
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias) {
  const std::int64_t columns = x.size(x.dim() - 1), rows = x.numel() / columns, groups = (rows + ROWS - 1) / ROWS;
  Tensor dx = torch::stable::empty_like(x);
  Tensor sums = torch::stable::new_empty(x, {groups, columns}, torch::headeronly::ScalarType::Float);
  for_element(x, [&](auto element) {
    using Element = decltype(element);
    const std::vector<float> wide = bias_of<Element>(bias, columns);
    torch::stable::parallel_for(0, groups, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t group = begin; group < end; ++group)
        bias_gelu_backward(read<Element>(grad), read<Element>(x), wide.data(), static_cast<Element*>(dx.mutable_data_ptr()),
                           static_cast<float*>(sums.mutable_data_ptr()) + group * columns, group * ROWS,
                           std::min(rows, (group + 1) * ROWS), columns);
    });
  });
  return {dx, sums};
}

}  // namespace
}  // namespace vatt

STABLE_TORCH_LIBRARY_FRAGMENT(vatt_native, m) {
  m.def("bias_gelu(Tensor x, Tensor? bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vatt_native, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&vatt::forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&vatt::backward));
}
