// The product on its way into an operation, on Hopper: B by the copy engine through a ring of each warp, the expand on tensor cores.
//
// A unit is a tile (in long steps of up to 64 rows) times two boxes of 64 columns that are needed together (gate and up, halves of a head). Units run
// group by group within a tile, and every block takes a run of them whose share of the work is the same (lora_deal.py, one line of 128
// bytes a block), its warps in turn: neighbouring warps read neighbouring 128 bytes of a rank at about the same time, and a block meets
// only two or three tiles. Warps do not wait for each other: each sends for its own B, two loads of at most 4 KB ahead, from before the
// previous kernel has ended until its last unit, and for the next 8 rows of y when those before are finished. Where a block has fewer
// units than warps, these share a unit's rows. Whatever a warp does alone costs it 4 to 6 cycles an instruction, so what stands between
// the start and the first load, and behind the wait, is kept short: it is longer than the loads themselves.
//
// v may come in several planes, and every warp needs it for each of its units. So a block adds up v of the tiles it meets once, splits
// it into two bf16 (hi + lo, exact to 2^-17) and keeps it in shared memory as mma fragments.
//
// Sums: m16n8k16 with v on the M side, hi of 8 rows in rows 0 to 7 and lo of the same in 8 to 15, ranks on k, columns on n. So one
// instruction does 8 rows x 8 columns whatever the tile's rows are, and a row's bits depend on nothing but its own v and B. One row
// costs what eight cost: 64 rows with a LoRA each are 230,000 mma for gate_up, 4 us of the tensor cores while B takes 19. hi and lo
// meet on the way into shared memory (4.25 KB a warp), where the pages of a recipe are added up in order, and from where a half warp
// takes a row at a time, four neighbouring columns of either box a lane: all lanes have columns to finish, and y and the outputs
// pass in whole lines.
//
// Shared memory of SiLU: 16 warps x (2 x 4 KB + 4.25 KB) + 16 KB of v = 219 KB, of which 128 KB are on their way; with one row 28 KB,
// which fit beside the GEMM ahead. 128 registers.
#pragma once

#include <cuda.h>

#include "gemm_tma.cuh"
#include "launch.cuh"
#include "product.cuh"

namespace openlora {

constexpr int kBoxColumns = 64;
constexpr int kBoxes = 2;  // of a unit
constexpr int kBoxHalfBytes = kPageRank / 2 * kBoxColumns * 2;  // 8 ranks: one atom of the copy engine's 128-byte swizzle
constexpr int kStreamStageBytes = kBoxes * 2 * kBoxHalfBytes;
constexpr int kPassRows = 8;
constexpr int kTurns = kPassRows / 2;  // of two rows, one a half warp
constexpr int kDeltaPitch = kBoxes * kBoxColumns + 8;  // floats
constexpr int kFragmentBytes = kPageRank * 4;  // of a pair and module
constexpr int kKeptRows = 1024;  // of a step from which more of v is kept

// How a launch uses shared memory.
struct StreamPlan {
  int warps;
  int stages;  // of a warp's ring
  int pairs;   // whose v a block keeps
  int rows;    // of a pass, at most
  int deal;    // shares that the host has cut the step's work into, one a processor
  int shares;  // of them a block takes
};

constexpr int stream_shared_bytes(const StreamPlan& plan, int modules) {
  return 1024 + plan.warps * (plan.stages * (kStreamStageBytes + 24) + plan.rows * kDeltaPitch * 4) + plan.pairs * modules * kFragmentBytes;
}

// B of each module, [pages, 16, outputs], in boxes of 8 ranks and of 16.
struct StreamMaps {
  CUtensorMap b[kMaxLoraSpans][2];
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

__device__ __forceinline__ void load_box(uint32_t target, const CUtensorMap* map, int column, int rank, int page, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(target),
      "l"(map), "r"(column), "r"(rank), "r"(page), "r"(barrier), "l"(policy)
      : "memory");
}

// Four 8 x 8 blocks of [rank][column], transposed: a lane's two ranks of one column each.
__device__ __forceinline__ void load_matrices(uint32_t (&b)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address)
               : "memory");
}

