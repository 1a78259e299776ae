// residual += product with adapters, then the norm: B of a page as one stream through shared memory. Hopper; fused_add_rms_norm.cu
// chooses it and has what everything else takes.
//
// A block takes up to R rows of one tile and all columns at a time: W warps (16 at H = 4096) have two quads of columns a thread, as in
// the kernel without adapters, so that bits are those of every other path. One more warp sends for B, 4 ranks (one run of 8 H bytes) a
// stage, six stages: a page of 16 ranks is on its way at once, before the previous kernel has ended. Another one fetches v after the
// wait, adds its planes up and puts it down for all. So after the wait there is one trip for v and the planes of y together, the
// multiply-adds, one barrier. Rows that follow each other in a tile, or in tiles of one page, keep the page.
//
// Rows are dealt so that every block has one unit if it can be: the smallest number of rows a unit (1 to R) that makes no more units
// than blocks. The first blocks find a processor before the GEMM's blocks leave theirs; they send for the pages of all tiles into L2.
//
// Shared memory: 6 * 8 H bytes (192 KB at H = 4096) + 4 KB R of v. Bytes: S T H 2 of planes, B of each page (131 KB) once a unit that
// changes it (from memory once), residual and out. Multiply-adds: 16 x 16 warps x (25 + 8 R) instructions a page and unit: 0.6 us
// for one row, 1 us for two.
// Predicted (B = 64 / 256, D = 64, r = 16): 2 us over no adapters at 64, 3 at 256 (192 KB a processor from L2, 2.7 us).
#pragma once

#include "gemm_tma.cuh"
#include "launch.cuh"
#include "product.cuh"

namespace openlora {

constexpr int kNormWarps = 16;        // with columns, at most
constexpr int kNormHelpers = 2;       // warps: one for B, one for v
#ifndef NORM_STAGE
#define NORM_STAGE 4
#endif
constexpr int kNormStageRanks = NORM_STAGE;
constexpr int kNormStages = 24 / NORM_STAGE;
constexpr int kNormEntries = 32;      // of v that shared memory holds at once

struct NormParams {
  ProductView p;
  void* residual;
  const void* weight;
  float eps;
  void* out;
};

inline int norm_lora_shared_bytes(int columns) { return kNormStages * kNormStageRanks * columns * 2; }

// What a stage holds.
struct NormStage {
  int entry;
  int rank;
  int count;    // of ranks; 0: nothing to add
  int is_last;  // of the unit
};

template <int R>
struct NormShared {
  float4 v[2][R][kNormEntries][kPageRank / 4];
  alignas(16) float squares[2][R][kNormWarps];  // zero for warps that are not there
  NormStage stages[kNormStages];
  uint64_t full[kNormStages], empty[kNormStages];
  uint64_t v_full[2], v_empty[2];
  int share[4];  // first unit's tile, its first place there, rows of a unit, units
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

// A block's units, one after another. Offsets, not pointers: registers are scarce.
struct NormUnits {
  const int32_t* block;  // of tiles
  int tiles_at, rows_at, entries_at;
  Tile tile;
  int index;  // of the tile
  int first;  // place in the tile
  int size;
  int left;

