// What both kinds of attention items share: asynchronous copies, tensor-core instructions, and the ring of keys and values that a warp fills.
#pragma once

#include <cstdint>

#include "attention_decode.h"
#include "device.cuh"

namespace openlora {
namespace {

constexpr int kTileKeys = 16;
constexpr float kMinusInfinity = -__builtin_inff();

// 16 bytes to shared memory; zeros where `bytes` is 0, so that an unwritten cache entry never enters a sum.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
        : "r"(from)
        : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&a)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
        : "r"(from)
        : "memory");
}

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c += a b: a 16 x 16, b 16 x 8, bfloat16; c float32.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}

// Largest over the lanes that hold the other keys of the same heads.
__device__ __forceinline__ float max_over_keys(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 16));
}

__device__ __forceinline__ float sum_over_keys(float x) {
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

// kHead: head size. kColumns: tiles of 8 query heads. kWarps, kStages: see the top.
template <int kHead, int kColumns, int kWarps, int kStages>
struct AttentionRing {
  static constexpr int kRowBytes = kHead * 2;
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  static constexpr int kChunks = kRowBytes / 16;           // 16-byte pieces of a row
  static constexpr int kRowsACopy = 32 / kChunks;          // rows that one instruction of a warp copies
  static constexpr int kSteps = kHead / 16;
  static constexpr int kWarpBytes = kStages * 2 * kTileBytes;  // of a warp's ring
  static constexpr int kHeads = kColumns * 8;
  // A warp's results lie where its ring was: kHeads x kHead floats, then kHeads x 2.
  static constexpr int kPitch = kWarpBytes / 4;
  static_assert(kHeads * (kHead + 2) * 4 <= kWarpBytes);
  static constexpr int kSharedBytes = kWarps * kWarpBytes;

  const AttentionDecodeArgs& args;
  const int group, warp, lane;
  const uint32_t ring;  // this warp's, shared-memory address
  int record;           // of this lane: int `lane` of the item
  int sequence, begin, end, newest;  // newest: the key that the kernel before this one writes; -1: in another item
  int first_key;                     // of this warp's first tile
  int tile_count;                    // of this warp

  __device__ AttentionRing(const AttentionDecodeArgs& a, int g, uint32_t shared)
    : args(a), group(g), warp(threadIdx.x / 32), lane(threadIdx.x % 32), ring(shared + warp * kWarpBytes) {}

  __device__ __forceinline__ int field(int number) const { return __shfl_sync(~0u, record, number); }

  __device__ __forceinline__ int read_item(int index) const { return __ldg(args.items + int64_t(index) * kAttentionItemInts + lane); }

  __device__ __forceinline__ void take(int read) {
    record = read;
    sequence = field(0), begin = field(1), end = field(2);
    newest = end == field(6) ? end - 1 : -1;
    const int aligned = begin & ~(kTileKeys - 1);
    const int tiles = (end - aligned + kTileKeys - 1) / kTileKeys;
    first_key = aligned + warp * kTileKeys;
    tile_count = tiles > warp ? (tiles - warp + kWarps - 1) / kWarps : 0;
  }

  __device__ __forceinline__ int key_of(int tile) const { return first_key + tile * (kWarps * kTileKeys); }

  __device__ __forceinline__ bool holds_newest(int tile) const { return static_cast<unsigned>(newest - key_of(tile)) < kTileKeys; }

  // The cache block of a tile; blocks are at least as long as tiles.
  __device__ __forceinline__ int block_of(int tile) const {
    const int number = key_of(tile) >> args.block_bits, known = number - (begin >> args.block_bits);
    if (known < kAttentionItemInts - kAttentionItemHeader) return field(kAttentionItemHeader + known);
    return __ldg(args.tables + int64_t(sequence) * args.table_stride + number);
  }

  __device__ __forceinline__ int64_t offset_of(int key, int block, int chunk) const {
    return int64_t(block) * args.block_stride + int64_t(key & (args.block_size - 1)) * args.token_stride + group * kHead + chunk * 8;
  }

  __device__ __forceinline__ uint32_t place_of(int tile, int row, int chunk) const {
    return ring + (tile % kStages) * (2 * kTileBytes) + row * kRowBytes + ((chunk ^ (row & 7)) * 16);
  }

  // Copy one tile's keys and values; rows at or after the item's end become zeros, key `missing` is left out.
  __device__ __forceinline__ void fetch(int tile, int block, int missing) const {
    const int key = key_of(tile), row = lane / kChunks, chunk = lane % kChunks;
    const int64_t offset = offset_of(key + row, block, chunk), step = int64_t(kRowsACopy) * args.token_stride;
    const auto* keys = static_cast<const __nv_bfloat16*>(args.keys) + offset;
    const auto* values = static_cast<const __nv_bfloat16*>(args.values) + offset;
#pragma unroll
    for (int i = 0; i < kTileKeys / kRowsACopy; ++i) {
      const int r = row + i * kRowsACopy;
      if (key + r == missing) continue;
      const uint32_t to = place_of(tile, r, chunk);
      const int bytes = key + r < end ? 16 : 0;
      copy_async(to, keys + i * step, bytes);
      copy_async(to + kTileBytes, values + i * step, bytes);
    }
  }

  // The key and value that `fetch` left out.
  __device__ __forceinline__ void fetch_newest(int tile, int block) const {
    const int chunk = lane % kChunks;
    const bool is_value = lane >= kChunks;
    if (lane >= 2 * kChunks) return;
    const auto* from = static_cast<const __nv_bfloat16*>(is_value ? args.values : args.keys) + offset_of(newest, block, chunk);
    const uint4 x = __ldcg(reinterpret_cast<const uint4*>(from));
    const uint32_t to = place_of(tile, newest - key_of(tile), chunk) + (is_value ? kTileBytes : 0);
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
  }
};

}  // namespace
}  // namespace openlora
