// The greedy choice inside the output projection: every block finds the largest of its logits, so that nobody has to write or
// read them for it.
//
// Among equals the lowest row of W wins; a NaN stays one whatever it meets, so a row of x that has any has it in the end. A warp
// reduces its 16 rows of W by three exchanges between lanes; each halves the tokens of a lane, so that little is exchanged.
// Instructions of a warp an item: about 3 kTokens; bytes out: 8 a token and block.
#pragma once

#include <cuda_runtime.h>

#include "device.cuh"
#include "gemm_store.cuh"

namespace openlora {

constexpr int kBestBarrier = 3;  // of the eight consumer warps
constexpr float kBelowAll = -INFINITY;
constexpr int kNoToken = 0x7fffffff;

struct Best {
  float value;
  int token;
};

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

__device__ __forceinline__ void take_better(Best& best, float value, int token) {
  const bool is_better = value > best.value || (value == best.value && token < best.token);
  best.value = max_or_nan(best.value, value);
  best.token = is_better ? token : best.token;
}

// One exchange with the lane at distance kMask: of kColumns each keeps the half that its bit names, or all where there is one.
template <int kMask, int kColumns, int kAll>
__device__ __forceinline__ void exchange_bests(Best (&best)[kAll], int lane) {
  constexpr int kHalf = kColumns > 1 ? kColumns / 2 : 1;
  const bool is_upper = (lane & kMask) != 0;
#pragma unroll
  for (int c = 0; c < kHalf; ++c) {
    Best mine = best[c], theirs = best[c];
    if constexpr (kColumns > 1) {
      const Best high = best[kHalf + c];
      theirs = is_upper ? mine : high;
      mine = is_upper ? high : mine;
    }
    const float value = __shfl_xor_sync(kAllLanes, theirs.value, kMask);
    const int token = __shfl_xor_sync(kAllLanes, theirs.token, kMask);
    take_better(mine, value, token);
    best[c] = mine;
  }
}

// What a lane keeps: the best so far of a few tokens, in ascending rows of W.
template <int kTokens>
struct Bests {
  static constexpr int kColumns = kTokens / 4;                       // tokens of a lane's accumulators
  static constexpr int kKept = kColumns > 8 ? kColumns / 8 : 1;      // and after the exchanges
  static constexpr int kSecond = kColumns > 1 ? kColumns / 2 : 1, kThird = kSecond > 1 ? kSecond / 2 : 1;
  Best kept[kKept];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (Best& best : kept) best = {kBelowAll, kNoToken};
  }

  // d: a warp's accumulators of rows `row` .. `row` + 15 of W, of which those before `row_end` count.
  __device__ __forceinline__ void add(const float (&d)[kTokens / 2], int row, int row_end) {
    if (row >= row_end) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int low = row + lane / 4, high = low + 8;
    Best best[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      best[c] = low < row_end ? Best{d[c / 2 * 4 + c % 2], low} : Best{kBelowAll, kNoToken};
      if (high < row_end) take_better(best[c], d[c / 2 * 4 + 2 + c % 2], high);
    }
    exchange_bests<16, kColumns>(best, lane);
    exchange_bests<8, kSecond>(best, lane);
    exchange_bests<4, kThird>(best, lane);
#pragma unroll
    for (int k = 0; k < kKept; ++k) take_better(kept[k], best[k].value, best[k].token);
  }

  // The token of kept[k].
  __device__ __forceinline__ static int token_of(int lane, int k) {
    int column = k;
    if (kColumns > 1) column += (lane & 16) != 0 ? kColumns / 2 : 0;
    if (kSecond > 1) column += (lane & 8) != 0 ? kSecond / 2 : 0;
    if (kThird > 1) column += (lane & 4) != 0 ? kThird / 2 : 0;
    return column / 2 * 8 + lane % 4 * 2 + column % 2;
  }

  // Joins the eight warps through 64 bytes of shared memory a token and writes the block's own of [tokens, parts].
  __device__ __forceinline__ void write(uint32_t shared, int2* bests, int tokens, int parts) const {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    sync_threads(kBestBarrier, 256);  // nobody reads what lay there any more
#pragma unroll
    for (int k = 0; k < kKept; ++k) {  // where lanes have the same token, they have the same best
      const uint32_t place = shared + (warp * kTokens + token_of(lane, k)) * 8;
      asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(place), "r"(__float_as_uint(kept[k].value)), "r"(kept[k].token) : "memory");
    }
    sync_threads(kBestBarrier, 256);
    if (thread >= kTokens || thread >= tokens) return;
    Best best{kBelowAll, kNoToken};
#pragma unroll
    for (int from = 0; from < 8; ++from) {
      uint32_t value, token;
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value), "=r"(token) : "r"(shared + (from * kTokens + thread) * 8) : "memory");
      take_better(best, __uint_as_float(value), static_cast<int>(token));
    }
    bests[static_cast<int64_t>(thread) * parts + blockIdx.x] = make_int2(__float_as_int(best.value), best.token);
  }
};

// Which tokens' logits are to be written, as bits in shared memory.
struct WantedRows {
  uint32_t address;  // of a bit a token

  // All eight warps; `wanted` has a number a token, not 0 where it is wanted.
  template <int kTokens>
  __device__ __forceinline__ void read(const int32_t* wanted, int tokens) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, token = warp * kWarp + lane;
    if (warp * kWarp < kTokens) {
      const uint32_t bits = __ballot_sync(kAllLanes, token < tokens && __ldcg(wanted + token) != 0);
      if (lane == 0) asm volatile("st.shared.b32 [%0], %1;" ::"r"(address + warp * 4), "r"(bits) : "memory");
    }
    sync_threads(kBestBarrier, 256);
  }

  // Bits of the tokens from `first` on; a chunk lies in one word.
  __device__ __forceinline__ uint32_t from(int first) const {
    uint32_t bits;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(address + first / 32 * 4) : "memory");
    return bits >> (first % 32);
  }
};

}  // namespace openlora
