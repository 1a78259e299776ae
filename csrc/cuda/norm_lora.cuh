// residual += product with adapters, then the norm: B of a page as one stream through shared memory. Hopper; fused_add_rms_norm.cu
// chooses it and has what everything else takes, with the same bits.
//
// A block takes a unit: up to R rows of one tile (1 where there are no more rows than processors, else 2 or 3) and all columns. W warps
// (16 at H = 4096) have two quads of columns a thread, as in the kernels without adapters. One more warp sends for B by bulk copies,
// 8 ranks (one run of 16 H bytes) a stage, three stages: a page of 16 ranks is on its way at once, before the previous kernel has ended.
// Another one fetches v after the wait, adds its planes up and puts it down for all. So behind the wait there is one trip for v and the
// planes of y together, the multiply-adds, one barrier. Units that follow each other and have one page, the same, keep it.
//
// Units are dealt so that each block has one if that can be: the smallest size that makes no more units than blocks; else each block
// has a run of neighbouring ones.
//
// Every lane that has read a stage tells its barrier so itself: racecheck follows an arrival for the lane that makes it alone, and one lane
// for all, behind __syncwarp, costs as much.
//
// Shared memory: 48 H bytes (192 KB at H = 4096) + 4.3 KB R. Bytes: S T H 2 of planes, B of a page (131 KB) once a unit that changes it,
// residual read and written, out. Instructions behind the wait: 4 warps x 16 ranks x (9 + 8 + 8 R) a scheduler and page: 0.9 us for one
// row, 1.2 for two. Predicted over no adapters: 1.5 us at T = 1, 2.5 at 64 rows of 64 adapters, 3.5 at 256 (192 KB a processor from L2).
#pragma once

#include "gemm_tma.cuh"
#include "launch.cuh"
#include "norm_rows.cuh"
#include "norm_units.cuh"

namespace openlora {

struct NormParams {
  ProductView p;
  void* residual;
  const void* weight;
  float eps;
  void* out;
  int processors;  // P of the deal; the kernel of pairs
};

inline int norm_lora_shared_bytes(int columns) { return kNormStages * kNormStageRanks * columns * 2; }

template <int R>
struct NormShared {
  float4 v[2][R][kNormEntries][kPageRank / 4];
  alignas(16) float squares[2][R][kNormWarps];  // zero for warps that are not there
  NormStage stages[kNormStages];
  uint64_t full[kNormStages], empty[kNormStages];
  uint64_t v_full[2], v_empty[2];
  int4 share[kNormDealInts / 4];  // the block's line of the deal