// A box's module and what an entry has of it, looked up where they change.
struct BoxModule {
  int place = -1;  // of the linear's modules; -1: none covers the column
  int begin = 0;   // its columns
  int end = 0;
  int count = 0;  // ranks from the entry's page on

  template <int G>
  __device__ __forceinline__ void find(const LoraWork& work, int column) {
    if (column >= begin && column < end) return;
    place = -1, begin = 0, end = 0;
#pragma unroll
    for (int m = 0; m < G; ++m)
      if (m < work.span_count && column >= work.spans[m].column && column < work.spans[m].column + work.spans[m].outputs)
        place = m, begin = work.spans[m].column, end = begin + work.spans[m].outputs;
  }
  __device__ __forceinline__ void take_count(const LoraWork& work, const Entry& entry) {
    count = place < 0 ? 0 : ranks_left(work, work.spans[place].module, entry);
  }
  __device__ __forceinline__ int bytes() const { return count > 8 ? 2 * kBoxHalfBytes : (count > 0 ? kBoxHalfBytes : 0); }
};

// A warp's way through its units: every `step`-th.
struct UnitCursor {
  int left;   // units from here to the end of the block's
  int index;  // of the block's tiles
  int group;
  Tile tile;

  __device__ __forceinline__ void start(const int32_t* block, int first_share, const StreamShare& share, int skip, int groups) {
    left = share.units - skip, index = 0, group = share.group + skip;
    while (group >= groups) group -= groups, ++index;
    tile = share.tile;
    if (left > 0 && index > 0) tile = read_share_tile(block, first_share, index);
  }
  __device__ __forceinline__ void advance(const int32_t* block, int first_share, int step, int groups) {
    group += step, left -= step;
    if (left <= 0 || group < groups) return;
    do group -= groups, ++index;
    while (group >= groups);
    tile = read_share_tile(block, first_share, index);
  }
};

__device__ __forceinline__ uint2 split_pair(const float2& sum) {
  const uint32_t high = pack_bf16(sum.x, sum.y);
  return make_uint2(high, pack_bf16(sum.x - low_half(high), sum.y - high_half(high)));
}

// Sent for where this stands.
__device__ __forceinline__ float2 load_pair(const float* from) {
  float2 x;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
  return x;
}

// Ranks r, r + 1 of v of one pair and module, planes added up, the first of them given: hi of both, lo of both.
__device__ __forceinline__ uint2 split_ranks(float2 sum, const float* from, int planes, int64_t stride) {
#pragma unroll 1
  for (int c = 1; c < planes; ++c) {  // rows of 4096 inputs make one
    const float2 more = __ldcg(reinterpret_cast<const float2*>(from + c * stride));
    sum.x += more.x, sum.y += more.y;
  }
  return split_pair(sum);
}
__device__ __forceinline__ uint2 split_ranks(const float* from, int planes, int64_t stride) { return split_ranks(load_pair(from), from, planes, stride); }

__device__ __forceinline__ uint32_t pair_mask(int rank, int count) { return (rank < count ? 0xffffu : 0u) | (rank + 1 < count ? 0xffff0000u : 0u); }

// Two loads under one condition, without a branch, which would move registers about.
__device__ __forceinline__ void load_if(bool is_there, uint2 (&to)[kBoxes], const char* first, const char* second) {
  asm volatile(
      "{\n\t.reg .pred there;\n\tsetp.ne.s32 there, %6, 0;\n\t"
      "@there ld.global.cg.v2.b32 {%0, %1}, [%4];\n\t@there ld.global.cg.v2.b32 {%2, %3}, [%5];\n\t}"
               : "+r"(to[0].x), "+r"(to[0].y), "+r"(to[1].x), "+r"(to[1].y)
               : "l"(first), "l"(second), "r"(static_cast<int>(is_there)));
}

