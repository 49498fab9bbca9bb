// `vatt_native::read_patches` on a CPU: threads around read_patches.h.
//
// video: (B, T, C, H, W), its last axis contiguous, uint8, fp32 or bf16; the Python side has checked that, and the index.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../patches.h"
#include "read_patches.h"

namespace vatt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Patches a thread takes at least: some tens of kilobytes.
constexpr std::int64_t GRAIN = 16;

template <typename In, typename Out>
void read(const Patches& p, std::int64_t samples, const Tensor& video, const std::int64_t* index, Tensor& patches) {
  const In* from = static_cast<const In*>(video.const_data_ptr());
  Out* to = static_cast<Out*>(patches.mutable_data_ptr());
  torch::stable::parallel_for(0, samples * p.kept, GRAIN, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t which = index ? index[k] : k % p.kept;
      Out* out = to + k * p.features();
      for (std::int64_t run = 0; run < p.runs(); ++run, out += p.patch_w) {
        const Run at = run_of(p, k / p.kept, which, run);
        read_run(from + (at.exist ? at.offset : 0), at.exist, p.patch_w, out);
      }
    }
  });
}

template <typename In>
void read_as(const Patches& p, std::int64_t samples, const Tensor& video, const std::int64_t* index, Tensor& patches) {
  const bool half = patches.scalar_type() == ScalarType::BFloat16;
  (half ? &read<In, bfloat16> : &read<In, float>)(p, samples, video, index, patches);
}

Tensor read_patches(const Tensor& video, const std::optional<Tensor>& index, std::vector<std::int64_t> patch,
                    std::vector<std::int64_t> grid, ScalarType dtype) {
  Patches p{video.size(1),   video.size(2),   video.size(3),   video.size(4), video.stride(0), video.stride(1),
            video.stride(2), video.stride(3), patch[0],        patch[1],      patch[2],        grid[0],
            grid[1],         grid[2],         0};
  p.kept = index ? index->size(1) : p.count();
  const std::int64_t samples = video.size(0);
  Tensor patches = torch::stable::new_empty(video, {samples, p.kept, p.features()}, dtype);
  const std::int64_t* at = index ? static_cast<const std::int64_t*>(index->const_data_ptr()) : nullptr;
  const ScalarType from = video.scalar_type();
  const auto run = from == ScalarType::Byte ? &read_as<std::uint8_t> : from == ScalarType::Float ? &read_as<float> : &read_as<bfloat16>;
  run(p, samples, video, at, patches);
  return patches;
}

}  // namespace
}  // namespace vatt

STABLE_TORCH_LIBRARY_FRAGMENT(vatt_native, m) {
  m.def("read_patches(Tensor video, Tensor? index, int[] patch, int[] grid, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vatt_native, CPU, m) { m.impl("read_patches", TORCH_BOX(&vatt::read_patches)); }
