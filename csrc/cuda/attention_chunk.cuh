// An item of several query tokens of one sequence, next to those of decoding sequences in the same launch.
//
// The block's warps share the item: its rows are (token, query head of the group), 16 a warp, in the places where the tensor cores' 16-row
// side wants them, so a group of 4 heads has 16 tokens a block of 4 warps. All warps read all keys: a stage is one tile of each warp's
// ring, copied by that warp, and the block meets before and after it. Keys and values come from L2, once for the item's rows; a row sees
// the keys up to its own token.
//
// A stage of 64 keys costs a warp 64 mma for the scores, 64 for the sums and about 300 instructions besides, one after another where
// it is the only warp of its scheduler: predicted 0.6 us, measured 1.1 to 1.5. So a long context is FA3's.
#pragma once

#include "attention_ring.cuh"

namespace openlora {
namespace {

__device__ __forceinline__ float max_over_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float sum_over_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// One of this lane's two rows.
struct ChunkRow {
  bool is_row;
  int token;    // of the step
  int element;  // of the token's query and result: the head's first
};

template <int kHead, int kColumns, int kWarps, int kStages>
struct Chunk {
  using Ring = AttentionRing<kHead, kColumns, kWarps, kStages>;
  static constexpr int kStageKeys = kWarps * kTileKeys;
  static constexpr int kTiles = 4;  // of a softmax step
  static_assert(kWarps % kTiles == 0);

  const Ring& ring;
  const uint32_t shared;
  int aligned, stages;
  int newest[2];  // the last key that each of this lane's rows sees
  uint32_t q[Ring::kSteps][4];
  float acc[Ring::kSteps * 2][4];
  float top[2], total[2];

  __device__ Chunk(const Ring& r, uint32_t shared_address) : ring(r), shared(shared_address) {
    aligned = ring.begin & ~(kTileKeys - 1);
    stages = (ring.end - aligned + kStageKeys - 1) / kStageKeys;
    const int tokens = -ring.field(4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      newest[i] = ring.end - tokens + min(row_number(i) / ring.args.heads_per_group, tokens - 1);
      top[i] = kMinusInfinity;
      total[i] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < Ring::kSteps * 2; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
  }

  __device__ __forceinline__ int row_number(int i) const { return ring.warp * 16 + ring.lane / 4 + i * 8; }

  __device__ __forceinline__ ChunkRow row_of(int i) const {
    const int per_group = ring.args.heads_per_group, row = row_number(i), token = row / per_group;
    const int head = ring.group * per_group + row - token * per_group;
    return {token < -ring.field(4), ring.field(7) + token, head * kHead + (ring.lane % 4) * 2};
  }

  __device__ __forceinline__ void fetch(int stage) const {
    if (stage < stages) {
      const bool has_keys = ring.key_of(stage) < ring.end;
      ring.fetch(stage, has_keys ? ring.block_of(stage) : 0, -1);
    }
    commit_copies();
  }

  // Whether the first stages hold nothing that the kernel before this one writes.
  __device__ __forceinline__ bool starts_with_old_keys() const {
    return aligned + min(kStages, stages) * kStageKeys <= ring.field(6);
  }

  __device__ __forceinline__ void read_queries() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const ChunkRow row = row_of(i);
      const bool is_row = row.is_row;
      const auto* from = static_cast<const __nv_bfloat16*>(ring.args.q) + int64_t(row.token) * ring.args.q_stride + row.element;
#pragma unroll
      for (int step = 0; step < Ring::kSteps; ++step) {
        q[step][i] = is_row ? *reinterpret_cast<const uint32_t*>(from + step * 16) : 0;
        q[step][i + 2] = is_row ? *reinterpret_cast<const uint32_t*>(from + step * 16 + 8) : 0;
      }
    }
  }

  // Of a warp's part of a stage.
  __device__ __forceinline__ uint32_t tile_at(int stage, int tile) const {
    return shared + tile * Ring::kWarpBytes + (stage % kStages) * (2 * Ring::kTileBytes);
  }

