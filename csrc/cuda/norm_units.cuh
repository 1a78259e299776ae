// A run of units of the norm with adapters: neighbouring rows of a tile, as lora_deal.py dealt them to a block. See norm_lora.cuh.
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

}  // namespace openlora
