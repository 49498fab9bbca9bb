// `vatt_native::read_patches` on a GPU: a block for each patch, 16 bytes a load where runs are multiples of that.
//
// video: (B, T, C, H, W), its last axis contiguous; the Python side has checked that. An index outside the grid has been
// asserted against on the device; should it come here all the same, its patch is NaN and nothing is read.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../patches.h"

namespace vatt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Two roundings, as in the specification, where a compiler would fuse them into one.
__device__ inline float unit(std::uint8_t pixel) { return __fsub_rn(__fmul_rn(static_cast<float>(pixel), 2.0f / 255.0f), 1.0f); }
__device__ inline float unit(float x) { return x; }
__device__ inline float unit(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void round_to(float x, float& out) { out = x; }
__device__ inline void round_to(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void round_to(float x, __half& out) { out = __float2half_rn(x); }

// As many elements as a load of 16 bytes brings, and as they are stored: 16 bytes at a time where there are as many.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T at[N];
};

template <typename In, typename Out>
__global__ void __launch_bounds__(256) read_vectors(Patches p, const In* __restrict__ video, const std::int64_t* __restrict__ index,
                                                    Out* __restrict__ patches) {
  constexpr int N = 16 / sizeof(In);
  const std::int64_t k = blockIdx.x, sample = k / p.kept, which = index ? index[k] : k % p.kept;
  const std::uint32_t each = p.patch_w / N, vectors = p.runs() * each;
  const bool inside = which >= 0 && which < p.count();
  Out* out = patches + k * p.features();
  for (std::uint32_t v = threadIdx.x; v < vectors; v += blockDim.x) {
    const Run run = run_of(p, sample, inside ? which : 0, v / each);
    Vector<Out, N> written;
    if (inside && run.exist) {
      const int4 bits = __ldcs(reinterpret_cast<const int4*>(video + run.offset) + v % each);
      const In* pixels = reinterpret_cast<const In*>(&bits);
#pragma unroll
      for (int i = 0; i < N; ++i) round_to(unit(pixels[i]), written.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) round_to(inside ? 0.0f : __int_as_float(0x7fc00000), written.at[i]);
    }
    reinterpret_cast<Vector<Out, N>*>(out)[v] = written;
  }
}

template <typename In, typename Out>
__global__ void __launch_bounds__(256) read_elements(Patches p, const In* __restrict__ video, const std::int64_t* __restrict__ index,
                                                     Out* __restrict__ patches) {
  const std::int64_t k = blockIdx.x, sample = k / p.kept, which = index ? index[k] : k % p.kept;
  const std::uint32_t features = p.features(), width = p.patch_w;
  const bool inside = which >= 0 && which < p.count();
  Out* out = patches + k * p.features();
  for (std::uint32_t at = threadIdx.x; at < features; at += blockDim.x) {
    const Run run = run_of(p, sample, inside ? which : 0, at / width);
    const bool exists = inside && at % width < run.exist;
    round_to(exists ? unit(video[run.offset + at % width]) : inside ? 0.0f : __int_as_float(0x7fc00000), out[at]);
  }
}

// Every run starts at a multiple of 16 bytes, is a multiple of that long, and exists whole or not at all.
template <typename In>
bool in_vectors(const Patches& p, const void* video) {
  constexpr std::int64_t N = 16 / sizeof(In);
  const std::int64_t units[] = {p.sample, p.frame, p.channel, p.row, p.patch_w, std::min(p.columns, p.grid_w * p.patch_w)};
  return reinterpret_cast<std::uintptr_t>(video) % 16 == 0 &&
         std::all_of(std::begin(units), std::end(units), [](std::int64_t x) { return x % N == 0; }) &&
         (p.columns >= p.grid_w * p.patch_w || p.columns % p.patch_w == 0);
}

template <typename In, typename Out>
void launch(const Patches& p, std::int64_t samples, const Tensor& video, const std::int64_t* index, Tensor& patches) {
  const In* from = static_cast<const In*>(video.const_data_ptr());
  Out* to = static_cast<Out*>(patches.mutable_data_ptr());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(video.get_device_index(), &stream));
  const auto blocks = static_cast<unsigned>(samples * p.kept);
  if (in_vectors<In>(p, from))
    read_vectors<In, Out><<<blocks, 192, 0, static_cast<cudaStream_t>(stream)>>>(p, from, index, to);
  else
    read_elements<In, Out><<<blocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(p, from, index, to);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename In>
void launch_as(const Patches& p, std::int64_t samples, const Tensor& video, const std::int64_t* index, Tensor& patches) {
  const ScalarType to = patches.scalar_type();
  const auto run = to == ScalarType::BFloat16 ? &launch<In, __nv_bfloat16> : to == ScalarType::Half ? &launch<In, __half> : &launch<In, float>;
  run(p, samples, video, index, patches);
}

Tensor read_patches(const Tensor& video, const std::optional<Tensor>& index, std::vector<std::int64_t> patch,
                    std::vector<std::int64_t> grid, ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(video.get_device_index());
  Patches p{video.size(1),   video.size(2),   video.size(3),   video.size(4), video.stride(0), video.stride(1),
            video.stride(2), video.stride(3), patch[0],        patch[1],      patch[2],        grid[0],
            grid[1],         grid[2],         0};
  p.kept = index ? index->size(1) : p.count();
  Tensor patches = torch::stable::new_empty(video, {video.size(0), p.kept, p.features()}, dtype);
  if (patches.numel() == 0) return patches;
  const std::int64_t* at = index ? static_cast<const std::int64_t*>(index->const_data_ptr()) : nullptr;
  const ScalarType from = video.scalar_type();
  const auto run = from == ScalarType::Byte    ? &launch_as<std::uint8_t>
                   : from == ScalarType::Float ? &launch_as<float>
                                               : &launch_as<__nv_bfloat16>;
  run(p, video.size(0), video, at, patches);
  return patches;
}

}  // namespace
}  // namespace vatt

STABLE_TORCH_LIBRARY_IMPL(vatt_native, CUDA, m) { m.impl("read_patches", TORCH_BOX(&vatt::read_patches)); }