  // `first`: of kTiles tiles.
  __device__ __forceinline__ void attend(int stage, int first) {
    const int lane = ring.lane;
    float score[kTiles * 2][4];
#pragma unroll
    for (int n = 0; n < kTiles * 2; ++n) score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0.f;
    // All tiles at a step: an instruction waits 33 cycles for the sum that it adds to, and takes 6 for itself.
#pragma unroll
    for (int step = 0; step < Ring::kSteps; ++step) {
      const int row = (lane & 7) + ((lane >> 4) & 1) * 8;
      const uint32_t base = tile_at(stage, first) + row * Ring::kRowBytes + (((step * 2 + ((lane >> 3) & 1)) ^ (row & 7)) * 16);
      uint32_t b[kTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) load_matrices(b[tile], base + tile * Ring::kWarpBytes);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add(score[tile * 2], q[step], b[tile][0], b[tile][1]);
        multiply_add(score[tile * 2 + 1], q[step], b[tile][2], b[tile][3]);
      }
    }
    const int first_key = aligned + stage * kStageKeys + first * kTileKeys;
    const int first_token = ring.end + ring.field(4);
    if (ring.args.window > 0 || first_key + kTiles * kTileKeys > first_token + 1) mask(score, first_key + (lane % 4) * 2);
    weigh(score);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float(&low)[4] = score[tile * 2];
      const float(&high)[4] = score[tile * 2 + 1];
      const uint32_t p[4] = {pack(low[0], low[1]), pack(low[2], low[3]), pack(high[0], high[1]), pack(high[2], high[3])};
      const int row = lane & 15;
      const uint32_t base = tile_at(stage, first + tile) + Ring::kTileBytes + row * Ring::kRowBytes;
#pragma unroll
      for (int step = 0; step < Ring::kSteps; ++step) {
        uint32_t b[4];
        load_matrices_transposed(b, base + (((step * 2 + (lane >> 4)) ^ (row & 7)) * 16));
        multiply_add(acc[step * 2], p, b[0], b[1]);
        multiply_add(acc[step * 2 + 1], p, b[2], b[3]);
      }
    }
  }

  // Scores of keys that a row does not see become -inf. `key`: of score[0][0].
  __device__ __forceinline__ void mask(float (&score)[kTiles * 2][4], int key) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int oldest = ring.args.window > 0 ? max(newest[i] - ring.args.window + 1, 0) : 0;
      const unsigned span = newest[i] - oldest, at = key - oldest;
#pragma unroll
      for (int n = 0; n < kTiles * 2; ++n) {
        score[n][i * 2] = at + n * 8 <= span ? score[n][i * 2] : kMinusInfinity;
        score[n][i * 2 + 1] = at + n * 8 + 1 <= span ? score[n][i * 2 + 1] : kMinusInfinity;
      }
    }
  }

  // Scores become weights; what was summed before is brought to the new largest score.
  __device__ __forceinline__ void weigh(float (&score)[kTiles * 2][4]) {
    const float scale = ring.args.scale_log2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = score[0][i * 2];
#pragma unroll
      for (int n = 0; n < kTiles * 2; ++n) largest = fmaxf(largest, fmaxf(score[n][i * 2], score[n][i * 2 + 1]));
      largest = fmaxf(top[i], max_over_quad(largest) * scale);
      const float safe = largest == kMinusInfinity ? 0.f : largest;  // nothing seen yet: exp2(-inf - 0) = 0 instead of NaN
      const float shrink = exp2_fast(top[i] - safe);
      top[i] = largest;
      total[i] *= shrink;
#pragma unroll
      for (int n = 0; n < Ring::kSteps * 2; ++n) {
        acc[n][i * 2] *= shrink;
        acc[n][i * 2 + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < kTiles * 2; ++n) {
        score[n][i * 2] = exp2_fast(fmaf(score[n][i * 2], scale, -safe));
        score[n][i * 2 + 1] = exp2_fast(fmaf(score[n][i * 2 + 1], scale, -safe));
        total[i] += score[n][i * 2] + score[n][i * 2 + 1];
      }
    }
  }

  __device__ __forceinline__ void write() const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float inverse = 1.f / sum_over_quad(total[i]);
      const ChunkRow row = row_of(i);
      if (!row.is_row) continue;
      auto* to = static_cast<__nv_bfloat16*>(ring.args.out) + int64_t(row.token) * ring.args.out_stride + row.element;
#pragma unroll
      for (int n = 0; n < Ring::kSteps * 2; ++n)
        *reinterpret_cast<uint32_t*>(to + n * 8) = pack(acc[n][i * 2] * inverse, acc[n][i * 2 + 1] * inverse);
    }
  }

  // The warp's first row is one of the item's, and its last row sees something of these tiles.
  __device__ __forceinline__ bool has_work(int stage, int first) const {
    const bool is_row = ring.warp * 16 < -ring.field(4) * ring.args.heads_per_group;
    return is_row && aligned + stage * kStageKeys + first * kTileKeys <= __shfl_sync(~0u, newest[1], 31);
  }

  __device__ __forceinline__ void run(bool& has_waited) {
    if (!has_waited && !starts_with_old_keys()) {
      wait_for_previous();
      has_waited = true;
    }
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) fetch(stage);
    if (!has_waited) wait_for_previous();
    has_waited = true;
    read_queries();
    for (int stage = 0; stage < stages; ++stage) {
      wait_for_copies<kStages - 1>();
      __syncthreads();
      for (int first = 0; first < kWarps; first += kTiles) {
        if (has_work(stage, first)) attend(stage, first);
      }
      __syncthreads();
      fetch(stage + kStages);
    }
    write();
  }
};

}  // namespace
}  // namespace openlora
