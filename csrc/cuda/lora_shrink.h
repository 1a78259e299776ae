// LoRA shrink: v = scale * weight * x A^T for every row's own adapter pages, all modules that share x in one launch.
#pragma once

#include "lora_work.h"

namespace openlora {

struct LoraShrinkArgs {
  const void* x;     // [T, K], rows x_stride elements apart, 16-byte aligned
  int64_t x_stride;
  int rows;    // T: sizes the grid, nothing else
  int inputs;  // K
  bool is_float;  // x and pages float32 (SIMT), else bfloat16 (tensor cores, K a multiple of 32)
  LoraWork work;
  Follow follow;
  int tile_ints;  // int32 that may be read at work.tiles
};

// Planes of v (LoraWork::v_planes) of the kernel for steps in tiles of at most 16 rows, bfloat16, on Hopper. Everything else makes 1.
int lora_shrink_planes(int64_t inputs);

// Enqueues one kernel: no allocation, no synchronisation. The bits of a row's v depend on its x, its pages, its scales and K alone.
cudaError_t launch_lora_shrink(const LoraShrinkArgs& args, cudaStream_t stream);

}  // namespace openlora
