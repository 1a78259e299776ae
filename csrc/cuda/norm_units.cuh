// How the rows of a step are dealt to the blocks of the norm with adapters: units of neighbouring rows of a tile. See norm_lora.cuh.
#pragma once

#include "device.cuh"

namespace openlora {

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

}  // namespace openlora
