// The kernel of the skinny GEMM (gemm_sm90.h), of which gemm_narrow_sm90.cu, gemm_head_sm90.cu and gemm_tall_sm90.cu have the instances.
//
// Swap-AB: 64-row blocks of W are the m side of wgmma, the tokens its n side, so one token wastes 7/8 of an n8 tile instead of
// 63/64 of an m64 one, and each byte of W enters an SM once.
//
// A block is kGroups consumer warpgroups (gemm_consumer.cuh), each with 64 rows of the tile, and one producer warp (gemm_producer.cuh),
// which streams stages of [tile_rows, 64] of W and kHalves times [kSide, 64] of x through a ring (gemm_ring.cuh). A thread holds
// kHalves * kSide / 2 accumulators. Where a block with one more warp has no room for them, the producer's warp has a warpgroup, which
// gives its registers away.
//
// Shared memory: gemm_shared_bytes of gemm_plan.h. Device memory: 2 N K bytes, once, evict-first; x and y stay in L2. Bound: those
// bytes up to about 200 tokens, then arithmetic.
#pragma once

#include "gemm_consumer.cuh"
#include "gemm_producer.cuh"

namespace openlora {

// What a block has. kNeighbours: blocks with the same rows of W and kSide tokens each, where one has not all.
template <int kGroups_, int kHalves_, int kNeighbours_, int kSide_, bool kIsHead_ = false>
struct GemmBlock {
  static constexpr int kGroups = kGroups_, kHalves = kHalves_, kNeighbours = kNeighbours_, kSide = kSide_;
  static constexpr bool kIsHead = kIsHead_;
  static constexpr bool kDealsRegisters = kHalves > 1 || kNeighbours > 1;
  static constexpr int kConsumers = kGroups * 128;
  static constexpr int kThreads = kConsumers + (kDealsRegisters ? 128 : kWarp);
  static constexpr int kConsumerRegisters = kGroups == 2 ? 232 : 152, kProducerRegisters = 40;
  static constexpr int kSideBytes = kSide * kGemmRowBytes;  // of a stage
  static_assert(!kDealsRegisters || kGroups * kConsumerRegisters + kProducerRegisters <= 512);
  static_assert(!kIsHead || (kGroups == 2 && kHalves == 1 && kNeighbours == 1));

  __device__ static __forceinline__ int first_token() { return static_cast<int>(blockIdx.x) % kNeighbours * kSide; }
};

template <class Block>
__global__ __launch_bounds__(Block::kThreads, 1) void skinny_gemm(const __grid_constant__ CUtensorMap w_map,
                                                                  const __grid_constant__ CUtensorMap x_map, const GemmWork work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the body is empty and the launcher refuses
  extern __shared__ uint8_t shared[];
  const GemmRing ring(work, shared_address(shared), Block::kHalves * Block::kSideBytes);
  const GemmProducer<Block> producer{work, ring, &w_map, &x_map};
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  if (warp == Block::kConsumers / kWarp) {
    ring.init(lane, work.stages, Block::kConsumers / kWarp);
    __syncwarp();
    if (lane == 0) producer.start();  // its own barriers: no need to wait for the block
    __syncwarp();
  }
  __syncthreads();
  if (warp >= Block::kConsumers / kWarp) {
    if constexpr (Block::kDealsRegisters) give_registers<Block::kProducerRegisters>();
    if (threadIdx.x == Block::kConsumers) producer.run();
    __syncwarp();
  } else {
    if constexpr (Block::kDealsRegisters) take_registers<Block::kConsumerRegisters>();
    wait_for_dependencies();  // y may still be read by a kernel ahead
    const GemmConsumer<Block> consumer{work, ring};
    if constexpr (Block::kIsHead) consumer.run_head();
    else consumer.run();
  }
#endif
}

template <class Block>
GemmKernel gemm_kernel() {
  return {skinny_gemm<Block>, Block::kThreads, Block::kNeighbours};
}

}  // namespace openlora