  __device__ const int* share_rows() const { return &share[3].x; }
};

// Barriers of a ring of `kDepth`: position, and the parity of its phase.
template <int kDepth>
struct NormTurn {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == kDepth) slot = 0, parity ^= 1;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A run of bytes to shared memory, under the usual policy of the L2: other blocks may want the page too.
__device__ __forceinline__ void bulk_load(uint32_t target, const void* source, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target), "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void sync_threads_of(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
__device__ __forceinline__ void arrive_for(int barrier, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

constexpr int kShareBarrier = 1, kSquaresBarrier = 2;

__device__ __forceinline__ const __nv_bfloat16* norm_page(const ProductView& p, int page) {
  return static_cast<const __nv_bfloat16*>(p.work.pages) + page * p.work.page_elements + p.work.spans[0].b_offset;
}

// The warp of B: all units' pages, in order, as far ahead as there are stages.
template <int R>
__device__ __forceinline__ void send_pages(const ProductView& p, NormShared<R>& shared, uint8_t* ring, NormUnits units) {
  const int lane = threadIdx.x % kWarp, stage_bytes = kNormStageRanks * p.columns * 2;
  NormTurn<kNormStages> turn;
  int sent = 0;
  auto emit = [&](const __nv_bfloat16* from, NormStage stage) {
    if (sent >= kNormStages) barrier_wait(shared_address(&shared.empty[turn.slot]), turn.parity ^ 1);
    shared.stages[turn.slot] = stage;
    const uint32_t full = shared_address(&shared.full[turn.slot]);
    if (stage.count > 0) {
      const int bytes = stage.count * p.columns * 2;
      barrier_expect(full, bytes);
      bulk_load(shared_address(ring) + turn.slot * stage_bytes, from + static_cast<int64_t>(stage.rank) * p.columns, bytes, full);
    } else {
      barrier_arrive(full);
    }
    ++sent;
    turn.next();
  };
  bool has_page = false;
  for (; units.left > 0; units.next()) {
    const bool keeps = units.keeps_page();
    if (!has_page) {
      const Tile& tile = units.tile;
      bool has_ended = false;
      for (int group = 0; group < tile.entries; group += kWarp) {
        const bool is_mine = group + lane < tile.entries;
        Entry entry = tile.entry;
        if (is_mine && group + lane > 0) entry = as_entry(__ldg(reinterpret_cast<const int4*>(units.block + units.entries_at) + tile.first_entry + group + lane));
        const int ranks = is_mine ? ranks_left(p.work, p.work.spans[0].module, entry) : 0;
        const unsigned found = __ballot_sync(kAllLanes, ranks > 0);
        const int last = group + kWarp >= tile.entries && found != 0 ? 31 - __clz(static_cast<int>(found)) : -1;
        has_ended = last >= 0;
        for (unsigned more = found; more != 0; more &= more - 1) {
          const int e = __ffs(static_cast<int>(more)) - 1;
          const int page = __shfl_sync(kAllLanes, entry.page, e), left = __shfl_sync(kAllLanes, ranks, e);
          if (lane == 0)
            for (int rank = 0; rank < kPageRank && rank < left; rank += kNormStageRanks) {
              const bool ends = e == last && (rank + kNormStageRanks >= kPageRank || rank + kNormStageRanks >= left);
              emit(norm_page(p, page), {group + e, rank, min(kNormStageRanks, left - rank), ends});
            }
          __syncwarp();
        }
      }
      if (!has_ended && lane == 0) emit(nullptr, {0, 0, 0, 1});
      __syncwarp();
    }
    has_page = keeps;
  }
}

// v of a unit's rows and of up to kNormEntries entries, from `group` on, its planes added up in order.
template <int R>
__device__ __forceinline__ void put_ranks(const ProductView& p, float4 (&to)[R][kNormEntries][kPageRank / 4], const Tile& tile, int first, int rows, int group) {
  const int entries = min(kNormEntries, tile.entries - group), count = rows * entries * (kPageRank / 4);
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) {
    const int part = i % (kPageRank / 4), pair = i / (kPageRank / 4), row = pair / entries, entry = pair % entries;
    const int64_t at = tile.first_pair + static_cast<int64_t>(first + row) * tile.entries + group + entry;
    const float* from = p.work.v + at * kPageRank + part * 4;
    float4 plane[kMaxRankPlanes];
#pragma unroll
    for (int c = 0; c < kMaxRankPlanes; ++c)
      if (c < p.work.v_planes) plane[c] = __ldcg(reinterpret_cast<const float4*>(from + c * p.work.v_stride));
#pragma unroll
    for (int c = 1; c < kMaxRankPlanes; ++c)
      if (c < p.work.v_planes) plane[0].x += plane[c].x, plane[0].y += plane[c].y, plane[0].z += plane[c].z, plane[0].w += plane[c].w;
    to[row][entry][part] = plane[0];
  }
}

// The warp of v: v of every unit.
template <int R>
__device__ __forceinline__ void send_ranks(const ProductView& p, NormShared<R>& shared, NormUnits units) {
  wait_for_previous();
  NormTurn<2> turn;
  int sent = 0;
  for (; units.left > 0; units.next()) {
    const Tile& tile = units.tile;
    for (int group = 0; group < tile.entries; group += kNormEntries) {
      if (sent >= 2) barrier_wait(shared_address(&shared.v_empty[turn.slot]), turn.parity ^ 1);
      put_ranks(p, shared.v[turn.slot], tile, units.first, units.rows(), group);
      barrier_arrive(shared_address(&shared.v_full[turn.slot]));  // every lane
      ++sent;
      turn.next();
    }
  }
}

// The warps with columns.
template <bool kFloatPlanes, int R, int kHeld>
__device__ __forceinline__ void finish_norm(const NormParams& a, NormShared<kHeld>& shared, const uint8_t* ring, NormUnits units, int warps) {
  const ProductView& p = a.p;
  const int threads = warps * kWarp, warp = warp_index(), quads = p.columns / kQuad, pitch = p.columns * 2;
  auto* residual = static_cast<__nv_bfloat16*>(a.residual);
  auto* out = static_cast<__nv_bfloat16*>(a.out);
  int column[kQuads], at[kQuads];  // and the place of a quad in a rank's row; a quad that is not there reads the first one
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int quad = static_cast<int>(threadIdx.x) + q * threads;
    column[q] = quad < quads ? quad * kQuad : -1;
    at[q] = quad < quads ? quad * 8 : 0;
  }
  uint2 weight[kQuads];
  auto load_weight = [&] {
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      if (column[q] >= 0) weight[q] = __ldg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(a.weight) + column[q]));
  };
  if (R <= 2) load_weight();
  for (int i = threadIdx.x; i < 2 * kHeld * kNormWarps; i += threads)
    if (i % kNormWarps >= warps) (&shared.squares[0][0][0])[i] = 0.f;
  NormTurn<kNormStages> turn, kept;
  NormTurn<2> v_turn;
  bool has_waited = false, has_page = false;
  int parity = 0;