  __device__ __forceinline__ const int4* tiles() const { return reinterpret_cast<const int4*>(block + tiles_at); }
  __device__ __forceinline__ void read() {
    const int4 raw = __ldg(tiles() + 2 * index), entry = __ldg(tiles() + 2 * index + 1);
    tile = {raw.x, raw.y & 0xffff, raw.y >> 16, raw.z, raw.w, as_entry(entry)};
  }
  __device__ __forceinline__ int rows() const { return min(size, tile.rows - first); }
  // Whether the next unit has the same page and no other.
  __device__ __forceinline__ bool keeps_page() const {
    if (left <= 1 || tile.entries != 1) return false;
    if (first + size < tile.rows) return true;
    const int4 raw = __ldg(tiles() + 2 * index + 2);
    return raw.y >> 16 == 1 && __ldg(reinterpret_cast<const int*>(tiles() + 2 * index + 3)) == tile.entry.page;
  }
  __device__ __forceinline__ void next() {
    --left;
    first += size;
    if (left > 0 && first >= tile.rows) ++index, first = 0, read();
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The block's share of all units, found by one warp: a lane counts a run of neighbouring tiles.
template <int R>
__device__ __forceinline__ int4 find_norm_share(const TileTable& table) {
  const int lane = threadIdx.x % kWarp, blocks = gridDim.x, block = blockIdx.x;
  if (R == 1 || table.row_count <= blocks) {  // a unit is a place
    const int index = block < table.row_count ? __ldg(table.tile_of + block) : 0;
    return {index, block < table.row_count ? block - __ldg(reinterpret_cast<const int*>(table.tiles + 2 * index)) : 0, 1, block < table.row_count};
  }
  const int each = (table.tile_count + kWarp - 1) / kWarp, begin = min(table.tile_count, lane * each), end = min(table.tile_count, begin + each);
  int counts[R > 1 ? R - 1 : 1] = {};
#pragma unroll 8
  for (int i = begin; i < end; ++i) {
    const int rows = __ldg(reinterpret_cast<const int*>(table.tiles + 2 * i) + 1) & 0xffff;
#pragma unroll
    for (int size = 2; size <= R; ++size) counts[size - 2] += (rows + size - 1) / size;
  }
  int size = R, mine = counts[R > 1 ? R - 2 : 0], total = 0;
#pragma unroll
  for (int s = R; s >= 2; --s) {
    const int all = static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(counts[s - 2])));
    if (s == R || all <= blocks) size = s, mine = counts[s - 2], total = all;
  }
  int unit = block, count = block < total;
  if (total > blocks) {
    unit = static_cast<int>(static_cast<int64_t>(total) * block / blocks);
    count = static_cast<int>(static_cast<int64_t>(total) * (block + 1) / blocks) - unit;
  }
  int before = mine;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += other;
  }
  before -= mine;
  int index = 0, first = 0;
  const bool has_it = unit >= before && unit < before + mine;
  if (has_it) {
    int at = unit - before;
    for (index = begin;; ++index) {
      const int units = ((__ldg(reinterpret_cast<const int*>(table.tiles + 2 * index) + 1) & 0xffff) + size - 1) / size;
      if (at < units) break;
      at -= units;
    }
    first = at * size;
  }
  const unsigned owner = __ballot_sync(kAllLanes, has_it);
  const int source = owner == 0 ? 0 : __ffs(static_cast<int>(owner)) - 1;
  return {__shfl_sync(kAllLanes, index, source), __shfl_sync(kAllLanes, first, source), size, count};
}

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

// The warp of v: v of every unit, its planes added up in order.
template <int R>
__device__ __forceinline__ void send_ranks(const ProductView& p, NormShared<R>& shared, NormUnits units) {
  const int lane = threadIdx.x % kWarp;
  wait_for_previous();
  NormTurn<2> turn;
  int sent = 0;
  for (; units.left > 0; units.next()) {
    const Tile& tile = units.tile;
    const int rows = units.rows();
    for (int group = 0; group < tile.entries; group += kNormEntries) {
      if (sent >= 2) barrier_wait(shared_address(&shared.v_empty[turn.slot]), turn.parity ^ 1);
      const int entries = min(kNormEntries, tile.entries - group), count = rows * entries * (kPageRank / 4);
      for (int i = lane; i < count; i += kWarp) {
        const int part = i % (kPageRank / 4), pair = i / (kPageRank / 4), row = pair / entries, entry = pair % entries;
        const int64_t at = tile.first_pair + static_cast<int64_t>(units.first + row) * tile.entries + group + entry;
        const float* from = p.work.v + at * kPageRank + part * 4;
        float4 plane[kMaxRankPlanes];
#pragma unroll
        for (int c = 0; c < kMaxRankPlanes; ++c)
          if (c < p.work.v_planes) plane[c] = __ldcg(reinterpret_cast<const float4*>(from + c * p.work.v_stride));
#pragma unroll
        for (int c = 1; c < kMaxRankPlanes; ++c)
          if (c < p.work.v_planes) plane[0].x += plane[c].x, plane[0].y += plane[c].y, plane[0].z += plane[c].z, plane[0].w += plane[c].w;
        shared.v[turn.slot][row][entry][part] = plane[0];
      }
      barrier_arrive(shared_address(&shared.v_full[turn.slot]));  // every lane
      ++sent;
      turn.next();
    }
  }
}

__device__ __forceinline__ void unpack_quad(float (&x)[kQuad], uint2 raw) {
  x[0] = low_half(raw.x), x[1] = high_half(raw.x), x[2] = low_half(raw.y), x[3] = high_half(raw.y);
}

// y[q][r] += v B of a stage, for the first kRows rows.
template <int R, int kRows, int kHeld>
__device__ __forceinline__ void expand_stage(float (&y)[kQuads][R][kQuad], const uint8_t* b, int pitch, const int (&at)[kQuads],
                                             const float4 (&v)[kHeld][kNormEntries][kPageRank / 4], const NormStage& stage, uint32_t b_at, uint32_t v_at) {
  const unsigned entry = static_cast<unsigned>(stage.entry) % kNormEntries, four = static_cast<unsigned>(stage.rank) / 4;
  if (stage.count == kNormStageRanks) {
    constexpr int kTogether = kRows <= 2 ? 4 : 2;
    float4 scales[kRows];
#pragma unroll
    for (int first = 0; first < kNormStageRanks; first += kTogether) {
      if (first % 4 == 0)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#ifdef NORM_ASM
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(scales[r].x), "=f"(scales[r].y), "=f"(scales[r].z), "=f"(scales[r].w)
                       : "r"(v_at + ((r * kNormEntries + entry) * 4 + four + first / 4) * 16));
#else
          scales[r] = v[r][entry][four + first / 4];
#endif
      uint2 raw[kTogether][kQuads];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
#pragma unroll
#ifdef NORM_ASM
        for (int q = 0; q < kQuads; ++q)
          asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(raw[i][q].x), "=r"(raw[i][q].y) : "r"(b_at + (first + i) * pitch + at[q]));
#else
        for (int q = 0; q < kQuads; ++q) raw[i][q] = *reinterpret_cast<const uint2*>(b + (first + i) * pitch + at[q]);
#endif
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          float x[kQuad];
          unpack_quad(x, raw[i][q]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int rank = (first + i) % 4;
            const float scale = rank == 0 ? scales[r].x : (rank == 1 ? scales[r].y : (rank == 2 ? scales[r].z : scales[r].w));
#pragma unroll
            for (int c = 0; c < kQuad; ++c) y[q][r][c] = fmaf(scale, x[c], y[q][r][c]);
          }
        }
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < stage.count; ++i)  // the last ranks of a module
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      float x[kQuad];
      unpack_quad(x, *reinterpret_cast<const uint2*>(b + i * pitch + at[q]));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float scale = reinterpret_cast<const float*>(&v[r][entry][four])[i];
