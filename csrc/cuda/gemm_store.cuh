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

__device__ __forceinline__ void sync_threads(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

__device__ __forceinline__ void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// Four (two) 8 x 8 blocks of bf16, transposed: lane l names the place of row l % 8 of block l / 8.
__device__ __forceinline__ void store_blocks(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_blocks(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// A warpgroup's m64 block to y[:, column .. min(column + 64, column_end)]. `buffer`: gemm_line_bytes of the warpgroup's own;
// `barrier`: a named barrier of its own.
template <typename Out, int kTokens>
__device__ __forceinline__ void store_lines(const float (&d)[kTokens / 2], Out* y, int tokens, int outputs, int column, int column_end,
                                            uint32_t buffer, int barrier) {
  constexpr bool kHalf = sizeof(Out) == 2;
  constexpr int kChunk = kHalf && kTokens % 64 == 0 ? 64 : kTokens < 32 ? kTokens : 32;  // tokens at a time
  constexpr int kPitch = 64 * sizeof(Out) + 16;                                           // no two rows of a store in one bank
  constexpr int kPieces = 64 * sizeof(Out) / 16;
  const int thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int first = 0; first < kTokens; first += kChunk) {
    if (first >= tokens) break;
    sync_threads(barrier, 128);  // the chunk before has been picked up
    if constexpr (kHalf) {
      const uint32_t place = buffer + (lane / 16 * 8 + lane % 8) * kPitch + (warp * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
      for (int j = 0; j < kChunk / 8; j += 2) {
        const float* v = &d[(first / 8 + j) * 4];
        const uint32_t a = pack_bf16(v[0], v[1]), b = pack_bf16(v[2], v[3]);
        if constexpr (kChunk == 8) store_blocks(buffer + lane % 8 * kPitch + (warp * 16 + lane / 8 % 2 * 8) * 2, a, b);
        else store_blocks(place + j * 8 * kPitch, a, b, pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
      }
    } else {
      const uint32_t place = buffer + lane % 4 * 2 * kPitch + (warp * 16 + lane / 4) * 4;
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared(place + (j * 8 + i % 2) * kPitch + i / 2 * 32, d[(first / 8 + j) * 4 + i]);
      }
    }
    sync_threads(barrier, 128);
#pragma unroll
    for (int i = 0; i < kChunk * kPieces / 128 + (kChunk * kPieces < 128); ++i) {
      const int at = i * 128 + thread, token = first + at / kPieces, piece = at % kPieces;
      if (at < kChunk * kPieces && token < tokens && column + piece * 16 / static_cast<int>(sizeof(Out)) < column_end) {
        uint4* target = reinterpret_cast<uint4*>(y + static_cast<int64_t>(token) * outputs + column) + piece;
        *target = load_shared(buffer + at / kPieces * kPitch + piece * 16);
      }
    }
  }
}

// ---- planes summed inside a cluster: block r holds plane r of one row tile

__device__ __forceinline__ uint32_t block_address(uint32_t local, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(local), "r"(rank));
  return address;
}

__device__ __forceinline__ float4 load_block(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}

// The block's accumulators as [tokens][columns] float32 rows of `pitch` bytes.
template <int kTokens>
__device__ __forceinline__ void put_down(const float (&d)[kTokens / 2], int tokens, uint32_t tile, int pitch, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t place = tile + lane % 4 * 2 * pitch + (column + lane / 4) * 4;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    if (8 * j >= tokens) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) store_shared(place + (j * 8 + i % 2) * pitch + i / 2 * 32, d[j * 4 + i]);
  }
}

__device__ __forceinline__ void store_quad(float* y, const float4& v) { *reinterpret_cast<float4*>(y) = v; }
__device__ __forceinline__ void store_quad(__nv_bfloat16* y, const float4& v) {
  *reinterpret_cast<uint2*>(y) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}

// This block's share of the tokens: the planes' sum, plane by plane in order, to y[token, column .. column_end].
template <typename Out>
__device__ __forceinline__ void sum_cluster(int planes, Out* y, int tokens, int outputs, int column, int column_end, uint32_t tile, int pitch,
                                            int threads) {
  constexpr int kAhead = 4;
  const int rank = static_cast<int>(cluster_rank());
  const int begin = tokens * rank / planes, quads = (column_end - column) / 4;
  const int count = (tokens * (rank + 1) / planes - begin) * quads;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < count; first += kAhead * threads) {
    float4 sum[kAhead];
    uint32_t place[kAhead];
    Out* target[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = min(first + u * threads, count - 1), token = begin + at / quads, quad = at % quads;
      place[u] = tile + token * pitch + quad * 16;
      target[u] = y + static_cast<int64_t>(token) * outputs + column + quad * 4;
      sum[u] = load_block(block_address(place[u], 0));
    }
#pragma unroll 1
    for (int p = 1; p < planes; ++p) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const float4 v = load_block(block_address(place[u], p));
        sum[u] = make_float4(sum[u].x + v.x, sum[u].y + v.y, sum[u].z + v.z, sum[u].w + v.w);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (first + u * threads < count) store_quad(target[u], sum[u]);
    }
  }
}

}  // namespace openlora