__device__ __forceinline__ void store_if(bool is_there, void* to, const float (&x)[kQuad]) {
  asm volatile("{\n\t.reg .pred there;\n\tsetp.ne.s32 there, %3, 0;\n\t@there st.global.v2.b32 [%0], {%1, %2};\n\t}" ::"l"(to), "r"(pack_bf16(x[0], x[1])),
               "r"(pack_bf16(x[2], x[3])), "r"(static_cast<int>(is_there))
               : "memory");
}

// The same into shared memory.
__device__ __forceinline__ void keep_if(bool is_there, const float2* to, const float2& x) {
  asm volatile("{\n\t.reg .pred there;\n\tsetp.ne.s32 there, %3, 0;\n\t@there st.shared.v2.f32 [%0], {%1, %2};\n\t}" ::"r"(shared_address(to)), "f"(x.x),
               "f"(x.y), "r"(static_cast<int>(is_there))
               : "memory");
}

__device__ __forceinline__ void add_to(float (&sum)[kQuad], const uint2& raw) {
  sum[0] += low_half(raw.x), sum[1] += high_half(raw.x), sum[2] += low_half(raw.y), sum[3] += high_half(raw.y);
}
__device__ __forceinline__ void add_to(float (&sum)[kQuad], const float4& more) { sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w; }

// c[16 x 8] = a[16 x 16] b[16 x 8].
__device__ __forceinline__ void multiply_bf16(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(0.f));
}

// One unit's columns: the boxes' first columns and where their runs end. A box may begin beyond.
struct UnitColumns {
  int first[kBoxes];
  int end[kBoxes];
};

// A lane's two quads of columns: places among the unit's 128. Lanes 16 apart have the same.
struct LanePlaces {
  int at[kBoxes];
};

// Eight rows of a tile on their way: of bf16 planes the first kPlanes.
template <int kPlanes, class Known>
struct PassRows {
  int row;          // lane r % 8: of the product; the last one there is where the tile has fewer
  Known known;      // of that row
  uint2 y[kPlanes > 0 ? kPlanes : 1][kTurns][kBoxes];  // of row 2 turn + lane / 16
};

