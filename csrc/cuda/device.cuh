// What the kernels share of the instruction set: dependent launches, bf16 tensor cores. Nothing here knows a shape.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "lora_work.h"

namespace openlora {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Lets the next kernel of the stream start as soon as every block of this one has come here (Hopper; nothing before it).
//
// A GEMM calls it after its own wait, so a shrink behind it may read the same x at once, and whatever was written before a product began
// its consumer may read before the wait. Consumers, attention and a shrink before a GEMM call it before their wait: what follows them
// finds a processor the moment the GEMM ahead leaves it, and reads only weights, pages, older keys and what the host sent before its own.
__device__ __forceinline__ void start_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits for the end of the kernels before this one and makes their writes visible; returns at once in a plain launch.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// c[16 x 8] += a[16 x 16] b[16 x 8], bf16 in, float32 out. Lane (g, t) = (lane / 4, lane % 4) holds rows g and g + 8 of a and c.
__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float rounded_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// The warp's number in its block, in a form that shows the compiler that it is the same for all lanes.
__device__ __forceinline__ int warp_index() { return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0); }

// x / (1 + e^-x) to 2^-21, in five instructions; the division that rounds correctly costs more than the rest of a GEMM's epilogue.
__device__ __forceinline__ float silu(float x) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
  return x * inverse;
}

// One element of the model's type.
template <class T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (sizeof(T) == 4) return x;
  else return __bfloat162float(x);
}
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else return __float2bfloat16_rn(x);
}

