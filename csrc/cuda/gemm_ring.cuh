// The ring of stages of a skinny GEMM's block in shared memory: a tile of W and one of x each, and two barriers, one that their
// bytes complete on and one that every consumer warp arrives on when it has read them.
#pragma once

#include "gemm_kernel.h"
#include "gemm_plan.h"
#include "gemm_tma.cuh"

namespace openlora {

struct GemmRing {
  uint32_t buffers, barriers;
  int w_bytes, stage_bytes;

  // x_bytes: of a stage.
  __device__ __forceinline__ GemmRing(const GemmWork& work, uint32_t shared, int x_bytes)
      : buffers((shared + 1023) & ~1023u),
        barriers(buffers + work.ring_bytes),
        w_bytes(work.tile_rows * kGemmRowBytes),
        stage_bytes(w_bytes + x_bytes) {}

  __device__ __forceinline__ uint32_t w(int stage) const { return buffers + stage * stage_bytes; }
  __device__ __forceinline__ uint32_t x(int stage) const { return w(stage) + w_bytes; }
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + stage * 16; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + stage * 16 + 8; }
  __device__ __forceinline__ uint32_t wanted() const { return barriers + kGemmWantedOffset; }
  __device__ __forceinline__ uint32_t lines() const { return barriers + kGemmBarrierBytes; }

  // One warp.
  __device__ __forceinline__ void init(int lane, int stages, int readers) const {
    if (lane < stages) {
      barrier_init(full(lane), 1);
      barrier_init(empty(lane), readers);
    }
    barrier_init_fence();
  }
};

struct RingPosition {
  int stage = 0;
  uint32_t round = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      ++round;
    }
  }
};

}  // namespace openlora
