// The wide GEMM's output projection: kLogits of gemm_sm90.h.
//
// As gemm_wide_sm90.cu, with 200 rows of W a tile, which the 641 tiles of 128,256 rows fill five rounds of 132 blocks with. A thread
// sees 50 columns of each of its four tokens in ascending order and keeps their largest from tile to tile; four lanes share a
// token and compare once, at the end.
#include "gemm_wide_sm90.h"

#include "gemm_best.cuh"
#include "gemm_maps.h"
#include "gemm_wide.cuh"
#include "launch.cuh"

namespace openlora {
namespace {

constexpr int kRows = kGemmWideHeadRows;
constexpr int kHalf = kRows / 2;  // accumulators of an m64 block
using Ring = WideRing<kRows>;
constexpr int kSharedBytes = 1024 + Ring::kBytes;
static_assert(kSharedBytes <= kGemmSharedBytes);

struct Work {
  float* y;
  const int32_t* wanted;
  int2* bests;
  int tokens, outputs, k_blocks, tiles;
};

// The largest of a token's columns so far, among those of a lane.
struct Top {
  float value = kBelowAll;
  int token = kNoToken;
};

// An m64 block's accumulators of tokens 8 h + lane / 4: ascending columns, of which `groups` of 8 are there.
template <int kHigh>
__device__ __forceinline__ void see_columns(Top& top, const float (&d)[kHalf], int first_column, int groups) {
  float value = top.value;
  int found = -1;
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
    if (j >= groups) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = d[j * 4 + kHigh * 2 + i];
      found = x > value ? j * 8 + i : found;
      value = max_or_nan(value, x);
    }
  }
  top.value = value;
  top.token = found >= 0 ? first_column + found : top.token;
}

template <int kHigh>
__device__ __forceinline__ void store_columns(float* y, const float (&d)[kHalf], int groups) {
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
    if (j >= groups) break;
    *reinterpret_cast<float2*>(y + j * 8) = make_float2(d[j * 4 + kHigh * 2], d[j * 4 + kHigh * 2 + 1]);
  }
}

__global__ __launch_bounds__(kWideThreads, 1) void wide_head(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                                                         const Work work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t shared[];
  const Ring ring{(shared_address(shared) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    ring.init();
    ring.start<false>(&w_map, &x_map, blockIdx.x, work.k_blocks);
  }
  __syncthreads();
  wait_for_dependencies();
  const int first_token = fresh_thread() / 128 * 128 + fresh_thread() % 128 / kWarp * 16 + fresh_thread() % kWarp / 4;
  uint32_t wanted = 0;  // a bit for each of a thread's tokens
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = first_token + i / 2 * 64 + i % 2 * 8;
    if (token < work.tokens && __ldcg(work.wanted + token) != 0) wanted |= 1u << i;
  }
  Top top[4];
  WidePosition at;
  int coming_k = kWideStages, coming_tile = blockIdx.x;  // of the next load
  // Lets go of the stage before, which takes the next load.
  const auto refill = [&] {
    ring.release(at.freed);
    if (fresh_thread() == 0) {
      if (coming_k >= work.k_blocks) coming_k = 0, coming_tile += gridDim.x;
      if (coming_tile < work.tiles) ring.refill<false>(&w_map, &x_map, coming_tile, coming_k++, at);
    }
  };
#pragma unroll 1
  for (int tile = blockIdx.x; tile < work.tiles; tile += gridDim.x) {
    float low[kHalf], high[kHalf];  // tokens 0 to 63 and 64 to 127 of the group's
    wgmma_clear(low);
    wgmma_clear(high);
#pragma unroll 1
    for (int k = 0; k < work.k_blocks; ++k, at.advance()) {
      ring.multiply(low, high, at);
      wgmma_wait<1>();
      if (k > 0) refill();
    }
    wgmma_wait<0>();
    wgmma_results<kHalf>(low);
    wgmma_results<kHalf>(high);
    refill();
    const int column = tile * kRows + fresh_thread() % 4 * 2, groups = min(kRows, work.outputs - tile * kRows) / 8;
    if (wanted != 0) {
      float* y = work.y + static_cast<int64_t>(first_token) * work.outputs + column;
      const int64_t rows = work.outputs;
      if (wanted & 1) store_columns<0>(y, low, groups);
      if (wanted & 2) store_columns<1>(y + 8 * rows, low, groups);
      if (wanted & 4) store_columns<0>(y + 64 * rows, high, groups);
      if (wanted & 8) store_columns<1>(y + 72 * rows, high, groups);
    }
    see_columns<0>(top[0], low, column, groups);
    see_columns<1>(top[1], low, column, groups);
    see_columns<0>(top[2], high, column, groups);
    see_columns<1>(top[3], high, column, groups);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Best best{top[i].value, top[i].token};
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
      const float value = __shfl_xor_sync(kAllLanes, best.value, distance);
      take_better(best, value, __shfl_xor_sync(kAllLanes, best.token, distance));
    }
    const int token = first_token + i / 2 * 64 + i % 2 * 8;
    if (threadIdx.x % 4 == 0 && token < work.tokens) {
      work.bests[static_cast<int64_t>(token) * gridDim.x + blockIdx.x] = make_int2(__float_as_int(best.value), best.token);
    }
  }
#endif
}

}  // namespace

cudaError_t launch_wide_head(const SkinnyGemmArgs& args, cudaStream_t stream) {
  CUtensorMap w_map, x_map;
  if (!encode_w(&w_map, args, kRows) || !encode_x(&x_map, args, kGemmMaxTokens)) return cudaErrorInvalidValue;
  const Work work{static_cast<float*>(args.y), args.wanted, static_cast<int2*>(args.bests), args.tokens, args.outputs,
                  args.inputs / kGemmBlockK, gemm_row_tiles(args.outputs, kRows)};
  const Shape shape{kGemmProcessors, kWideThreads, kSharedBytes};
  return launch(wide_head, shape, args.use_pdl ? Follow::kWaitFirst : Follow::kPlain, stream, w_map, x_map, work);
}

}  // namespace openlora
