// Finishing a prefill's product on tensor cores: thousands of rows, tiles of up to 64, y in bf16.
//
// A warp takes 16 rows of a tile and a run of pairs of 32-column blocks (gate and up, the halves of a head), its block's four warps
// the four parts of one tile and the same run, so that B comes from the first cache for all but one of them. v stays in registers
// as fragments along the run; y and B of the next pair are on their way while the present one is finished: 4 KB a warp, 12 warps a
// processor. Rows are the M side of mma.m16n8k16, ranks its k, columns its n; v is split into two bf16 (hi + lo, exact to 2^-17).
// B goes straight into fragments: lane (g, t) = (lane / 4, lane % 4) takes 4 columns of ranks 2t, 2t + 1, 2t + 8, 2t + 9; which
// columns an instruction's n means is free, and chosen so that the lane ends up with columns 4t + {0..3} and 16 + 4t + {0..3} of
// rows g and g + 8.
//
// Decode takes product.cuh instead: there tiles have few rows, which cost here what sixteen cost.
#pragma once

#include "product.cuh"

namespace openlora {

constexpr int kBlock = 32;       // columns
constexpr int kLaneColumns = 8;  // of a block, a lane's
constexpr int kHalves = 2;       // rows g and g + 8
constexpr int kPartRows = 16;
constexpr int kPrefillBlocks = 3;  // a processor
constexpr int kFewRows = 512;      // up to here product.cuh has more warps at work

// The lane's columns of a block: four from lane_column(0) on, four from lane_column(1) on.
__device__ __forceinline__ int lane_column(int half) { return half * 16 + static_cast<int>(threadIdx.x) % 4 * 4; }

// One page's B of one block of columns, as loaded.
struct PageBlock {
  uint2 rank[4];  // ranks 2t, 2t + 1, 2t + 8, 2t + 9; four columns each
};

// A module's B in an entry's page.
struct PageCursor {
  const __nv_bfloat16* b;
  int outputs;
  int count;  // ranks from this page on; 0 or less: nothing to add

  __device__ __forceinline__ PageCursor() : b(nullptr), outputs(0), count(0) {}
  __device__ __forceinline__ PageCursor(const ProductView& p, int index, const Entry& entry) : PageCursor() {
    if (index < 0) return;
    const LoraSpan& span = p.work.spans[index];
    b = static_cast<const __nv_bfloat16*>(p.work.pages) + entry.page * p.work.page_elements + span.b_offset;
    outputs = span.outputs;
    count = ranks_left(p.work, span.module, entry);
  }
  __device__ __forceinline__ PageBlock load(int column) const {
    const int g = static_cast<int>(threadIdx.x) % kWarp / 4, t = static_cast<int>(threadIdx.x) % 4;
    const __nv_bfloat16* from = b + column + g % 2 * 16 + g / 2 * 4;  // n = 2t and 2t + 1 are the lane's two halves
    PageBlock block;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int rank = 2 * t + i % 2 + 8 * (i / 2);
      block.rank[i] = rank < count ? __ldg(reinterpret_cast<const uint2*>(from + static_cast<int64_t>(rank) * outputs)) : make_uint2(0, 0);
    }
    return block;
  }
};

// v of 16 rows and one page, as the mma's A: hi and lo parts.
struct RowRanks {
  uint32_t hi[kHalves][2];  // ranks 2t, 2t + 1; 2t + 8, 2t + 9 of rows g and g + 8
  uint32_t lo[kHalves][2];

  // `v`: of the first place, this entry and module; a place is `stride` floats further.
  __device__ __forceinline__ void load(const float* v, int64_t stride, int places) {
    const int g = static_cast<int>(threadIdx.x) % kWarp / 4, t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int place = g + 8 * h;
        const float2 pair = place < places ? __ldcg(reinterpret_cast<const float2*>(v + place * stride + 2 * t + 8 * i)) : make_float2(0.f, 0.f);
        hi[h][i] = pack_bf16(pair.x, pair.y);
        lo[h][i] = pack_bf16(pair.x - low_half(hi[h][i]), pair.y - high_half(hi[h][i]));
      }
  }
};

using BlockSum = float[kHalves][kLaneColumns];

// sum[h][4 * half + j] += v B for row g + 8 h and column lane_column(half) + j.
__device__ __forceinline__ void expand(BlockSum& sum, const RowRanks& v, const PageBlock& b) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t select = j % 2 == 0 ? 0x5410 : 0x7632;
    const uint32_t b0 = __byte_perm(j < 2 ? b.rank[0].x : b.rank[0].y, j < 2 ? b.rank[1].x : b.rank[1].y, select);
    const uint32_t b1 = __byte_perm(j < 2 ? b.rank[2].x : b.rank[2].y, j < 2 ? b.rank[3].x : b.rank[3].y, select);
    float c[4] = {sum[0][j], sum[0][4 + j], sum[1][j], sum[1][4 + j]};
    mma_bf16(c, v.hi[0][0], v.hi[1][0], v.hi[0][1], v.hi[1][1], b0, b1);
    mma_bf16(c, v.lo[0][0], v.lo[1][0], v.lo[0][1], v.lo[1][1], b0, b1);
    sum[0][j] = c[0], sum[0][4 + j] = c[1], sum[1][j] = c[2], sum[1][4 + j] = c[3];
  }
}

// y of one block as loaded, and its finishing.
struct RowBlock {
  uint2 y[kHalves][2];

