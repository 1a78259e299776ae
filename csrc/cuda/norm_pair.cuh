// residual += product with adapters, then the norm, of few rows: two blocks share a row, half of its columns each. Hopper; with the bits of
// norm_lora.cuh, which says how B and v stream and has what both need.
//
// A pair of blocks is a cluster and has a row, which lora_deal.py put into its line: one load, and B is on its way. Half of the warps of
// norm_lora.cuh stand in each block (8 at H = 4096: columns 1024 i and 2048 + 1024 i of block i), so B and the multiply-adds take a
// processor half as long. The squares of each warp go to both blocks (st.async), which add up all of them in one order.
//
// Shared memory: six stages of 8 ranks of half the columns, 192 KB at H = 4096, and 4.5 KB: one block a processor, because two on the first
// that is free would have nothing of the second. Bytes: as norm_lora.cuh, a page of 16 ranks 65 KB a processor. Predicted over no adapters:
// 0.5 us at one row (what the other half's squares take), 1 at 32 rows of 32 adapters.
#pragma once

#include "norm_lora.cuh"

namespace openlora {

constexpr int kPairBlocks = 2;
constexpr int kPairStages = 6;

// Of both blocks, as the kernel without adapters has them: a thread has quads i and i + threads. Then of one of them.
__host__ __device__ constexpr int norm_warps(int columns) { return ((columns / kQuad + kQuads - 1) / kQuads + kWarp - 1) / kWarp; }
__host__ __device__ constexpr int pair_warps(int columns) { return (norm_warps(columns) + kPairBlocks - 1) / kPairBlocks; }
// Bytes of a rank in the ring.
__host__ __device__ constexpr int pair_pitch(int columns) { return pair_warps(columns) * kWarp * kQuads * 8; }
constexpr int norm_pair_shared_bytes(int columns) { return kPairStages * kNormStageRanks * pair_pitch(columns); }

struct PairShared {
  float4 v[2][1][kNormEntries][kPageRank / 4];
  alignas(16) float squares[kNormWarps];  // zero for warps that are not there
  NormStage stages[kPairStages];
  uint64_t full[kPairStages], empty[kPairStages];
  uint64_t v_full[2], v_empty[2];
  uint64_t summed;  // the squares of both blocks are there
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// A number into the shared memory of block `rank` of the cluster, counted by that block's barrier.
__device__ __forceinline__ void store_async(uint32_t target, uint32_t barrier, int rank, float x) {
  asm volatile(
      "{\n\t.reg .b32 to, by;\n\tmapa.shared::cluster.u32 to, %0, %2;\n\tmapa.shared::cluster.u32 by, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %3, [by];\n\t}" ::"r"(target),
      "r"(barrier), "r"(rank), "r"(__float_as_uint(x))
      : "memory");
}

__device__ __forceinline__ void cluster_barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\tWAIT:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t@done bra.uni DONE;\n\tbra.uni WAIT;\n\tDONE:\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A block's columns: of each of a thread's two quads the run that its warps have.
struct NormHalf {
  int rank;     // of the block in its pair
  int warps;    // with columns, in the block
  int threads;  // with columns, in both

