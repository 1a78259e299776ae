// The expand of many rows' own adapters as a stream: a warp takes one part of a tile and a run of pairs of column blocks, so that
// what does not change along the run (tile, page, v as fragments) is read once, and the next blocks of B are always on their way
// while the present ones are finished. A pair is whatever the operation needs together: gate and up, the halves of a head.
//
// In flight: 2 blocks of 1 KB a warp, 16 warps a processor: 32 KB before anything else. In decode a run is as long as all warps
// of the grid need to share the work once; in prefill the warps of a block take parts of one tile and the same run, so that B
// comes from the first cache for all but one of them.
#pragma once

#include "product.cuh"

namespace openlora {

constexpr int kStreamWarps = 4;
constexpr int kStreamBlocks = 4;  // a processor: 128 registers a thread

// One of the two streams of a warp.
template <int H>
struct ExpandStream {
  PageCursor cursor;
  PageBlock next;
  RowRanks<H> v;
  int index;   // of the linear's modules, that cursor is at; -1 where none covers the column
  int loaded;  // module * entries + entry that v holds; -1: none yet

  // Sends for B of `entry` at `column` of the product.
  __device__ __forceinline__ void fetch(const ProductView& p, const TileTable& table, const Tile& tile, int entry, int column, bool is_new) {
    const ModuleBlock found = module_of(p.work, column);
    if (is_new || found.index != index || tile.entries > 1) {
      index = found.index;
      cursor = tile.entries > 0 ? PageCursor(p, index, read_entry(table, tile, entry)) : PageCursor();
    }
    next = cursor.load(found.column);
  }

  // delta = sum over the tile's entries, of the block that `next` holds first; leaves the first page of `following` in `next`.
  __device__ __forceinline__ void run(float (&delta)[H][kLaneColumns], const ProductView& p, const TileTable& table, const RowSpan& span,
                                      int column, int following) {
#pragma unroll
    for (int h = 0; h < H; ++h)
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) delta[h][c] = 0.f;
    const Tile& tile = span.tile;
#pragma unroll 1
    for (int entry = 0; entry < tile.entries; ++entry) {
      const PageBlock now = next;
      const int now_module = index;
      const bool is_last = entry + 1 == tile.entries;
      if (!is_last) fetch(p, table, tile, entry + 1, column, false);
      else if (following >= 0) fetch(p, table, tile, 0, following, false);
      if (now_module < 0) continue;
      if (loaded != now_module * tile.entries + entry) {
        loaded = now_module * tile.entries + entry;
        const int modules = p.work.span_count;
        const int64_t stride = static_cast<int64_t>(tile.entries) * modules * kPageRank;
        const float* from = p.work.v + (static_cast<int64_t>(tile.first_pair + entry) * modules + now_module) * kPageRank;
        v = load_row_ranks<H>(from + span.first * stride, stride, span.last - span.first);
      }
      expand<H>(delta, v, now);
    }
  }
};

// Calls finish(i, sum, row) with sum[0] and sum[1] = y of the pair's blocks, for every row of every tile and every pair i.
// `columns(i)`: first columns of pair i, 0 <= i < pairs. Parts have 8 H rows.
template <bool kFloatPlanes, int H, class Columns, class Finish>
__device__ __forceinline__ void stream_pairs(const ProductView& p, int pairs, Columns columns, Finish finish) {
  const RowParts<true> parts(p);
  const int tiles = parts.tile_count(), tile_parts = parts.tile_parts(), count = tiles * tile_parts;
  const int warps = gridDim.x * kStreamWarps;
  const int length = (pairs + max(1, min(pairs, warps / max(count, 1))) - 1) / max(1, min(pairs, warps / max(count, 1)));
  const int runs = (pairs + length - 1) / length;
  const int units = count * runs, g = threadIdx.x % kWarp / 4;
  ExpandStream<H> first, second;
  RowSpan span{};
  int begin = 0, end = 0;
  auto start = [&](int unit) {
    // Few rows: neighbours take other columns of the same tile. Many: other rows of it, at the same columns.
    const int run = H == 1 ? unit % runs : unit / tile_parts % runs;
    span = H == 1 ? parts[unit / runs] : parts.at(unit / (tile_parts * runs), unit % tile_parts);
    begin = run * length;
    end = min(begin + length, pairs);
    first.loaded = second.loaded = -1;
    if (span.first >= span.last || span.tile.entries == 0) return;
    const int2 column = columns(begin);
    first.fetch(p, parts.table, span.tile, 0, column.x, true);
    second.fetch(p, parts.table, span.tile, 0, column.y, true);
  };
  int unit = blockIdx.x * kStreamWarps + warp_index();
  if (unit < units) start(unit);
  wait_for_previous();
  while (unit < units) {
    int row[H];
#pragma unroll
    for (int h = 0; h < H; ++h) row[h] = span.first + g + 8 * h < span.last ? parts.row(span, span.first + g + 8 * h) : -1;
    if (span.first < span.last) {
#pragma unroll 1
      for (int i = begin; i < end; ++i) {
        const int2 column = columns(i), following = i + 1 < end ? columns(i + 1) : make_int2(-1, -1);
        float sum[2][H][kLaneColumns], delta[H][kLaneColumns];
        load_product<kFloatPlanes, H>(sum[0], p, row, column.x);
        load_product<kFloatPlanes, H>(sum[1], p, row, column.y);
        add_bias<H>(sum[0], p, column.x);
        add_bias<H>(sum[1], p, column.y);
        first.run(delta, p, parts.table, span, column.x, following.x);
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int c = 0; c < kLaneColumns; ++c) sum[0][h][c] += delta[h][c];
        second.run(delta, p, parts.table, span, column.y, following.y);
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int c = 0; c < kLaneColumns; ++c) sum[1][h][c] += delta[h][c];
        finish(i, sum, row);
      }
    }
    unit += warps;
    if (unit < units) start(unit);
  }
}

// Rows of a part: few where rows are few, so that every processor has work.
inline int stream_rows(int rows) { return rows <= 64 ? 8 : 16; }

}  // namespace openlora