// finish(columns, is_there, row, facts, first, second) gets y finished: four neighbouring columns of either box, for every row of every tile,
// a half warp at the same row; where not is_there nothing may be written. `unit_columns(group)`: UnitColumns of 0 <= group < groups; no
// module's border lies inside a box. `places`: of this lane. `facts(row)`: what else the operation reads of a row, read before the wait;
// of(r) gives what lane r has. `prepare(columns, facts)`: what finish needs beside, of all rows of a pass before the first is finished.
// kAhead: planes of y that are sent for ahead; 0 for float32, else 1 or 2. kHasBias: there may be one.
template <bool kFloatPlanes, int kAhead, bool kHasBias, int G, class Columns, class Facts, class Prepare, class Finish>
__device__ __forceinline__ void finish_stream(const ProductView& p, const StreamMaps& maps, const StreamPlan& plan, int groups, const LanePlaces& places,
                                              Columns unit_columns, Facts facts, Prepare prepare, Finish finish) {
  extern __shared__ uint8_t stream_shared[];
  const int first_share = static_cast<int>(blockIdx.x) * plan.shares;
  const StreamLine line = load_stream_line(p.work.tiles, first_share, min(first_share + plan.shares, plan.deal) - 1);
  const StreamTable table = read_stream_table(p.work.tiles);
  const int warp = warp_index(), lane = static_cast<int>(threadIdx.x & 31), g = lane / 4, t = lane % 4;
  uint8_t* const base = stream_shared + (1024 - (shared_address(stream_shared) & 1023)) % 1024;
  const uint32_t ring = shared_address(base) + warp * plan.stages * kStreamStageBytes;
  uint8_t* const behind = base + plan.warps * plan.stages * kStreamStageBytes;
  float* const delta = reinterpret_cast<float*>(behind + warp * plan.rows * kDeltaPitch * 4);
  uint4* const ranks = reinterpret_cast<uint4*>(behind + plan.warps * plan.rows * kDeltaPitch * 4);
  uint8_t* const after = reinterpret_cast<uint8_t*>(ranks) + plan.pairs * p.work.span_count * kFragmentBytes;
  int4* const facts_of = reinterpret_cast<int4*>(after) + warp * plan.stages;  // a load's counts and modules, the first where there is none
  const uint32_t barrier = shared_address(after) + plan.warps * plan.stages * 16 + warp * plan.stages * 8;
  if (warp == 0 && lane < p.work.span_count) asm volatile("prefetch.tensormap [%0];" ::"l"(&maps.b[lane][1]) : "memory");
  if (lane < plan.stages) barrier_init(barrier + 8 * lane, 1);
  barrier_init_fence();

  const StreamShare share = as_stream_share(line, groups);
  // Where a block has fewer units than warps, two or more of these share the rows of each.
  int share_bits = 0;
  while ((kPassRows << share_bits) < table.largest && (2 << share_bits) * share.units <= plan.warps) ++share_bits;
  // Of long tiles as well where a block has few units and no others: with whole ones some warps would have one more.
  if (table.largest > kMostTileRows && share.units < 8 * plan.warps && share.pairs >= 3 * kMostTileRows * (line.end.w - line.first.x + 1))
    share_bits = max(share_bits, 2);
  const int sharers = 1 << share_bits, own_pass = warp & (sharers - 1), step = plan.warps >> share_bits;
  const int own_unit = warp >> share_bits < step ? warp >> share_bits : share.units;
  const uint64_t policy = policy_evict_first();
  auto passes_of = [&](const Tile& tile) { return (tile.rows + (sharers - own_pass) * kPassRows - 1) / kPassRows >> share_bits; };
  // Pages that all find a stage stay for all passes over the tile's rows; more are sent for again in each pass.
  auto loads_of = [&](const Tile& tile) { return tile.entries <= plan.stages ? tile.entries : tile.entries * passes_of(tile); };

  UnitCursor ahead{};  // of what is sent for
  int sent = 0, sent_entry = 0, sent_stage = 0;
  BoxModule box[kBoxes];
  auto has_nothing = [&](const UnitCursor& cursor, bool sends) {
    return cursor.left > 0 && (own_pass * kPassRows >= cursor.tile.rows || (sends && cursor.tile.entries == 0));
  };
  auto send = [&] {
    if (ahead.left <= 0) return;
    Entry entry = ahead.tile.entry;
    if (ahead.tile.entries > 1) {
      entry = as_entry(load_known(reinterpret_cast<const int4*>(p.work.tiles + table.entries) + ahead.tile.first_entry + sent_entry));
      if (++sent_entry == ahead.tile.entries) sent_entry = 0;
    }
    const UnitColumns columns = unit_columns(ahead.group);
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) box[b].find<G>(p.work, columns.first[b]), box[b].take_count(p.work, entry);
    if (lane == 0) {
      const uint32_t full = barrier + 8 * sent_stage, target = ring + sent_stage * kStreamStageBytes;
      facts_of[sent_stage] = make_int4(box[0].count, box[1].count, max(box[0].place, 0), max(box[1].place, 0));
      barrier_expect(full, box[0].bytes() + box[1].bytes());
#pragma unroll
      for (int b = 0; b < kBoxes; ++b)
        if (box[b].count > 0)
          load_box(target + 2 * b * kBoxHalfBytes, &maps.b[box[b].place][box[b].count > 8 ? 1 : 0], columns.first[b] - box[b].begin, 0, entry.page, full,
                   policy);
    }
    __syncwarp();
    if (++sent_stage == plan.stages) sent_stage = 0;
    if (++sent >= loads_of(ahead.tile)) {
      sent = 0;
#pragma unroll 1
      do ahead.advance(p.work.tiles, first_share, step, groups);
      while (has_nothing(ahead, true));
    }
  };
  UnitCursor own{};  // of what is summed
  int pass = own_pass;
  using Known = decltype(facts(0));
  PassRows<kAhead, Known> coming{};
  auto column_at = [&](const UnitColumns& columns, int b) {
    return places.at[b] < kBoxColumns ? columns.first[0] + places.at[b] : columns.first[1] + places.at[b] - kBoxColumns;
  };
  auto has_columns = [&](const UnitColumns& columns) { return column_at(columns, 0) < (places.at[0] < kBoxColumns ? columns.end[0] : columns.end[1]); };
  int located = -1;  // the tile and pass whose rows `coming` has
  auto find_rows = [&] {
    const int place = min(pass * kPassRows + lane % kPassRows, own.tile.rows - 1);
    coming.row = load_known(p.work.tiles + table.rows + own.tile.place + place);
    located = own.index * kPassRows + pass;
  };
  auto find_facts = [&] { coming.known = facts(coming.row); };
  auto row_of = [&](int turn) { return static_cast<uint32_t>(__shfl_sync(kAllLanes, coming.row, 2 * turn + lane / 16)); };
  constexpr int kElement = kFloatPlanes ? 4 : 2;
  const uint32_t row_bytes = static_cast<uint32_t>(p.columns) * kElement;
  // Where a lane's columns begin in a row, in bytes; lanes without columns read others'.
  auto column_bytes = [&](const UnitColumns& columns, int b) { return static_cast<uint32_t>(has_columns(columns) ? column_at(columns, b) : 0) * kElement; };
  auto y_at = [&](int plane, uint32_t offset) { return static_cast<const char*>(p.y) + plane * p.plane_stride * kElement + offset; };
  auto fetch = [&] {
    if (kAhead == 0 || own.left <= 0) return;
    const UnitColumns columns = unit_columns(own.group);
    const uint32_t from[kBoxes] = {column_bytes(columns, 0), column_bytes(columns, 1)};
    const int rows = own.tile.rows - pass * kPassRows;
    const bool has_second = kAhead > 1 && p.planes > 1;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      if (i > 0 && 2 * i >= rows) break;
      const uint32_t row = row_of(i) * row_bytes;  // of a bf16 plane: below 4 GB
      load_if(2 * i < rows, coming.y[0][i], y_at(0, row + from[0]), y_at(0, row + from[1]));
      if (kAhead > 1) load_if(2 * i < rows && has_second, coming.y[kAhead - 1][i], y_at(1, row + from[0]), y_at(1, row + from[1]));
    }
  };
  own.start(p.work.tiles, first_share, share, own_unit, groups);
  ahead = own;
