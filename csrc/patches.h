// Where the pixels of a patch lie: shared by the CPU's and the GPU's `read_patches`.
//
// B samples of T frames of C x H x W; a patch is t x h x w of them, its features ordered (frame, channel, row, column). A
// waveform is one frame of one channel and one row.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VATT_BOTH __host__ __device__
#else
#define VATT_BOTH
#endif

namespace vatt {

struct Patches {
  std::int64_t frames, channels, rows, columns;     // of a sample
  std::int64_t sample, frame, channel, row;         // strides, in elements; columns are contiguous
  std::int64_t patch_t, patch_h, patch_w;           // extent of a patch
  std::int64_t grid_t, grid_h, grid_w;              // patches along each axis
  std::int64_t kept;                                // patches read of a sample

  VATT_BOTH std::int64_t runs() const { return patch_t * channels * patch_h; }
  VATT_BOTH std::int64_t features() const { return runs() * patch_w; }
  VATT_BOTH std::int64_t count() const { return grid_t * grid_h * grid_w; }
};

// One run of patch_w pixels: where it starts, and how many of them exist (the rest is padding, 0).
struct Run {
  std::int64_t offset, exist;
};

// The numbers of a patch and of its runs fit 32 bits, in which a GPU divides much faster.
VATT_BOTH inline Run run_of(const Patches& p, std::int64_t sample, std::uint32_t index, std::uint32_t run) {
  const std::uint32_t patch_h = p.patch_h, channels = p.channels, grid_w = p.grid_w, grid_h = p.grid_h;
  const std::uint32_t y = run % patch_h, c = run / patch_h % channels, f = run / patch_h / channels;
  const std::uint32_t at_w = index % grid_w, at_h = index / grid_w % grid_h, at_t = index / grid_w / grid_h;
  const std::int64_t frame = at_t * p.patch_t + f, row = at_h * p.patch_h + y, column = at_w * p.patch_w;
  std::int64_t exist = frame < p.frames && row < p.rows ? p.columns - column : 0;
  exist = exist < 0 ? 0 : exist > p.patch_w ? p.patch_w : exist;
  return {sample * p.sample + frame * p.frame + c * p.channel + row * p.row + column, exist};
}

}  // namespace vatt