#pragma unroll 1
  for (; units.left > 0; units.next(), parity ^= 1) {
    const int rows = units.rows();
    int row[R];
    uint2 old[R][kQuads];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (!has_waited) row[r] = shared.share_rows()[r];
      else row[r] = r < rows ? __ldg(units.block + units.rows_at + units.tile.place + units.first + r) : -1;
    }
    auto load_old = [&] {  // the residual, which no kernel in flight writes
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int q = 0; q < kQuads; ++q)
          if (row[r] >= 0 && column[q] >= 0)
            old[r][q] = __ldcg(reinterpret_cast<const uint2*>(residual + static_cast<int64_t>(row[r]) * p.columns + column[q]));
    };
    if (R <= 2) load_old();
    const bool keeps = units.keeps_page();
    if (!has_waited) {
      has_waited = true;
      start_dependents();
      wait_for_previous();
    }
    float y[kQuads][R][kQuad];
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < kQuad; ++i) y[q][r][i] = -0.f;
    if constexpr (kFloatPlanes) load_float_rows<R>(y, p, row, column);
    else load_half_rows<R, (R <= 2 ? 4 : 2)>(y, p, row, column);
    if (R > 2) load_old();  // registers for both are not there; the multiply-adds hide it
    const int groups = (units.tile.entries + kNormEntries - 1) / kNormEntries;
    int group = -1;
    auto next_group = [&] {
      if (group >= 0) {
        barrier_arrive(shared_address(&shared.v_empty[v_turn.slot]));
        v_turn.next();
      }
      if (++group < groups) barrier_wait(shared_address(&shared.v_full[v_turn.slot]), v_turn.parity);
    };
    if (has_page) turn = kept;
    else kept = turn;
#pragma unroll 1
    for (bool is_last = false; !is_last; turn.next()) {
      if (!has_page) barrier_wait(shared_address(&shared.full[turn.slot]), turn.parity);
      const NormStage stage = shared.stages[turn.slot];
      is_last = stage.is_last != 0;
      if (stage.count > 0) {
#pragma unroll 1
        while (group < static_cast<int>(static_cast<unsigned>(stage.entry) / kNormEntries)) next_group();
        expand_stage_of<R>(rows, y, ring + turn.slot * kNormStageRanks * pitch, pitch, at, shared.v[v_turn.slot], stage);
      }
      if (!keeps) barrier_arrive(shared_address(&shared.empty[turn.slot]));
    }
