// What a thread of the norm with adapters does to its two quads of columns: planes added up, stages of B multiplied. See norm_lora.cuh.
#pragma once

#include "product.cuh"

namespace openlora {

constexpr int kNormWarps = 16;        // with columns, at most
constexpr int kNormHelpers = 2;       // warps: one for B, one for v
constexpr int kNormStageRanks = 8;
constexpr int kNormStages = 3;
constexpr int kNormEntries = 32;      // of v that shared memory holds at once

// What a stage holds.
struct NormStage {
  int entry;
  int rank;
  int count;    // of ranks; 0: nothing to add
  int is_last;  // of the unit
};

__device__ __forceinline__ void unpack_quad(float (&x)[kQuad], uint2 raw) {
  x[0] = low_half(raw.x), x[1] = high_half(raw.x), x[2] = low_half(raw.y), x[3] = high_half(raw.y);
}

// y[q][r] += v B of a stage, for the first kRows rows.
template <int R, int kRows, int kHeld>
__device__ __forceinline__ void expand_stage(float (&y)[kQuads][R][kQuad], const uint8_t* b, int pitch, const int (&at)[kQuads],
                                             const float4 (&v)[kHeld][kNormEntries][kPageRank / 4], const NormStage& stage) {
  const unsigned entry = static_cast<unsigned>(stage.entry) % kNormEntries, four = static_cast<unsigned>(stage.rank) / 4;
  if (stage.count == kNormStageRanks) {
    constexpr int kTogether = kRows <= 2 ? 4 : 2;
    float4 scales[kRows];
#pragma unroll
    for (int first = 0; first < kNormStageRanks; first += kTogether) {
      if (first % 4 == 0) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) scales[r] = v[r][entry][four + first / 4];
      }
      uint2 raw[kTogether][kQuads];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
#pragma unroll
        for (int q = 0; q < kQuads; ++q) raw[i][q] = *reinterpret_cast<const uint2*>(b + (first + i) * pitch + at[q]);
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
                                                const float4 (&v)[kHeld][kNormEntries][kPageRank / 4], const NormStage& stage) {
  if (R == 1 || rows == 1) return expand_stage<R, 1>(y, b, pitch, at, v, stage);
  if constexpr (R >= 2)
    if (R == 2 || rows == 2) return expand_stage<R, 2>(y, b, pitch, at, v, stage);
  if constexpr (R >= 3) expand_stage<R, 3>(y, b, pitch, at, v, stage);
}

// Rows of float32 planes, one after another: they are for the deterministic setting's long steps.
template <int R>
__device__ __forceinline__ void load_float_rows(float (&y)[kQuads][R][kQuad], const ProductView& p, const int (&row)[R], const int (&column)[kQuads]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      if (row[r] >= 0 && column[q] >= 0) load_quad(y[q][r], p, row[r], column[q]);
    asm volatile("" ::: "memory");
  }
}

}  // namespace openlora
