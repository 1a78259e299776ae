// How the skinny GEMM's accumulators leave an SM: in whole lines of y, through shared memory.
//
// An accumulator block is [64 columns of y, kTokens] in wgmma's layout (gemm_wgmma.cuh): stored from registers, a warp's store
// touches 8 rows of y with 32 bytes each. Here the four warps of a warpgroup put the block down as rows of y and pick up 16 bytes a
// lane, so that a warp's store is four lines of 128 bytes (bf16) or two of 256 (float32).
#pragma once

#include <type_traits>

#include "device.cuh"
#include "gemm_plan.h"
#include "gemm_tma.cuh"

namespace openlora {

// threadIdx.x, read anew: what is computed from it does not take up registers between the stores.
__device__ __forceinline__ int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ void sync_threads(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

__device__ __forceinline__ void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ uint4 load_piece(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// Four, two or one 8 x 8 blocks of bf16, transposed: lane l names the place of row l % 8 of block l / 8.
__device__ __forceinline__ void store_blocks(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_blocks(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void store_blocks(uint32_t address, uint32_t a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(a) : "memory");
}

// A warpgroup's own: gemm_line_bytes of shared memory and a named barrier.
struct LineBuffer {
  uint32_t address;
  int barrier;
};

// Every row of y is written.
struct AllRows {};

// kChunk rows of kColumns columns that a warpgroup has put down, from shared memory to y[first .., column ..]. wanted: a bit for each that
// is to be written; kAll: they all are.
template <int kChunk, int kColumns, bool kAll, typename Out>
__device__ __forceinline__ void pick_up_lines(Out* y, int tokens, int outputs, int first, int column, int column_end, uint32_t lines, int thread,
                                              uint32_t wanted) {
  constexpr int kPitch = gemm_line_pitch(kColumns * sizeof(Out)), kPieces = kColumns * sizeof(Out) / 16;
#pragma unroll
  for (int i = 0; i < (kChunk * kPieces + 127) / 128; ++i) {
    const int at = i * 128 + thread, token = first + at / kPieces, piece = at % kPieces;
    if (at < kChunk * kPieces && token < tokens && (kAll || (wanted >> at / kPieces & 1) != 0) &&
        column + piece * 16 / static_cast<int>(sizeof(Out)) < column_end) {
      uint4* target = reinterpret_cast<uint4*>(y + static_cast<int64_t>(token) * outputs + column) + piece;
      *target = load_piece(lines + at / kPieces * kPitch + piece * 16);
    }
  }
}

// A warpgroup's m64 block to y[:, column .. min(column + 64, column_end)]. rows.from(first): a bit for each row of y from `first`
// on that is to be written.
template <typename Out, int kTokens, class Rows = AllRows>
__device__ __forceinline__ void store_lines(const float (&d)[kTokens / 2], Out* y, int tokens, int outputs, int column, int column_end,
                                            const LineBuffer& lines, const Rows& rows = {}) {
  constexpr bool kHalf = sizeof(Out) == 2, kAll = std::is_same_v<Rows, AllRows>;
  constexpr int kChunk = gemm_line_tokens(kTokens, kHalf);  // tokens at a time
  constexpr int kPitch = gemm_line_pitch(64 * sizeof(Out));
  const int thread = fresh_thread() % 128, warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int first = 0; first < kTokens; first += kChunk) {
    if (first >= tokens) break;
    uint32_t wanted = ~0u;
    if constexpr (!kAll) {
      static_assert(kChunk <= 32);
      wanted = rows.from(first) & (kChunk < 32 ? (1u << kChunk % 32) - 1 : ~0u);
      if (wanted == 0) continue;
    }
    sync_threads(lines.barrier, 128);  // the chunk before has been picked up
    if constexpr (kHalf) {
      const uint32_t place = lines.address + (lane / 16 * 8 + lane % 8) * kPitch + (warp * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
      for (int j = 0; j < kChunk / 8; j += 2) {
        const float* v = &d[(first / 8 + j) * 4];
        const uint32_t a = pack_bf16(v[0], v[1]), b = pack_bf16(v[2], v[3]);
        if constexpr (kChunk == 8) store_blocks(lines.address + lane % 8 * kPitch + (warp * 16 + lane / 8 % 2 * 8) * 2, a, b);
        else store_blocks(place + j * 8 * kPitch, a, b, pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
      }
    } else {
      const uint32_t place = lines.address + lane % 4 * 2 * kPitch + (warp * 16 + lane / 4) * 4;
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared(place + (j * 8 + i % 2) * kPitch + i / 2 * 32, d[(first / 8 + j) * 4 + i]);
      }
    }
    sync_threads(lines.barrier, 128);
    pick_up_lines<kChunk, 64, kAll>(y, tokens, outputs, first, column, column_end, lines.address, thread, wanted);
  }
}

// A warpgroup's m64 block, whose rows are 8 of gate, the same 8 of up, and so on, as silu(gate) * up to y[:, column .. + 32]: a
// thread holds both factors of each product.
template <int kTokens>
__device__ __forceinline__ void store_silu_mul(const float (&d)[kTokens / 2], __nv_bfloat16* y, int tokens, int outputs, int column,
                                               int column_end, const LineBuffer& lines) {
  constexpr int kChunk = gemm_line_tokens(kTokens, true);
  constexpr int kPitch = gemm_line_pitch(32 * sizeof(__nv_bfloat16));
  const int thread = fresh_thread() % 128, warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int first = 0; first < kTokens; first += kChunk) {
    if (first >= tokens) break;
    sync_threads(lines.barrier, 128);  // the chunk before has been picked up
    uint32_t pairs[kChunk / 8];
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
      const int at = (first / 8 + j) * 4;
      pairs[j] = pack_bf16(silu(d[at]) * d[at + 2], silu(d[at + 1]) * d[at + 3]);
    }
    const uint32_t place = lines.address + lane % kChunk * kPitch + warp * 16;
    if constexpr (kChunk == 8) store_blocks(place, pairs[0]);
    else if constexpr (kChunk == 16) store_blocks(place, pairs[0], pairs[1]);
    else {
#pragma unroll
      for (int j = 0; j + 4 <= kChunk / 8; j += 4) store_blocks(place + j * 8 * kPitch, pairs[j], pairs[j + 1], pairs[j + 2], pairs[j + 3]);
      if constexpr (kChunk % 32 == 16) store_blocks(place + kChunk / 32 * 32 * kPitch, pairs[kChunk / 8 - 2], pairs[kChunk / 8 - 1]);
    }
    sync_threads(lines.barrier, 128);
    pick_up_lines<kChunk, 32, true>(y, tokens, outputs, first, column, column_end, lines.address, thread, ~0u);
  }
}

}  // namespace openlora