  __device__ __forceinline__ void load(const ProductView& p, const int (&row)[kHalves], int column) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (row[h] >= 0) {
          const auto* from = static_cast<const __nv_bfloat16*>(p.y) + static_cast<int64_t>(row[h]) * p.columns + column + lane_column(half);
          y[h][half] = __ldcg(reinterpret_cast<const uint2*>(from));
        }
  }
  __device__ __forceinline__ void unpack(BlockSum& sum, const ProductView& p, int column) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint2 bias = make_uint2(0, 0);
      if (p.bias != nullptr) bias = __ldg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(p.bias) + column + lane_column(half)));
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        sum[h][4 * half] = low_half(y[h][half].x) + low_half(bias.x);
        sum[h][4 * half + 1] = high_half(y[h][half].x) + high_half(bias.x);
        sum[h][4 * half + 2] = low_half(y[h][half].y) + low_half(bias.y);
        sum[h][4 * half + 3] = high_half(y[h][half].y) + high_half(bias.y);
      }
    }
  }
};

// One of the two streams of blocks of a warp.
struct BlockStream {
  PageCursor cursor;
  PageBlock page;  // of the block to come, first entry
  RowBlock rows;   // of the block to come
  RowRanks v;
  int index;   // of the linear's modules, that cursor is at; -1 where none covers the column
  int loaded;  // index * entries + entry that v holds; -1: none yet

  __device__ __forceinline__ void fetch(const ProductView& p, const TileTable& table, const Tile& tile, int entry, int column, bool is_new) {
    const ModuleColumn found = module_of(p.work, column);
    if (is_new || found.index != index || tile.entries > 1) {
      index = found.index;
      cursor = tile.entries > 0 ? PageCursor(p, index, read_entry(table, tile, entry)) : PageCursor();
    }
    page = cursor.load(found.column);
  }

  // sum = y of the block that `page` and `rows` hold, finished; leaves those of `following` on their way.
  __device__ __forceinline__ void finish(BlockSum& sum, const ProductView& p, const TileTable& table, const RowSpan& span,
                                         const int (&row)[kHalves], int column, int following) {
    rows.unpack(sum, p, column);
    if (following >= 0) rows.load(p, row, following);
    const Tile& tile = span.tile;
    BlockSum delta = {};
#pragma unroll 1
    for (int entry = 0; entry < tile.entries; ++entry) {
      const PageBlock now = page;
      const int now_index = index;
      if (entry + 1 < tile.entries) fetch(p, table, tile, entry + 1, column, false);
      else if (following >= 0) fetch(p, table, tile, 0, following, false);
      if (now_index < 0) continue;
      if (loaded != now_index * tile.entries + entry) {
        loaded = now_index * tile.entries + entry;
        const int modules = p.work.span_count;
        const int64_t stride = static_cast<int64_t>(tile.entries) * modules * kPageRank;
        const float* from = p.work.v + (static_cast<int64_t>(tile.first_pair + entry) * modules + now_index) * kPageRank;
        v.load(from + span.first * stride, stride, span.last - span.first);
      }
      expand(delta, v, now);
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) sum[h][c] += delta[h][c];
  }
};

// Calls finish(i, first, second, row) with y of pair i's blocks for every row of every tile and every pair, 0 <= i < pairs; rows
// that are not there are -1. `columns(i)`: first columns of pair i. Parts have kPartRows rows.
template <class Columns, class Finish>
__device__ __forceinline__ void finish_pairs(const ProductView& p, int pairs, Columns columns, Finish finish) {
  const RowParts<true> parts(p);
  const int tile_parts = parts.tile_parts(), count = parts.count(), warps = gridDim.x * kUnitWarps, g = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int wanted = max(1, min(pairs, 4 * warps / max(count, 1))), length = (pairs + wanted - 1) / wanted, runs = (pairs + length - 1) / length;
  BlockStream first, second;
  wait_for_previous();
  start_dependents();
  for (int unit = blockIdx.x * kUnitWarps + warp_index(); unit < count * runs; unit += warps) {
    const RowSpan span = parts.at(unit / (tile_parts * runs), unit % tile_parts);
    if (span.first >= span.last) continue;
    const int begin = unit / tile_parts % runs * length, end = min(begin + length, pairs);
    int row[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) row[h] = span.first + g + 8 * h < span.last ? parts.row(span, span.first + g + 8 * h) : -1;
    const int2 start = columns(begin);
    first.loaded = second.loaded = -1;
    first.rows.load(p, row, start.x);
    second.rows.load(p, row, start.y);
    if (span.tile.entries > 0) {
      first.fetch(p, parts.table, span.tile, 0, start.x, true);
      second.fetch(p, parts.table, span.tile, 0, start.y, true);
    }
#pragma unroll 1
    for (int i = begin; i < end; ++i) {
      const int2 column = columns(i), following = i + 1 < end ? columns(i + 1) : make_int2(-1, -1);
      BlockSum y[2];
      first.finish(y[0], p, parts.table, span, row, column.x, following.x);
      second.finish(y[1], p, parts.table, span, row, column.y, following.y);
      finish(i, y[0], y[1], row);
    }
  }
}

__device__ __forceinline__ void store_four(__nv_bfloat16* out, const float* x) {
  *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

// Whether finish_pairs suits: a prefill's tiles and blocks of 32 columns that no module's border cuts.
inline bool suits_prefill(const Product& product) {
  if (product.lora == nullptr || product.lora->tile_rows <= kPartRows || product.rows <= kFewRows || product.y_is_float) return false;
  if (product.planes != 1 || product.lora->v_planes != 1) return false;
  bool fits = product.columns % (2 * kBlock) == 0;
  for (int m = 0; m < product.lora->span_count; ++m)
    fits = fits && product.lora->spans[m].column % kBlock == 0 && product.lora->spans[m].outputs % kBlock == 0;
  return fits;
}

}  // namespace openlora
