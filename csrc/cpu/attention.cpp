// The CPU's attention behind `vatt::attention_cpu` and its backward: checks, memory and threads around attention_*.h.
//
// qkv is (B, N, 3, H, D) as the projection leaves it; bias is fp32 and broadcasts to (B, H, N, N).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "attention_backward.h"
#include "attention_forward.h"

namespace vatt::attention {
namespace {

using at::Tensor;

#if defined(__AVX512BF16__)
using BFloat16Format = Pairs;
#else
using BFloat16Format = Single;  // widened when packed
#endif

Shape shape_of(const Tensor& qkv) { return {qkv.size(0), qkv.size(3), qkv.size(1), qkv.size(4)}; }

// `which` = 0, 1, 2 for queries, keys, values of a packed tensor.
template <class T>
Tokens<T> part(const Tensor& qkv, int64_t which) {
  return {static_cast<T*>(qkv.data_ptr()) + which * qkv.stride(2), qkv.stride(0), qkv.stride(1), qkv.stride(3)};
}

template <class T>
Tokens<T> tokens(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

Bias bias_of(const Tensor& bias, Shape shape) {
  if (!bias.defined()) return {};
  const Tensor full = bias.expand({shape.B, shape.H, shape.N, shape.N});
  return {full.data_ptr<float>(), full.stride(0), full.stride(1), full.stride(2), full.stride(3)};
}

void check(const Tensor& qkv, const Tensor& bias) {
  TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "attention: qkv: must be (B, N, 3, H, D)");
  TORCH_CHECK(qkv.numel() > 0, "attention: qkv: is empty");
  const int64_t D = qkv.size(4);
  TORCH_CHECK(D == 32 || D == 64 || D == 128, "attention: qkv: head_dim ", D, " is not 32, 64 or 128");
  TORCH_CHECK(qkv.scalar_type() == at::kFloat || qkv.scalar_type() == at::kBFloat16, "attention: qkv: must be fp32 or bf16");
  TORCH_CHECK(!bias.defined() || bias.scalar_type() == at::kFloat, "attention: bias: must be fp32");
}

// The units of `work`, in contiguous ranges over the threads, each with memory of its own.
template <class Work>
void spread(const Work& work) {
  const int64_t bytes = work.scratch(), threads = std::min<int64_t>(at::get_num_threads(), work.units());
  const Tensor memory = at::empty({threads, bytes}, at::kByte);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      work.run(work.units() * t / threads, work.units() * (t + 1) / threads, memory.data_ptr<uint8_t>() + t * bytes);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& qkv_, const std::optional<Tensor>& bias_, double scale) {
  const Tensor qkv = qkv_.stride(-1) == 1 ? qkv_ : qkv_.contiguous(), bias = bias_.value_or(Tensor());
  check(qkv, bias);
  const Shape shape = shape_of(qkv);
  const Tensor out = at::empty({shape.B, shape.N, shape.H, shape.D}, qkv.options());
  const Tensor lse = at::empty({shape.B, shape.H, shape.N}, qkv.options().dtype(at::kFloat));
  const auto run = [&]<class T, class Format>(T, Format) {
    spread(Forward<T, Format>(shape, part<const T>(qkv, 0), part<const T>(qkv, 1), part<const T>(qkv, 2), bias_of(bias, shape),
                              (float)scale, tokens<T>(out), lse.data_ptr<float>()));
  };
  qkv.scalar_type() == at::kFloat ? run(float{}, Single{}) : run(BFloat16{}, BFloat16Format{});
  return {out, lse};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_, const Tensor& qkv_, const std::optional<Tensor>& bias_, const Tensor& out,
                                    const Tensor& lse, double scale, bool bias_gradient) {
  const Tensor qkv = qkv_.stride(-1) == 1 ? qkv_ : qkv_.contiguous(), bias = bias_.value_or(Tensor());
  const Tensor grad = grad_.stride(-1) == 1 ? grad_ : grad_.contiguous();
  check(qkv, bias);
  const Shape shape = shape_of(qkv);
  const Tensor dqkv = at::empty({shape.B, shape.N, 3, shape.H, shape.D}, qkv.options());
  const Tensor dbias = at::empty({bias_gradient ? shape.B : 0, shape.H, shape.N, shape.N}, qkv.options().dtype(at::kFloat));
  const auto run = [&]<class T, class Format>(T, Format) {
    using Gradients = Backward<T, Format>;
    spread(Gradients(shape,
                     {part<const T>(qkv, 0), part<const T>(qkv, 1), part<const T>(qkv, 2), tokens<const T>(out),
                      tokens<const T>(grad), lse.data_ptr<float>(), bias_of(bias, shape)},
                     (float)scale,
                     {part<T>(dqkv, 0), part<T>(dqkv, 1), part<T>(dqkv, 2), bias_gradient ? dbias.data_ptr<float>() : nullptr}));
  };
  qkv.scalar_type() == at::kFloat ? run(float{}, Single{}) : run(BFloat16{}, BFloat16Format{});
  return {dqkv, dbias};
}

}  // namespace
}  // namespace vatt::attention

TORCH_LIBRARY_FRAGMENT(vatt, library) {
  library.def("attention_cpu(Tensor qkv, Tensor? bias, float scale) -> (Tensor out, Tensor lse)");
  library.def(
      "attention_cpu_backward(Tensor grad, Tensor qkv, Tensor? bias, Tensor out, Tensor lse, float scale, bool bias_gradient)"
      " -> (Tensor dqkv, Tensor dbias)");
}

TORCH_LIBRARY_IMPL(vatt, CPU, library) {
  library.impl("attention_cpu", &vatt::attention::forward);
  library.impl("attention_cpu_backward", &vatt::attention::backward);
}