#pragma unroll 1
  while (has_nothing(own, false)) own.advance(p.work.tiles, first_share, step, groups);
  const bool has_units = own.left > 0;
  if (has_units) find_rows();
#pragma unroll 1
  while (has_nothing(ahead, true)) ahead.advance(p.work.tiles, first_share, step, groups);
  __syncwarp();
#pragma unroll 1
  for (int s = 0; s < plan.stages; ++s) send();
  if (has_units) find_facts();

  // v of the block's tiles, from the first one's first pair on.
  const int first_pair = share.first_pair, kept = share.units > 0 ? min(plan.pairs, share.pairs) : 0;
  const float* const v = p.work.v + static_cast<int64_t>(first_pair) * p.work.span_count * kPageRank;
  start_dependents();
  wait_for_previous();
  // v first, which all of the block waits for, then y. A quad's A of the mma, in order: lane t has ranks 2t, 2t + 1, hi and lo, then
  // 2t + 8, 2t + 9.
  const int pieces = kept * p.work.span_count * 8;
  auto piece_of = [&](int i) { return v + i / 8 * kPageRank + i % 8 / 2 * 2 + i % 2 * 8; };
  const int own_piece = static_cast<int>(threadIdx.x);
  float2 first_plane{};
  if (own_piece < pieces) first_plane = load_pair(piece_of(own_piece));
  fetch();
  if (own_piece < pieces) reinterpret_cast<uint2*>(ranks)[own_piece] = split_ranks(first_plane, piece_of(own_piece), p.work.v_planes, p.work.v_stride);
