// The thread of a skinny GEMM's block that keeps the ring full. The ring never drains between work items, and its first round of W
// is asked for before the kernels ahead have finished.
#pragma once

#include "gemm_items.cuh"
#include "gemm_ring.cuh"
#include "gemm_tma.cuh"

namespace openlora {

template <class Block>
struct GemmProducer {
  const GemmWork& work;
  const GemmRing& ring;
  const CUtensorMap *w_map, *x_map;
  using Items = GemmItems<Block::kNeighbours, Block::kIsHead>;

  __device__ __forceinline__ void load_w(const Items& at, int k, int stage) const {
    barrier_expect(ring.full(stage), ring.stage_bytes);
    if (work.output == GemmOutput::kSiluMul) {
      tensor_load_pairs(ring.w(stage), w_map, k * kGemmBlockK, at.first_row() / 16, ring.full(stage), policy_evict_first());
    } else {
      tensor_load(ring.w(stage), w_map, k * kGemmBlockK, at.first_row(), ring.full(stage), policy_evict_first());
    }
  }

  __device__ __forceinline__ void load_x(int k, int stage) const {
#pragma unroll
    for (int half = 0; half < Block::kHalves; ++half) {
      tensor_load(ring.x(stage) + half * Block::kSideBytes, x_map, k * kGemmBlockK, Block::first_token() + half * Block::kSide, ring.full(stage),
                  policy_evict_last());
    }
  }

  // The first round of W, which no kernel in flight writes.
  __device__ __forceinline__ void start() const {
    int stage = 0;
    for (Items items(work); !items.is_done(); items.next()) {
      for (int k = items.first_k; k < items.end_k; ++k, ++stage) {
        if (stage == work.stages) return;
        load_w(items, k, stage);
      }
    }
  }

  // All the rest, once the kernels ahead have ended.
  __device__ __forceinline__ void run() const {
    wait_for_dependencies();
    launch_dependents();  // not before the wait: whoever starts now may read the same x (lora_work.h, Follow::kWaitLast)
    RingPosition at;
    for (Items items(work); !items.is_done(); items.next()) {
      for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
        if (at.round > 0) {
          barrier_wait(ring.empty(at.stage), (at.round - 1) & 1);
          load_w(items, k, at.stage);
        }
        load_x(k, at.stage);
      }
    }
  }
};

}  // namespace openlora