// Data that no kernel of the step writes and that each block reads once: keep it out of L1.
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// 16 bytes from device memory, past L1, to shared memory; wait_for_copies waits for those of this thread.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Data that no kernel of the step writes, through L1: sent for where this stands, and once, however often the compiler finds use for it.
__device__ __forceinline__ int load_known(const int* p) {
  int x;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
__device__ __forceinline__ int4 load_known(const int4* p) {
  int4 x;
  asm volatile("ld.global.nc.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}

// The tiles of a step, as lora_tiles.py laid them out.
struct TileTable {
  const int4* tiles;
  const int* rows;
  const int4* entries;
  const int4* items;
  const int* tile_of;
  int tile_count;
  int item_count;
  int row_count;
  int largest;
};

__device__ __forceinline__ TileTable read_tile_table(const int32_t* block) {
  const int4 counts = __ldg(reinterpret_cast<const int4*>(block));
  const int4 offsets = __ldg(reinterpret_cast<const int4*>(block) + 1);
  const int2 more = __ldg(reinterpret_cast<const int2*>(block + 8));
  return {reinterpret_cast<const int4*>(block + offsets.x), block + offsets.y, reinterpret_cast<const int4*>(block + offsets.z),
          reinterpret_cast<const int4*>(block + offsets.w), block + more.y, counts.x, counts.y, counts.z, more.x};
}

struct Entry {
  int page;
  int slot;
  int packed;  // ordinal | uniform << 16
  float weight;

  // The page is the slot's so many-th.
  __device__ __forceinline__ int ordinal() const { return packed & 0xffff; }
  // Ranks of every module in the page; 0: they differ.
  __device__ __forceinline__ int uniform() const { return packed >> 16; }
};

__device__ __forceinline__ Entry as_entry(int4 raw) { return {raw.x, raw.y, raw.z, __int_as_float(raw.w)}; }

struct Tile {
  int place;  // first index into TileTable::rows
  int rows;
  int entries;
  int first_entry;
  int first_pair;
  Entry entry;  // the first one
};

__device__ __forceinline__ Tile as_tile(int4 raw, int4 entry) { return {raw.x, raw.y & 0xffff, raw.y >> 16, raw.z, raw.w, as_entry(entry)}; }

__device__ __forceinline__ Tile read_tile(const TileTable& table, int index) {
  return as_tile(__ldg(table.tiles + 2 * index), __ldg(table.tiles + 2 * index + 1));
}

// ---- The deal: what the host gave each block. One line (two) of loads that wait for nothing.

// A run of a block's (tile, group), group by group within a tile.
struct StreamShare {
  int group;       // of the first tile, where it begins; all of that tile's: the next one's first
  int units;       // 0: nothing, and the tile is none
  int first_pair;  // of the first tile
  int pairs;       // from there to the end of the last tile of the run, at least
  Tile tile;       // the first one
};

// The first group of a tile that begins at or behind `place` of its weight. Neighbouring blocks compute it in the same way, so they agree.
__device__ __forceinline__ int group_of(int place, int weight, int groups) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(static_cast<float>(weight)));
  const int group = __float2int_ru(__fmul_rn(__fmul_rn(static_cast<float>(place), inverse), static_cast<float>(groups)));
  return place == 0 ? 0 : min(group, groups);
}

__device__ __forceinline__ const int4* stream_line(const int32_t* block, int share) {
  return reinterpret_cast<const int4*>(block + kTileHeader + share * kStreamDealInts);
}

// What a block reads of its shares, `from` to `last` of the deal. Apart from what follows from it, so that a kernel can do what needs
// neither while the loads are on their way.
struct StreamLine {
  int4 first, second, tile, entry, end, behind;
};
__device__ __forceinline__ StreamLine load_stream_line(const int32_t* block, int from, int last) {
  const int4 *const line = stream_line(block, from), *const end_line = stream_line(block, last);
  return {load_known(line), load_known(line + 1), load_known(line + 2), load_known(line + 3), load_known(end_line), load_known(end_line + 1)};
}

// What this block does. groups: units that the kernel cuts a tile's columns into.
__device__ __forceinline__ StreamShare as_stream_share(const StreamLine& line, int groups) {
  const int4 &first = line.first, &second = line.second, &end = line.end, &behind = line.behind;
  const int begin_group = group_of(first.y, first.z, groups), end_group = group_of(behind.x, behind.y, groups);
  return {begin_group, (end.w - first.x) * groups + end_group - begin_group, second.z, behind.z + behind.w - second.z, as_tile(line.tile, line.entry)};
}

// What else a block needs of the header: offsets of rows and entries, and rows of the largest streamed tile.
struct StreamTable {
  int rows, entries, largest;
};
__device__ __forceinline__ StreamTable read_stream_table(const int32_t* block) {
  const int4 offsets = load_known(reinterpret_cast<const int4*>(block) + 1);
  return {offsets.y, offsets.z, load_known(block + 15)};
}

// The so many-th tile from the first of share `from` on: out of that share's line where it has it, which is in L1 by then.
__device__ __forceinline__ Tile read_share_tile(const int32_t* block, int from, int index) {
  const int4* const line = stream_line(block, from);
  if (index < kStreamDealTiles) {
    const int4 tile = load_known(line + 2 + 2 * index), entry = load_known(line + 3 + 2 * index);
    if (tile.y != 0) return as_tile(tile, entry);
  }
  const int4* const tiles = reinterpret_cast<const int4*>(block + load_known(block + 14)) + 2 * (load_known(line).x + index);
  const int4 tile = load_known(tiles), entry = load_known(tiles + 1);
  return as_tile(tile, entry);
}

// A block's units of the norm, neighbours. rows[i]: of x and y, of the first unit, -1 where it has fewer.
struct NormShare {
  int index;  // of the tile of the first unit
  int first;  // place in that tile
  int size;   // rows of a unit, 1 to 3; a tile's last one may have fewer
  int units;  // 0: nothing, and nothing else here is anything
  Tile tile;
  int rows[3];
};

__device__ __forceinline__ const int4* norm_line(const int32_t* block, int processors, int b) {
  return reinterpret_cast<const int4*>(block + kTileHeader + processors * kStreamDealInts + b * kNormDealInts);
}

// Of a line, wherever it is.
__device__ __forceinline__ NormShare as_norm_share(const int4* line) {
  const int4 units = line[0], rows = line[3];
  return {units.x, units.y, units.z, units.w, as_tile(line[1], line[2]), {rows.x, rows.y, rows.z}};
}
__device__ __forceinline__ NormShare read_norm_share(const int32_t* block, int processors, int b) {
  const int4* const from = norm_line(block, processors, b);
  const int4 line[4] = {__ldg(from), __ldg(from + 1), __ldg(from + 2), __ldg(from + 3)};
  return as_norm_share(line);
}

// Items stand behind the deals: two int4 each, of the number that is the block's second int.
__device__ __forceinline__ const int4* dealt_items(const int32_t* block, int processors) {
  return reinterpret_cast<const int4*>(block + kTileHeader + processors * (kStreamDealInts + kNormDealInts));
}

// What a shrink computes: an entry for the rows of its tile.
struct DealtItem {
  int place;  // first index into TileTable::rows
  int rows;
  int entries;  // of the tile
  int first_pair;
  int index;  // of the entry in its tile
  Entry entry;
};

__device__ __forceinline__ DealtItem read_item(const int32_t* block, int processors, int index) {
  const int4* const items = dealt_items(block, processors) + 2 * index;
  const int4 raw = __ldg(items), entry = __ldg(items + 1);
  return {raw.x, raw.y & 0xffff, raw.y >> 16, raw.z, raw.w, as_entry(entry)};
}

// Ranks of module `module` from an entry's page on: none where it is 0 or less, all 16 of the page where it is 16 or more. It is
// not clamped, and must not be before it is compared with 16: ptxas 13.0 turns min(max(left, 0), 16) == 16 into VIMNMX with a
// predicate that says the opposite (found as NaN from ranks that no page holds). Where the entry says it, nothing is loaded.
__device__ __forceinline__ int ranks_left(const LoraWork& work, int module, const Entry& entry) {
  if (entry.uniform() != 0) return entry.uniform();
  return __ldg(work.ranks + static_cast<int64_t>(module) * work.slots + entry.slot) - entry.ordinal() * kPageRank;
}

}  // namespace openlora