#pragma unroll 1
    while (group < groups) next_group();
    has_page = keeps;
    if (R > 2) load_weight();
    float squares[R] = {};
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        if (row[r] < 0 || column[q] < 0) continue;
        float(&x)[kQuad] = y[q][r];
        float before[kQuad];
        unpack_quad(before, old[r][q]);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) x[i] = rounded_bf16(x[i] + before[i]);
        store_quad(residual + static_cast<int64_t>(row[r]) * p.columns + column[q], x);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) squares[r] += x[i] * x[i];
      }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) squares[r] += __shfl_xor_sync(kAllLanes, squares[r], offset);
      if (threadIdx.x % kWarp == 0) shared.squares[parity][r][warp] = squares[r];
    }
    sync_threads_of(kSquaresBarrier, threads);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row[r] < 0) continue;
      float total = 0.f;
      float4 part[kNormWarps / 4];
#pragma unroll
      for (int w = 0; w < kNormWarps / 4; ++w) part[w] = reinterpret_cast<const float4*>(shared.squares[parity][r])[w];
#pragma unroll
      for (int w = 0; w < kNormWarps / 4; ++w) total = total + part[w].x + part[w].y + part[w].z + part[w].w;
      const float scale = rsqrtf(total / p.columns + a.eps);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        if (column[q] < 0) continue;
        float by[kQuad];
        unpack_quad(by, weight[q]);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) y[q][r][i] *= scale * by[i];
        store_quad(out + static_cast<int64_t>(row[r]) * p.columns + column[q], y[q][r]);
      }
    }
  }
  if (!has_waited) wait_for_previous();  // whoever waits for this kernel waits for those before it
}

#endif

template <bool kFloatPlanes, int R>
__global__ void __launch_bounds__((kNormWarps + kNormHelpers) * kWarp, 1) add_rms_norm_lora_kernel(const __grid_constant__ NormParams a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t norm_ring[];
  __shared__ NormShared<R> shared;
  const int warp = warp_index(), lane = threadIdx.x % kWarp, warps = static_cast<int>(blockDim.x) / kWarp - kNormHelpers;
  NormUnits units;
  units.block = a.p.work.tiles;
  const int4 offsets = __ldg(reinterpret_cast<const int4*>(units.block) + 1);  // lora_work.h
  units.tiles_at = offsets.x, units.rows_at = offsets.y, units.entries_at = offsets.z;
  if (warp == warps) {
    if (lane == 0) {
#pragma unroll
      for (int s = 0; s < kNormStages; ++s) barrier_init(shared_address(&shared.full[s]), 1), barrier_init(shared_address(&shared.empty[s]), warps * kWarp);
#pragma unroll
      for (int s = 0; s < 2; ++s) barrier_init(shared_address(&shared.v_full[s]), kWarp), barrier_init(shared_address(&shared.v_empty[s]), warps * kWarp);
      barrier_init_fence();
    }
    if (lane < kNormDealInts / 4) shared.share[lane] = __ldg(norm_line(units.block, a.processors, blockIdx.x) + lane);
    __syncwarp();
    arrive_for(kShareBarrier, blockDim.x);
  } else {
    sync_threads_of(kShareBarrier, blockDim.x);
  }
  const NormShare share = as_norm_share(shared.share);
  units.index = share.index, units.first = share.first, units.size = share.size, units.left = share.units, units.tile = share.tile;
  if (warp == warps) {
    send_pages<R>(a.p, shared, norm_ring, units);
    return;
  }
  if (warp > warps) send_ranks<R>(a.p, shared, units);
  else if (R > 2 && units.size > 2) finish_norm<kFloatPlanes, R>(a, shared, norm_ring, units, warps);
  else finish_norm<kFloatPlanes, (R < 2 ? R : 2)>(a, shared, norm_ring, units, warps);
#endif
}

// Whether the kernel takes this product: rows of B are runs of 16 bytes, and the one module covers all columns.
inline bool fits_norm_lora(const Product& product) {
  if (!is_hopper() || product.lora == nullptr) return false;
  const LoraWork& work = *product.lora;
  return product.columns % 8 == 0 && work.span_count == 1 && work.spans[0].column == 0 && work.spans[0].outputs == product.columns &&
         work.spans[0].b_offset % 8 == 0 && work.page_elements % 8 == 0 && reinterpret_cast<uintptr_t>(work.pages) % 16 == 0;
}

}  // namespace openlora