#pragma unroll
        for (int c = 0; c < kQuad; ++c) y[q][r][c] = fmaf(scale, x[c], y[q][r][c]);
      }
    }
}

template <int R, int kHeld>
__device__ __forceinline__ void expand_stage_of(int rows, float (&y)[kQuads][R][kQuad], const uint8_t* b, int pitch, const int (&at)[kQuads],
                                                const float4 (&v)[kHeld][kNormEntries][kPageRank / 4], const NormStage& stage, uint32_t b_at, uint32_t v_at) {
  if (R == 1 || rows == 1) return expand_stage<R, 1>(y, b, pitch, at, v, stage, b_at, v_at);
  if constexpr (R >= 2)
    if (R == 2 || rows == 2) return expand_stage<R, 2>(y, b, pitch, at, v, stage, b_at, v_at);
  if constexpr (R >= 3) expand_stage<R, 3>(y, b, pitch, at, v, stage, b_at, v_at);
}

// Rows of bf16 planes: all loads of kTogether planes are on their way together.
template <int R, int kTogether>
__device__ __forceinline__ void load_half_rows(float (&y)[kQuads][R][kQuad], const ProductView& p, const int (&row)[R], const int (&column)[kQuads]) {
  const auto* from = static_cast<const __nv_bfloat16*>(p.y);
  uint2 raw[kTogether][R][kQuads];
#pragma unroll 1
  for (int first = 0; first < p.planes; first += kTogether) {
#pragma unroll
    for (int s = 0; s < kTogether; ++s)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          raw[s][r][q] = make_uint2(0x80008000u, 0x80008000u);  // -0, which adds nothing to -0 or anything else
          if (first + s < p.planes && row[r] >= 0 && column[q] >= 0)
            raw[s][r][q] = __ldcg(reinterpret_cast<const uint2*>(from + (first + s) * p.plane_stride + static_cast<int64_t>(row[r]) * p.columns + column[q]));
        }
#pragma unroll
    for (int s = 0; s < kTogether; ++s)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          const uint2 x = raw[s][r][q];
          y[q][r][0] += low_half(x.x), y[q][r][1] += high_half(x.x), y[q][r][2] += low_half(x.y), y[q][r][3] += high_half(x.y);
        }
  }
  if (p.bias == nullptr) return;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    if (column[q] < 0) continue;
    const uint2 x = __ldg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(p.bias) + column[q]));