#pragma unroll 1
  for (int i = own_piece + static_cast<int>(blockDim.x); i < pieces; i += static_cast<int>(blockDim.x))
    reinterpret_cast<uint2*>(ranks)[i] = split_ranks(piece_of(i), p.work.v_planes, p.work.v_stride);
  __syncthreads();

  const bool keeps = g < plan.rows;  // lanes beyond, where the step has fewer rows than a pass, keep nothing and read what nobody writes
  const float* const known_floats = reinterpret_cast<const float*>(ranks);
  const int same_banks = static_cast<int>(delta + g * kDeltaPitch - known_floats) & 31;  // as the row that is not there: no bank twice
  const float* const own_delta = (keeps ? delta + g * kDeltaPitch : known_floats + same_banks) + 2 * t;
  const uint32_t matrices = ring + lane / 8 % 2 * kBoxHalfBytes + lane % 8 * 128 + ((lane / 16 ^ lane % 8) << 4);
  int stage = 0;
  uint32_t parity = 0;
  while (own.left > 0) {
    const Tile& tile = own.tile;
    const int rows = min(tile.rows - pass * kPassRows, kPassRows);
    const bool stays = tile.entries <= plan.stages, is_last = (pass + sharers) * kPassRows >= tile.rows;
    const UnitColumns columns = unit_columns(own.group);
    const bool has = has_columns(columns);
    const int row_pair = tile.first_pair - first_pair + (pass * kPassRows + min(g, rows - 1)) * tile.entries;
    const bool is_kept = tile.first_pair - first_pair + tile.rows * tile.entries <= kept;
    const uint4* const row_ranks = ranks + static_cast<uint32_t>(row_pair * p.work.span_count * 4 + t);
    int at = stage;
    uint32_t at_parity = parity;
    auto expand = [&](auto first, int e) {
      barrier_wait(barrier + 8 * at, at_parity);
      const int4 known = facts_of[at];
      const int count[kBoxes] = {known.x, known.y}, place[kBoxes] = {known.z, known.w};
      uint4 part[kBoxes];
#pragma unroll
      for (int b = 0; b < kBoxes; ++b) {
        const uint32_t piece = static_cast<uint32_t>(e * p.work.span_count + place[b]);
        if (is_kept) {
          part[b] = row_ranks[piece * 4];
        } else {
          const float* const of_pair = v + (static_cast<int64_t>(row_pair) * p.work.span_count + piece) * kPageRank + t * 2;
          const uint2 low = split_ranks(of_pair, p.work.v_planes, p.work.v_stride);
          const uint2 high = split_ranks(of_pair + 8, p.work.v_planes, p.work.v_stride);
          part[b] = make_uint4(low.x, low.y, high.x, high.y);
        }
      }
      const uint32_t from = matrices + at * kStreamStageBytes;
#pragma unroll
      for (int b = 0; b < kBoxes; ++b) {
        uint32_t raw[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) load_matrices(raw[j], (from ^ (j << 5)) + b * 2 * kBoxHalfBytes);
        if (count[b] < kPageRank) {
          const uint32_t mask[2] = {pair_mask(2 * t, count[b]), pair_mask(2 * t + 8, count[b])};
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) raw[j][i] &= mask[i % 2];
          if (count[b] <= 0) part[b] = make_uint4(0, 0, 0, 0);
        }
        float sum[8][4];  // hi of row g and columns 8j + 2t, 8j + 2t + 1; lo of the same
#pragma unroll
        for (int j = 0; j < 8; ++j) multiply_bf16(sum[j], part[b], raw[j / 2][j % 2 * 2], raw[j / 2][j % 2 * 2 + 1]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float2 both = make_float2(sum[j][0] + sum[j][2], sum[j][1] + sum[j][3]);
          const auto* at_delta = reinterpret_cast<const float2*>(own_delta + b * kBoxColumns + j * 8);
          if constexpr (!decltype(first)::value) both.x += at_delta->x, both.y += at_delta->y;
          keep_if(keeps, at_delta, both);
        }
      }
      if (is_last || !stays) {
        __syncwarp();  // the stage has been read
        send();
      }
      if (++at == plan.stages) at = 0, at_parity ^= 1;
    };
    if (tile.entries > 0) expand(std::true_type{}, 0);