  __device__ __forceinline__ int first_quad(int q) const { return q * threads + rank * warps * kWarp; }
  // Quads of the run: none where the columns end before it.
  __device__ __forceinline__ int quads(int q, int columns) const {
    return max(0, min(columns / kQuad - first_quad(q), min(warps * kWarp, threads - rank * warps * kWarp)));
  }
};

// The warp of B: the row's pages, as far ahead as there are stages. A lane sends one quad's run of one rank.
__device__ __forceinline__ void send_half_pages(const ProductView& p, PairShared& shared, uint8_t* ring, const Tile& tile, const NormHalf& half) {
  const int lane = threadIdx.x % kWarp, q = lane % kQuads, rank = lane / kQuads;
  const int pitch = pair_pitch(p.columns);
  const int bytes = half.quads(q, p.columns) * 8, rank_bytes = (half.quads(0, p.columns) + half.quads(1, p.columns)) * 8;
  const uint32_t target = shared_address(ring) + rank * pitch + q * half.warps * kWarp * 8;
  NormTurn<kPairStages> turn;
  int sent = 0;
  auto emit = [&](int page, const NormStage& stage) {
    if (sent == kPairStages) {  // whoever empties a stage is past the cluster's barrier; racecheck would let nobody past it before all are there
      __syncwarp();
      cluster_wait();
    }
    if (sent >= kPairStages) barrier_wait(shared_address(&shared.empty[turn.slot]), turn.parity ^ 1);
    const uint32_t full = shared_address(&shared.full[turn.slot]);
    if (lane == 0) {
      shared.stages[turn.slot] = stage;
      barrier_expect(full, stage.count * rank_bytes);
    }
    __syncwarp();
    if (rank < stage.count && bytes > 0)
      bulk_load(target + turn.slot * kNormStageRanks * pitch,
                norm_page(p, page) + static_cast<int64_t>(stage.rank + rank) * p.columns + half.first_quad(q) * kQuad, bytes, full);
    ++sent;
    turn.next();
  };
  auto emit_page = [&](int page, int entry, int left, bool is_last) {
    for (int first = 0; first < kPageRank && first < left; first += kNormStageRanks) {
      const bool ends = is_last && (first + kNormStageRanks >= kPageRank || first + kNormStageRanks >= left);
      emit(page, {entry, first, min(kNormStageRanks, left - first), ends});
    }
  };
  const int module = p.work.spans[0].module;
  const int first_ranks = tile.entries > 0 ? ranks_left(p.work, module, tile.entry) : 0;
  emit_page(tile.entry.page, 0, first_ranks, tile.entries == 1);
  bool has_ended = tile.entries == 1 && first_ranks > 0;
  const int4* entries = tile.entries > 1 ? read_tile_table(p.work.tiles).entries + tile.first_entry : nullptr;
  for (int group = 1; group < tile.entries; group += kWarp) {
    const bool is_mine = group + lane < tile.entries;
    const Entry entry = is_mine ? as_entry(__ldg(entries + group + lane)) : Entry{};
    const int ranks = is_mine ? ranks_left(p.work, module, entry) : 0;
    const unsigned found = __ballot_sync(kAllLanes, ranks > 0);
    const int last = group + kWarp >= tile.entries && found != 0 ? 31 - __clz(static_cast<int>(found)) : -1;
    has_ended = last >= 0;
    for (unsigned more = found; more != 0; more &= more - 1) {
      const int e = __ffs(static_cast<int>(more)) - 1;
      emit_page(__shfl_sync(kAllLanes, entry.page, e), group + e, __shfl_sync(kAllLanes, ranks, e), e == last);
    }
  }
  if (!has_ended) emit(0, {0, 0, 0, 1});
  __syncwarp();
  if (sent <= kPairStages) cluster_wait();
}

// The warp of v.
__device__ __forceinline__ void send_row_ranks(const ProductView& p, PairShared& shared, const Tile& tile, int place) {
  NormTurn<2> turn;
  for (int group = 0; group < tile.entries; group += kNormEntries, turn.next()) {
    if (group >= 2 * kNormEntries) barrier_wait(shared_address(&shared.v_empty[turn.slot]), turn.parity ^ 1);
    put_ranks(p, shared.v[turn.slot], tile, place, 1, group);
    barrier_arrive(shared_address(&shared.v_full[turn.slot]));  // every lane
  }
}

// The warps with columns.
template <bool kFloatPlanes>
__device__ __forceinline__ void finish_half_row(const NormParams& a, PairShared& shared, const uint8_t* ring, const Tile& tile, int of_row, const NormHalf& half) {
  const ProductView& p = a.p;
  const int warp = warp_index(), lane = threadIdx.x % kWarp, pitch = pair_pitch(p.columns);
  const int row[1] = {of_row};
  auto* residual = static_cast<__nv_bfloat16*>(a.residual) + static_cast<int64_t>(of_row) * p.columns;
  auto* out = static_cast<__nv_bfloat16*>(a.out) + static_cast<int64_t>(of_row) * p.columns;
  int column[kQuads], at[kQuads];  // and the place of a quad in a rank's row; a quad that is not there reads the first one
  uint2 weight[kQuads], old[kQuads];  // the residual too: no kernel in flight writes it
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const bool is_there = static_cast<int>(threadIdx.x) < half.quads(q, p.columns);
    column[q] = is_there ? (half.first_quad(q) + static_cast<int>(threadIdx.x)) * kQuad : -1;
    at[q] = is_there ? (q * half.warps * kWarp + static_cast<int>(threadIdx.x)) * 8 : 0;
    if (!is_there) continue;
    weight[q] = __ldg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(a.weight) + column[q]));
    old[q] = __ldcg(reinterpret_cast<const uint2*>(residual + column[q]));
  }
  __syncwarp();
  cluster_wait();
  if (threadIdx.x == 0) barrier_expect(shared_address(&shared.summed), kPairBlocks * half.warps * static_cast<int>(sizeof(float)));
  start_dependents();
  wait_for_previous();
  float y[kQuads][1][kQuad];
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
#pragma unroll
    for (int i = 0; i < kQuad; ++i) y[q][0][i] = -0.f;
  if constexpr (kFloatPlanes) load_float_rows<1>(y, p, row, column);
  else load_half_rows<1, 4>(y, p, row, column);
  const int groups = (tile.entries + kNormEntries - 1) / kNormEntries;
  int group = -1;
  NormTurn<2> v_turn;
  auto next_group = [&] {
    if (group >= 0) {
      barrier_arrive(shared_address(&shared.v_empty[v_turn.slot]));
      v_turn.next();
    }
    if (++group < groups) barrier_wait(shared_address(&shared.v_full[v_turn.slot]), v_turn.parity);
  };
  NormTurn<kPairStages> turn;