#pragma unroll
    for (int r = 0; r < R; ++r) y[q][r][0] += low_half(x.x), y[q][r][1] += high_half(x.x), y[q][r][2] += low_half(x.y), y[q][r][3] += high_half(x.y);
  }
}

// The same of float32 planes, one row after another: they are for the deterministic setting's long steps.
template <int R>
__device__ __forceinline__ void load_float_rows(float (&y)[kQuads][R][kQuad], const ProductView& p, const int (&row)[R], const int (&column)[kQuads]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      if (row[r] >= 0 && column[q] >= 0) load_quad<true>(y[q][r], p, row[r], column[q]);
    asm volatile("" ::: "memory");
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
  uint32_t ring_at = shared_address(ring), v_base = shared_address(&shared.v[0]);
  asm volatile("" : "+r"(ring_at), "+r"(v_base));
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
    for (int r = 0; r < R; ++r) row[r] = r < rows ? __ldg(units.block + units.rows_at + units.tile.place + units.first + r) : -1;
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
      wait_for_previous();
      start_dependents();
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
        __syncwarp();
        if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&shared.v_empty[v_turn.slot]));
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
        expand_stage_of<R>(rows, y, ring + turn.slot * kNormStageRanks * pitch, pitch, at, shared.v[v_turn.slot], stage,
                            ring_at + turn.slot * kNormStageRanks * pitch, v_base + v_turn.slot * static_cast<uint32_t>(sizeof(shared.v[0])));
      }
      if (!keeps) {
        __syncwarp();
        if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&shared.empty[turn.slot]));
      }
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
  const int warp = warp_index(), warps = static_cast<int>(blockDim.x) / kWarp - kNormHelpers;
  NormUnits units;
  units.block = a.p.work.tiles;
  const int4 offsets = __ldg(reinterpret_cast<const int4*>(units.block) + 1);  // lora_work.h
  units.tiles_at = offsets.x, units.rows_at = offsets.y, units.entries_at = offsets.z;
  if (warp == warps) {
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int s = 0; s < kNormStages; ++s) barrier_init(shared_address(&shared.full[s]), 1), barrier_init(shared_address(&shared.empty[s]), warps);
#pragma unroll
      for (int s = 0; s < 2; ++s) barrier_init(shared_address(&shared.v_full[s]), kWarp), barrier_init(shared_address(&shared.v_empty[s]), warps);
      barrier_init_fence();
    }
    const int4 share = find_norm_share<R>(read_tile_table(units.block));
    if (threadIdx.x % kWarp == 0) *reinterpret_cast<int4*>(shared.share) = share;
    __syncwarp();
    arrive_for(kShareBarrier, blockDim.x);
  } else {
    sync_threads_of(kShareBarrier, blockDim.x);
  }
  __syncwarp();
  units.index = shared.share[0], units.first = shared.share[1], units.size = shared.share[2], units.left = shared.share[3];
  if (units.left > 0) units.read();
  if (warp == warps) send_pages<R>(a.p, shared, norm_ring, units);
  else if (warp > warps) send_ranks<R>(a.p, shared, units);
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