#pragma unroll 1
    for (int e = 1; e < tile.entries; ++e) expand(std::false_type{}, e);
    if (is_last || !stays) stage = at, parity = at_parity;

    __syncwarp();
    const int2 column = make_int2(column_at(columns, 0), column_at(columns, 1));
    uint2 bias[kBoxes] = {};
    if (kHasBias && p.bias != nullptr && has) {
      const auto* from = static_cast<const __nv_bfloat16*>(p.bias);
      bias[0] = __ldg(reinterpret_cast<const uint2*>(from + column.x)), bias[1] = __ldg(reinterpret_cast<const uint2*>(from + column.y));
    }
    using Ready = decltype(prepare(column, coming.known));
    auto prepare_turn = [&](int turn) { return prepare(column, coming.known.of(2 * turn + lane / 16)); };
    auto finish_turn = [&](auto turn, const Ready& ready) {
      constexpr int kTurn = decltype(turn)::value;
      const int r = 2 * kTurn + lane / 16;
      const uint32_t row = row_of(kTurn);
      float y[kBoxes][kQuad];
#pragma unroll
      for (int b = 0; b < kBoxes; ++b) {
        if constexpr (kFloatPlanes) {
          const char* const from = static_cast<const char*>(p.y) + static_cast<uint64_t>(row) * row_bytes + column_bytes(columns, b);
#pragma unroll
          for (int c = 0; c < kQuad; ++c) y[b][c] = 0.f;
#pragma unroll 1
          for (int s = 0; s < p.planes; ++s) add_to(y[b], __ldcg(reinterpret_cast<const float4*>(from + s * p.plane_stride * kElement)));
        } else {
          const uint2 raw = coming.y[0][kTurn][b];
          y[b][0] = low_half(raw.x), y[b][1] = high_half(raw.x), y[b][2] = low_half(raw.y), y[b][3] = high_half(raw.y);
#pragma unroll
          for (int s = 1; s < kAhead; ++s)
            if (s < p.planes) add_to(y[b], coming.y[s][kTurn][b]);
        }
        if constexpr (kHasBias) add_to(y[b], bias[b]);
        if (tile.entries > 0) add_to(y[b], *reinterpret_cast<const float4*>(delta + r * kDeltaPitch + places.at[b]));
      }
      finish(column, has && r < rows, static_cast<int>(row), coming.known.of(r), ready, y[0], y[1]);
    };
    if (rows > 4) {
      const Ready ready[kTurns] = {prepare_turn(0), prepare_turn(1), prepare_turn(2), prepare_turn(3)};
      finish_turn(std::integral_constant<int, 0>{}, ready[0]);
      finish_turn(std::integral_constant<int, 1>{}, ready[1]);
      finish_turn(std::integral_constant<int, 2>{}, ready[2]);
      finish_turn(std::integral_constant<int, 3>{}, ready[3]);
    } else {
      const Ready ready[2] = {prepare_turn(0), prepare_turn(1)};
      finish_turn(std::integral_constant<int, 0>{}, ready[0]);
      if (rows > 2) finish_turn(std::integral_constant<int, 1>{}, ready[1]);
    }
    __syncwarp();  // delta has been read
    if (is_last) {
#pragma unroll 1
      do own.advance(p.work.tiles, first_share, step, groups);
      while (has_nothing(own, false));
      pass = own_pass;
    } else {
      pass += sharers;
    }
    if (own.left <= 0) break;
    if (located != own.index * kPassRows + pass) find_rows(), find_facts();
    fetch();
  }
}

