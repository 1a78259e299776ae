// The warpgroups of a skinny GEMM's block that multiply: each has 64 rows of the tile of W and all tokens of the block.
#pragma once

#include <cuda_bf16.h>

#include "device.cuh"
#include "gemm_best.cuh"
#include "gemm_items.cuh"
#include "gemm_ring.cuh"
#include "gemm_store.cuh"
#include "gemm_wgmma.cuh"

namespace openlora {

template <class Block>
struct GemmConsumer {
  static constexpr int kStoreBarrier = 1;  // and the next: named barriers of the warpgroups
  const GemmWork& work;
  const GemmRing& ring;
  using Items = GemmItems<Block::kNeighbours, Block::kIsHead>;
  using Sums = float[Block::kHalves][Block::kSide / 2];

  // An item's products. A stage is let go when those of the next are on their way.
  __device__ __forceinline__ void multiply(Sums& d, const Items& items, RingPosition& at) const {
    const uint32_t w_offset = threadIdx.x / 128 * 64 * kGemmRowBytes;
    const auto release = [&](int stage) {
      if (fresh_thread() % kWarp == 0) barrier_arrive(ring.empty(stage));
    };
#pragma unroll
    for (auto& half : d) wgmma_clear(half);
    int previous = -1;
#pragma unroll 1
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      barrier_wait(ring.full(at.stage), at.round & 1);
      wgmma_fence();
      const uint64_t a = wgmma_descriptor(ring.w(at.stage) + w_offset), b = wgmma_descriptor(ring.x(at.stage));
#pragma unroll
      for (int step = 0; step < kGemmBlockK / 16; ++step) {  // 32 bytes, in units of 16
#pragma unroll
        for (int half = 0; half < Block::kHalves; ++half) {
          Wgmma<Block::kSide>::add(d[half], a + step * 2, b + half * Block::kSideBytes / 16 + step * 2);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = at.stage;
    }
    wgmma_wait<0>();
#pragma unroll
    for (auto& half : d) wgmma_results(half);
    if (previous >= 0) release(previous);
  }

  // The sums of the tokens from `token` on to y, in the form that was asked for.
  __device__ __forceinline__ void store(const float (&d)[Block::kSide / 2], const Items& items, int token) const {
    constexpr int kSide = Block::kSide;
    const int group = fresh_thread() / 128, tokens = work.tokens - token;
    const int row_end = min(items.first_row() + work.tile_rows, work.outputs), row = items.first_row() + group * 64;
    const LineBuffer lines{ring.lines() + group * gemm_line_bytes(kSide), kStoreBarrier + group};
    if constexpr (Block::kIsHead) {
      store_lines<float, kSide>(d, static_cast<float*>(work.y), tokens, work.outputs, row, row_end, lines, WantedRows{ring.wanted()});
      return;
    }
    if (work.output == GemmOutput::kSiluMul) {
      const int columns = work.outputs / 2;
      __nv_bfloat16* y = static_cast<__nv_bfloat16*>(work.y) + static_cast<int64_t>(token) * columns;
      store_silu_mul<kSide>(d, y, tokens, columns, row / 2, row_end / 2, lines);
      return;
    }
    const int64_t offset = (static_cast<int64_t>(items.plane) * work.tokens + token) * work.outputs;
    if (work.output == GemmOutput::kFloatPlanes) {
      store_lines<float, kSide>(d, static_cast<float*>(work.y) + offset, tokens, work.outputs, row, row_end, lines);
    } else {
      store_lines<__nv_bfloat16, kSide>(d, static_cast<__nv_bfloat16*>(work.y) + offset, tokens, work.outputs, row, row_end, lines);
    }
  }

  __device__ __forceinline__ void run() const {
    RingPosition at;
    for (Items items(work); !items.is_done(); items.next()) {
      Sums d;
      multiply(d, items, at);
#pragma unroll
      for (int half = 0; half < Block::kHalves; ++half) store(d[half], items, Block::first_token() + half * Block::kSide);
    }
  }

  // Of kLogits: keeps the largest of every token besides.
  __device__ __forceinline__ void run_head() const {
    Bests<Block::kSide> bests;
    bests.clear();
    WantedRows{ring.wanted()}.template read<Block::kSide>(work.wanted, work.tokens);
    RingPosition at;
    for (Items items(work); !items.is_done(); items.next()) {
      Sums d;
      multiply(d, items, at);
      store(d[0], items, 0);
      const int first = items.first_row(), row = first + static_cast<int>(threadIdx.x) / kWarp * 16;
      bests.add(d[0], row, min(first + work.tile_rows, work.outputs));
    }
    bests.write(ring.buffers, work.bests, work.tokens, static_cast<int>(gridDim.x));
  }
};

}  // namespace openlora
