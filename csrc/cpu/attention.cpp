// `vatt_native::attention` and its backward on a CPU: memory and threads around attention_*.h.
//
// qkv is (B, N, 3, H, D) with a contiguous last axis, fp32 or bf16, D 32, 64 or 128; bias is fp32 and expanded to
// (B, H, N, N); grad and out are (B, N, H, D) with a contiguous last axis. The Python side has checked that.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "attention_backward.h"
#include "attention_forward.h"

namespace vatt::attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

#if defined(__AVX512BF16__)
using FormatOfBFloat16 = Pairs;
#else
using FormatOfBFloat16 = Single;  // widened when packed
#endif

Shape shape_of(const Tensor& qkv) { return {qkv.size(0), qkv.size(3), qkv.size(1), qkv.size(4)}; }

template <class T>
T* elements(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// `which` = 0, 1, 2: queries, keys, values.
template <class T>
Tokens<T> part(const Tensor& qkv, int64_t which) {
  return {elements<T>(qkv) + which * qkv.stride(2), qkv.stride(0), qkv.stride(1), qkv.stride(3)};
}

template <class T>
Tokens<T> tokens(const Tensor& x) {
  return {elements<T>(x), x.stride(0), x.stride(1), x.stride(2)};
}

Bias bias_of(const Maybe& bias) {
  if (!bias) return {};
  return {elements<const float>(*bias), bias->stride(0), bias->stride(1), bias->stride(2), bias->stride(3)};
}

Dropout dropout_of(double rate, const Maybe& seed, const Maybe& step, const Maybe& sample_id, int64_t stream, Shape shape) {
  if (rate == 0.0) return {};
  return {(float)rate,
          (uint32_t)(rate * 4294967296.0),
          (uint32_t)*elements<const int64_t>(*step),
          (uint32_t)stream,
          (uint64_t)*elements<const int64_t>(*seed),
          elements<const int64_t>(*sample_id),
          shape.B / sample_id->size(0)};
}

// The units of `work` in one range a thread, each with memory of its own.
template <class Work>
void spread(const Work& work, const Tensor& like) {
  const int64_t bytes = work.scratch() + 64, threads = std::min<int64_t>(torch::stable::get_num_threads(), work.units());
  const Tensor memory = torch::stable::new_empty(like, {threads * bytes}, ScalarType::Byte);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      char* own = elements<char>(memory) + t * bytes;
      own += (64 - reinterpret_cast<uintptr_t>(own) % 64) % 64;
      work.run(work.units() * t / threads, work.units() * (t + 1) / threads, own);
    }
  });
}

template <class Run>
void for_format(const Tensor& qkv, const Run& run) {
  if (qkv.scalar_type() == ScalarType::BFloat16)
    run(BFloat16{}, FormatOfBFloat16{});
  else
    run(float{}, Single{});
}

// (out (B, N, H, D); lse (B, H, N) fp32, in units of log 2)
std::tuple<Tensor, Tensor> forward(const Tensor& qkv, const Maybe& bias, double scale, double rate, const Maybe& seed,
                                   const Maybe& step, const Maybe& sample_id, int64_t stream) {
  const Shape shape = shape_of(qkv);
  const Tensor out = torch::stable::new_empty(qkv, {shape.B, shape.N, shape.H, shape.D});
  const Tensor lse = torch::stable::new_empty(qkv, {shape.B, shape.H, shape.N}, ScalarType::Float);
  for_format(qkv, [&]<class T, class Format>(T, Format) {
    spread(Forward<T, Format>(shape,
                              {part<const T>(qkv, 0), part<const T>(qkv, 1), part<const T>(qkv, 2), bias_of(bias),
                               dropout_of(rate, seed, step, sample_id, stream, shape), (float)scale},
                              tokens<T>(out), elements<float>(lse)),
           qkv);
  });
  return {out, lse};
}

// (dqkv (B, N, 3, H, D); dbias (B, H, N, N) fp32, empty unless asked for)
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& lse, const Maybe& bias,
                                    bool bias_gradient, double scale, double rate, const Maybe& seed, const Maybe& step,
                                    const Maybe& sample_id, int64_t stream) {
  const Shape shape = shape_of(qkv);
  const Tensor dqkv = torch::stable::new_empty(qkv, {shape.B, shape.N, 3, shape.H, shape.D});
  const Tensor dbias = torch::stable::new_empty(qkv, {bias_gradient ? shape.B : 0, shape.H, shape.N, shape.N}, ScalarType::Float);
  for_format(qkv, [&]<class T, class Format>(T, Format) {
    spread(Backward<T, Format>(shape,
                               {part<const T>(qkv, 0), part<const T>(qkv, 1), part<const T>(qkv, 2), tokens<const T>(out),
                                tokens<const T>(grad), elements<const float>(lse), bias_of(bias),
                                dropout_of(rate, seed, step, sample_id, stream, shape), (float)scale},
                               {part<T>(dqkv, 0), part<T>(dqkv, 1), part<T>(dqkv, 2),
                                bias_gradient ? elements<float>(dbias) : nullptr}),
           qkv);
  });
  return {dqkv, dbias};
}

}  // namespace
}  // namespace vatt::attention

STABLE_TORCH_LIBRARY_FRAGMENT(vatt_native, m) {
  m.def(
      "attention(Tensor qkv, Tensor? bias, float scale, float rate, Tensor? seed, Tensor? step, Tensor? sample_id, int stream)"
      " -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor? bias, bool bias_gradient, float scale, "
      "float rate, Tensor? seed, Tensor? step, Tensor? sample_id, int stream) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vatt_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&vatt::attention::forward));
  m.impl("attention_backward", TORCH_BOX(&vatt::attention::backward));
}