#endif

// ---- Launching.

inline bool encode_page_map(CUtensorMap* map, const LoraWork& work, const LoraSpan& span, int ranks) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) return false;
  constexpr cuuint64_t kPages = 1 << 20;  // more than there are: which of them exist the tiles say
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(span.outputs), kPageRank, kPages};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(span.outputs) * 2, static_cast<cuuint64_t>(work.page_elements) * 2};
  const cuuint32_t box[3] = {kBoxColumns, static_cast<cuuint32_t>(ranks), 1}, steps[3] = {1, 1, 1};
  auto* from = const_cast<__nv_bfloat16*>(static_cast<const __nv_bfloat16*>(work.pages) + span.b_offset);
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, from, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Whether finish_stream can run: Hopper, bf16, adapters, everything aligned for the copy engine, and no module's border inside a box of
// 64 columns counted from a multiple of `run`. `most_planes`: of bf16.
inline bool suits_stream(const Product& product, int run, int most_planes) {
  if (product.lora == nullptr || product.is_float || product.columns % 8 != 0 || !is_hopper()) return false;
  if (!product.y_is_float && product.planes > most_planes) return false;
  const LoraWork& work = *product.lora;
  bool fits = reinterpret_cast<uintptr_t>(product.y) % 16 == 0 && reinterpret_cast<uintptr_t>(product.bias) % 8 == 0 &&
              reinterpret_cast<uintptr_t>(work.pages) % 16 == 0 && work.page_elements % 8 == 0 && reinterpret_cast<uintptr_t>(work.v) % 8 == 0 &&
              work.v_planes <= kMaxRankPlanes && static_cast<int64_t>(product.rows) * product.columns < int64_t{1} << 31;
  for (int m = 0; m < work.span_count; ++m) {
    const LoraSpan& span = work.spans[m];
    const int end = span.column + span.outputs;
    fits = fits && span.b_offset % 8 == 0 && span.outputs % 8 == 0 && span.column % run % kBoxColumns == 0 && (end % run % kBoxColumns == 0);
  }
  return fits;
}

// Warps, stages and kept pairs for so many rows. A block of one row takes little shared memory, so that it can start beside the kernel
// before it. Where there are few units at most, there are few blocks: they start on the processors that the kernel before leaves first.
inline StreamPlan stream_plan(int rows, int modules, int groups, int processors, int warps) {
  const int most_rows = std::min(rows, kPassRows);
  if (rows == 1) return {2, 3, 8, most_rows, processors, 1};
  const int64_t blocks = (static_cast<int64_t>(rows) * groups + warps - 1) / warps;  // that have work, at most
  return {warps, 2, (rows > kKeptRows ? 24576 : 16384) / (modules * kFragmentBytes), most_rows, processors, std::max(1, static_cast<int>(processors / blocks))};
}

// Calls `go` with the template arguments of a stream kernel of at most `warps` warps, its maps and its shape.
template <class Go>
cudaError_t with_stream(const Product& product, int groups, int processors, int warps, Go go) {
  const LoraWork& work = *product.lora;
  const StreamPlan plan = stream_plan(product.rows, work.span_count, groups, processors, warps);
  const Shape shape{(plan.deal + plan.shares - 1) / plan.shares, plan.warps * kWarp, stream_shared_bytes(plan, work.span_count)};
  StreamMaps maps;
  for (int m = 0; m < kMaxLoraSpans; ++m)
    for (int size = 0; size < 2; ++size)
      if (!encode_page_map(&maps.b[m][size], work, work.spans[m < work.span_count ? m : 0], size == 0 ? kPageRank / 2 : kPageRank))
        return cudaErrorInvalidValue;
  return product.y_is_float ? go(std::true_type{}, maps, plan, shape) : go(std::false_type{}, maps, plan, shape);
}

}  // namespace openlora