#pragma unroll 1
  for (bool is_last = false; !is_last; turn.next()) {
    barrier_wait(shared_address(&shared.full[turn.slot]), turn.parity);
    const NormStage stage = shared.stages[turn.slot];
    is_last = stage.is_last != 0;
    if (stage.count > 0) {
#pragma unroll 1
      while (group < static_cast<int>(static_cast<unsigned>(stage.entry) / kNormEntries)) next_group();
      expand_stage<1, 1>(y, ring + turn.slot * kNormStageRanks * pitch, pitch, at, shared.v[v_turn.slot], stage);
    }
    barrier_arrive(shared_address(&shared.empty[turn.slot]));
  }
#pragma unroll 1
  while (group < groups) next_group();
  float squares = 0.f;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    if (column[q] < 0) continue;
    float(&x)[kQuad] = y[q][0];
    float before[kQuad];
    unpack_quad(before, old[q]);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) x[i] = rounded_bf16(x[i] + before[i]);
    store_quad(residual + column[q], x);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) squares += x[i] * x[i];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
  const uint32_t summed = shared_address(&shared.summed);
  if (lane < kPairBlocks) store_async(shared_address(&shared.squares[half.rank * half.warps + warp]), summed, lane, squares);
  cluster_barrier_wait(summed, 0);
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kNormWarps; ++w) total += shared.squares[w];
  const float scale = rsqrtf(total / p.columns + a.eps);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    if (column[q] < 0) continue;
    float by[kQuad];
    unpack_quad(by, weight[q]);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) y[q][0][i] *= scale * by[i];
    store_quad(out + column[q], y[q][0]);
  }
}

#define OPENLORA_PAIR __cluster_dims__(2, 1, 1)
#else
#define OPENLORA_PAIR
#endif

// Grid: two blocks for each of the first rows' lines of the deal, where a unit is a row.
template <bool kFloatPlanes>
__global__ void OPENLORA_PAIR __launch_bounds__((kNormWarps / kPairBlocks + kNormHelpers) * kWarp, 1) add_rms_norm_pair_kernel(const __grid_constant__ NormParams a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t norm_ring[];
  __shared__ PairShared shared;
  const int warp = warp_index(), lane = threadIdx.x % kWarp;
  const NormHalf half{cluster_rank(), static_cast<int>(blockDim.x) / kWarp - kNormHelpers, norm_warps(a.p.columns) * kWarp};
  const NormShare share = read_norm_share(a.p.work.tiles, a.processors, static_cast<int>(blockIdx.x) / kPairBlocks);
  if (warp == half.warps) {
    if (lane == 0) {
#pragma unroll
      for (int s = 0; s < kPairStages; ++s) barrier_init(shared_address(&shared.full[s]), 1), barrier_init(shared_address(&shared.empty[s]), half.warps * kWarp);
#pragma unroll
      for (int s = 0; s < 2; ++s) barrier_init(shared_address(&shared.v_full[s]), kWarp), barrier_init(shared_address(&shared.v_empty[s]), half.warps * kWarp);
      barrier_init(shared_address(&shared.summed), 1);
      barrier_init_fence();
    }
  } else if (warp < half.warps && static_cast<int>(threadIdx.x) < kNormWarps) {
    shared.squares[threadIdx.x] = 0.f;
  }
  __syncwarp();
  cluster_arrive();
  if (warp == half.warps) {
    if (share.units > 0) send_half_pages(a.p, shared, norm_ring, share.tile, half);
    else cluster_wait();
  } else if (warp > half.warps) {
    cluster_wait();
    wait_for_previous();
    if (share.units > 0) send_row_ranks(a.p, shared, share.tile, share.first);
  } else if (share.units > 0) {
    finish_half_row<kFloatPlanes>(a, shared, norm_ring, share.tile, share.rows[0], half);
  } else {
    cluster_wait();
    wait_for_previous();  // whoever waits for this kernel waits for those before it
  }
#endif
}

}  // namespace openlora
