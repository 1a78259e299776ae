// What the two kernels of the wide form share (gemm_wide_sm90.h).
//
// A block is two warpgroups, each with 128 tokens (two m64 blocks of wgmma, whose n side is kRows rows of W). A thread holds kRows
// accumulators, so there is no room for a producer's registers: a thread of the first warp fills a stage again as soon as both
// warpgroups have read it, while its own products of the next stage run.
//
// Shared memory: 3 stages of [256, 64] of x and [kRows, 64] of W, 57 or 60 KB each. Device memory: 2 N K bytes once; x comes from
// L2 once a tile.
#pragma once

#include <cuda.h>

#include "device.cuh"
#include "gemm_plan.h"
#include "gemm_store.cuh"
#include "gemm_tma.cuh"
#include "gemm_wgmma.cuh"

namespace openlora {

constexpr int kWideThreads = 2 * 128;
constexpr int kWideWarps = kWideThreads / kWarp;
constexpr int kWideStages = 3;

// Where a block is in its ring: the stage that is multiplied, and the one before it, which is free for what comes.
struct WidePosition {
  uint32_t stage = 0, parity = 0, freed = kWideStages - 1;

  __device__ __forceinline__ uint32_t freed_parity() const { return parity ^ (freed > stage); }
  __device__ __forceinline__ void advance() {
    freed = stage;
    if (++stage == kWideStages) stage = 0, parity ^= 1;
  }
};

// Where stages and their barriers lie; `base` is a multiple of 1024.
template <int kRows>
struct WideRing {
  static constexpr int kStageBytes = (kGemmMaxTokens + kRows) * kGemmRowBytes;
  static constexpr int kBytes = kWideStages * (kStageBytes + 16);
  uint32_t base;

  __device__ uint32_t x(int stage) const { return base + stage * kStageBytes; }
  __device__ uint32_t w(int stage) const { return x(stage) + kGemmMaxTokens * kGemmRowBytes; }
  __device__ uint32_t full(int stage) const { return base + kWideStages * kStageBytes + stage * 16; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }

  __device__ __forceinline__ void init() const {
    for (int stage = 0; stage < kWideStages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), kWideWarps);
    }
    barrier_init_fence();
  }

  // One thread asks for a tile of W and one of x; both complete on the stage's barrier. kPairs: W is gate and up.
  template <bool kPairs>
  __device__ __forceinline__ void load_w(const CUtensorMap* map, int tile, int k, int stage) const {
    barrier_expect(full(stage), kStageBytes);
    if constexpr (kPairs) tensor_load_pairs(w(stage), map, k * kGemmBlockK, tile * (kRows / 16), full(stage), policy_evict_first());
    else tensor_load(w(stage), map, k * kGemmBlockK, tile * kRows, full(stage), policy_evict_first());
  }
  __device__ __forceinline__ void load_x(const CUtensorMap* map, int k, int stage) const {
    tensor_load(x(stage), map, k * kGemmBlockK, 0, full(stage), policy_evict_last());
  }

  // The first round: W before the kernels ahead have ended.
  template <bool kPairs>
  __device__ __forceinline__ void start(const CUtensorMap* w_map, const CUtensorMap* x_map, int tile, int k_blocks) const {
    const int early = min(kWideStages, k_blocks);
    for (int k = 0; k < early; ++k) load_w<kPairs>(w_map, tile, k, k);
    wait_for_dependencies();
    launch_dependents();
    for (int k = 0; k < early; ++k) load_x(x_map, k, k);
  }

  // A warp lets go of a stage.
  __device__ __forceinline__ void release(uint32_t stage) const {
    if (fresh_thread() % kWarp == 0) barrier_arrive(empty(stage));
  }

  // One thread fills a stage again once all warps have let go of it.
  template <bool kPairs>
  __device__ __forceinline__ void refill(const CUtensorMap* w_map, const CUtensorMap* x_map, int tile, int k, const WidePosition& at) const {
    barrier_wait(empty(at.freed), at.freed_parity());
    load_w<kPairs>(w_map, tile, k, at.freed);
    load_x(x_map, k, at.freed);
  }

  // Enqueues a stage's products for the tokens of a warpgroup, once it has arrived: 0 to 63 and 64 to 127 of them.
  __device__ __forceinline__ void multiply(float (&low)[kRows / 2], float (&high)[kRows / 2], const WidePosition& at) const {
    barrier_wait(full(at.stage), at.parity);
    wgmma_fence();
    const uint64_t a = wgmma_descriptor(x(at.stage) + threadIdx.x / 128 * 128 * kGemmRowBytes), b = wgmma_descriptor(w(at.stage));
#pragma unroll
    for (int step = 0; step < kGemmBlockK / 16; ++step) {  // 32 bytes, in units of 16
      Wgmma<kRows>::add(low, a + step * 2, b + step * 2);
      Wgmma<kRows>::add(high, a + 64 * kGemmRowBytes / 16 + step * 2, b + step * 2);
    }
    wgmma_commit();
  }
};

}  // namespace openlora
