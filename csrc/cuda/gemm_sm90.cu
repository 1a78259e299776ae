// The skinny GEMM of gemm_sm90.h.
//
// Swap-AB: 64-row blocks of W are the m side of wgmma, the tokens its n side, so one token wastes 7/8 of an n8 tile instead of
// 63/64 of an m64 one, and each byte of W enters an SM once.
//
// A block is 8 consumer warps (two warpgroups, each with half of the tile's m64 blocks) and one producer warp. The producer
// streams stages of [tile_rows, 64] of W and [tile_tokens, 64] of x through a ring of `stages` buffers; the ring never drains
// between work items, and its first round of W is asked for before the kernels ahead have finished.
//
// Shared memory: stages * (tile_rows + tile_tokens) * 128 bytes. Device memory: 2 N K bytes, once, evict-first; x and y stay
// in L2. Bound: those bytes up to about 200 tokens, then arithmetic.
#include "gemm_sm90.h"

#include <cuda.h>
#include <cuda_bf16.h>

#include <algorithm>

#include "gemm_plan.h"
#include "gemm_tma.cuh"
#include "gemm_wgmma.cuh"

namespace openlora {
namespace {

constexpr int kConsumerWarps = 8;
constexpr int kThreads = (kConsumerWarps + 1) * 32;
constexpr int kRowBytes = kGemmBlockK * 2;  // one swizzle row

struct Work {
  void* y;
  int tokens, outputs;
  int k_blocks, planes, row_tiles, tile_rows, stages, early;
  bool is_bfloat16;
};

// The shrink's share of a launch.
struct Shrink {
  LoraWork lora;
  int64_t pairs;
  float* partial;
  int32_t* arrivals;
};

// Maps of the pages' A matrices, [pages, 16, K] each, by module of the linear.
struct PageMaps {
  CUtensorMap a[kMaxLoraSpans];
};

// Where stage buffers and barriers lie; the same in every block of a cluster.
struct Ring {
  uint32_t buffers, barriers;
  int stage_bytes, w_bytes, stages;

  __device__ uint32_t w(int stage) const { return buffers + stage * stage_bytes; }
  __device__ uint32_t x(int stage) const { return w(stage) + w_bytes; }
  __device__ uint32_t full(int stage) const { return barriers + stage * 16; }
  __device__ uint32_t empty(int stage) const { return barriers + stage * 16 + 8; }
};

struct RingPosition {
  int stage = 0;
  uint32_t round = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      ++round;
    }
  }
};

// The work items of one block, in order: planes innermost; the blocks of a cluster take neighbouring row tiles.
template <int kCluster>
struct Items {
  const Work& work;
  int item, row_tile, plane, first_k, end_k;

  __device__ explicit Items(const Work& w) : work(w), item(static_cast<int>(blockIdx.x) / kCluster) { locate(); }
  __device__ bool is_done() const { return item >= (work.row_tiles + kCluster - 1) / kCluster * work.planes; }
  __device__ void next() {
    item += static_cast<int>(gridDim.x) / kCluster;
    locate();
  }
  __device__ void locate() {
    row_tile = item / work.planes * kCluster + (kCluster > 1 ? cluster_rank() : 0);
    plane = item % work.planes;
    first_k = gemm_plane_start(work.k_blocks, work.planes, plane);
    end_k = gemm_plane_start(work.k_blocks, work.planes, plane + 1);
  }
};

template <int kCluster>
__device__ void load_w(const Ring& ring, const CUtensorMap* map, const Items<kCluster>& at, int k, int stage, int tile_rows, int bytes,
                       uint64_t policy) {
  barrier_expect(ring.full(stage), bytes);
  tensor_load(ring.w(stage), map, k * kGemmBlockK, at.row_tile * tile_rows, ring.full(stage), policy);
}

// With a cluster each block loads its share of the tokens and sends it to all.
template <int kTokens, int kCluster>
__device__ void load_x(const Ring& ring, const CUtensorMap* map, int k, int stage, uint64_t policy) {
  if constexpr (kCluster == 1) {
    tensor_load(ring.x(stage), map, k * kGemmBlockK, 0, ring.full(stage), policy);
  } else {
    const int first = cluster_rank() * (kTokens / kCluster);
    tensor_load_multicast(ring.x(stage) + first * kRowBytes, map, k * kGemmBlockK, first, ring.full(stage), policy,
                          (1u << kCluster) - 1);
  }
}

// One thread: the first `early` stages of W, which no kernel in flight writes.
template <int kCluster>
__device__ void load_early(const Work& work, const Ring& ring, const CUtensorMap* w_map) {
  int stage = 0;
  for (Items<kCluster> items(work); !items.is_done(); items.next()) {
    for (int k = items.first_k; k < items.end_k; ++k, ++stage) {
      if (stage == work.early) return;
      load_w(ring, w_map, items, k, stage, work.tile_rows, ring.stage_bytes, policy_evict_first());
    }
  }
}

// The shrink's work items of one block: `kGemmShrinkPairs` (item, module) pairs and one plane's range of k. They follow W's.
struct PageItems {
  const Work& work;
  const Shrink& shrink;
  int item, last, pair_count;
  int first_pair, pairs, plane, first_k, end_k;

  __device__ PageItems(const Work& w, const Shrink& s, int next) : work(w), shrink(s), item(next - w.row_tiles * w.planes) {
    pair_count = __ldg(s.lora.tiles + 1) * s.lora.span_count;
    last = (pair_count + kGemmShrinkPairs - 1) / kGemmShrinkPairs * w.planes;
    locate();
  }
  __device__ bool is_done() const { return item >= last; }
  __device__ void next() {
    item += static_cast<int>(gridDim.x);
    locate();
  }
  __device__ void locate() {
    first_pair = item / work.planes * kGemmShrinkPairs;
    pairs = min(kGemmShrinkPairs, pair_count - first_pair);
    plane = item % work.planes;
    first_k = gemm_plane_start(work.k_blocks, work.planes, plane);
    end_k = gemm_plane_start(work.k_blocks, work.planes, plane + 1);
  }
  // The item's record in the block of tiles (lora_work.h).
  __device__ const int4* record(int pair) const {
    const int32_t* tiles = shrink.lora.tiles;
    return reinterpret_cast<const int4*>(tiles + __ldg(tiles + 7)) + (first_pair + pair) / shrink.lora.span_count * 2;
  }
  __device__ int span(int pair) const { return (first_pair + pair) % shrink.lora.span_count; }
};

// One thread: A of the pages, 16 rows each where W's rows would lie.
template <int kTokens>
__device__ void produce_pages(const Work& work, const Shrink& shrink, const Ring& ring, const PageMaps& pages, const CUtensorMap* x_map,
                              int next, RingPosition at) {
  const uint64_t once = policy_evict_first();
  const uint64_t keep = policy_evict_last();
  for (PageItems items(work, shrink, next); !items.is_done(); items.next()) {
    int page[kGemmShrinkPairs];
#pragma unroll
    for (int i = 0; i < kGemmShrinkPairs; ++i) page[i] = i < items.pairs ? __ldg(items.record(i) + 1).x : 0;
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      if (at.round > 0) barrier_wait(ring.empty(at.stage), (at.round - 1) & 1);
      barrier_expect(ring.full(at.stage), (items.pairs * kPageRank + kTokens) * kRowBytes);
#pragma unroll
      for (int i = 0; i < kGemmShrinkPairs; ++i) {
        if (i < items.pairs) {
          tensor_load_3d(ring.w(at.stage) + i * kPageRank * kRowBytes, pages.a + items.span(i), k * kGemmBlockK, 0, page[i],
                         ring.full(at.stage), once);
        }
      }
      load_x<kTokens, 1>(ring, x_map, k, at.stage, keep);
    }
  }
}

// One thread: once the kernels ahead have ended, keeps the ring full.
template <int kTokens, int kCluster, bool kLora>
__device__ void produce(const Work& work, const Shrink& shrink, const Ring& ring, const CUtensorMap* w_map, const CUtensorMap* x_map,
                        const PageMaps& pages) {
  const uint64_t once = policy_evict_first();
  const uint64_t keep = policy_evict_last();
  wait_for_dependencies();
  launch_dependents();  // not before the wait: whoever starts now may read the same x (lora_work.h, Follow::kWaitLast)
  RingPosition at;
  Items<kCluster> items(work);
  for (; !items.is_done(); items.next()) {
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      if (at.round > 0) barrier_wait(ring.empty(at.stage), (at.round - 1) & 1);
      if (at.round > 0 || at.stage >= work.early) load_w(ring, w_map, items, k, at.stage, work.tile_rows, ring.stage_bytes, once);
      load_x<kTokens, kCluster>(ring, x_map, k, at.stage, keep);
    }
  }
  if constexpr (kLora) produce_pages<kTokens>(work, shrink, ring, pages, x_map, items.item, at);
}

template <typename Pair>
__device__ __forceinline__ Pair pack(float first, float second);
template <>
__device__ __forceinline__ float2 pack<float2>(float first, float second) {
  return make_float2(first, second);
}
template <>
__device__ __forceinline__ __nv_bfloat162 pack<__nv_bfloat162>(float first, float second) {
  return __floats2bfloat162_rn(first, second);
}

// Stores an m64 block transposed. Lanes l and l ^ 4 hold neighbouring rows of W, which are neighbours in y: they swap halves
// so that each stores pairs.
template <typename Pair, int kTokens>
__device__ __forceinline__ void store_block(const float (&d)[kTokens / 2], Pair* y, int tokens, int row_pairs, int row, int row_end) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int odd = lane / 4 % 2;
  int token = 2 * (lane % 4) + odd;
  Pair* at = y + static_cast<int64_t>(token) * row_pairs + (row - odd) / 2;
  const bool has_low = row - odd < row_end, has_high = row - odd + 8 < row_end;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j, token += 8, at += 8 * row_pairs) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float first = d[4 * j + 2 * half], second = d[4 * j + 2 * half + 1];
      const float swapped = __shfl_xor_sync(0xFFFFFFFF, odd ? first : second, 4);
      if (token < tokens && (half ? has_high : has_low)) at[4 * half] = odd ? pack<Pair>(swapped, second) : pack<Pair>(first, swapped);
    }
  }
}

// What a warp knows of its 16 rows of a shrink's work item: one page of one module and the rows of x that use it.
struct PageRows {
  int place, rows, entries, entry, first_pair;  // of the tile
  int ranks;                                    // that the page holds of the module
  float factor;                                 // scale * weight
  int span;
  int arrival;  // index of its counter

  __device__ PageRows(const Shrink& shrink, const PageItems& items, int pair) {
    const LoraWork& lora = shrink.lora;
    const int4 tile = __ldg(items.record(pair)), entry_of = __ldg(items.record(pair) + 1);
    place = tile.x, rows = tile.y & 0xffff, entries = tile.y >> 16, first_pair = tile.z, entry = tile.w;
    span = items.span(pair);
    arrival = items.first_pair + pair;
    const int64_t at = static_cast<int64_t>(lora.spans[span].module) * lora.slots + entry_of.y;
    ranks = max(0, min(kPageRank, __ldg(lora.ranks + at) - entry_of.z * kPageRank));
    factor = __ldg(lora.scales + at) * __int_as_float(entry_of.w);
  }
  // Of the tile's i-th row, in v and in a plane of partial sums.
  __device__ int64_t offset(const Shrink& shrink, int i) const {
    return ((first_pair + static_cast<int64_t>(i) * entries + entry) * shrink.lora.span_count + span) * kPageRank;
  }
};

// Stores a warp's 16 ranks for the rows of its tile; with planes, the last to arrive adds them up in order. `places` is the
// warp's own [kTokens] in shared memory.
template <int kTokens>
__device__ void store_page(const float (&d)[kTokens / 2], const Work& work, const Shrink& shrink, const PageItems& items, int pair,
                           int16_t* places) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const PageRows page(shrink, items, pair);
  const int32_t* rows = shrink.lora.tiles + __ldg(shrink.lora.tiles + 5) + page.place;
  for (int i = lane; i < kTokens; i += 32) places[i] = -1;
  __syncwarp();
  for (int i = lane; i < page.rows; i += 32) places[__ldg(rows + i)] = static_cast<int16_t>(i);
  __syncwarp();
  const int64_t plane_size = shrink.pairs * shrink.lora.span_count * kPageRank;
  float* out = work.planes == 1 ? shrink.lora.v : shrink.partial + items.plane * plane_size;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {  // d[4 j + 2 h + c]: rank lane / 4 + 8 h, token 8 j + 2 (lane % 4) + c
    const int place = places[i / 4 * 8 + lane % 4 * 2 + i % 2], rank = lane / 4 + i / 2 % 2 * 8;
    if (place >= 0) out[page.offset(shrink, place) + rank] = work.planes == 1 ? (rank < page.ranks ? d[i] * page.factor : 0.0f) : d[i];
  }
  if (work.planes == 1) return;
  __threadfence();
  __syncwarp();
  int arrived = 0;
  if (lane == 0) arrived = atomicAdd(shrink.arrivals + page.arrival, 1);
  if (__shfl_sync(0xFFFFFFFF, arrived, 0) + 1 < work.planes) return;
  __threadfence();
  if (lane == 0) shrink.arrivals[page.arrival] = 0;
  for (int i = lane; i < page.rows * kPageRank; i += 32) {
    const int64_t at = page.offset(shrink, i / kPageRank) + i % kPageRank;
    float sum = 0.0f;
    for (int plane = 0; plane < work.planes; ++plane) sum += __ldcg(shrink.partial + plane * plane_size + at);
    shrink.lora.v[at] = i % kPageRank < page.ranks ? sum * page.factor : 0.0f;
  }
}

// The first warpgroup multiplies the pages, the second only frees the stages.
template <int kTokens>
__device__ void consume_pages(const Work& work, const Shrink& shrink, const Ring& ring, int next, RingPosition at, int16_t* places) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (PageItems items(work, shrink, next); !items.is_done(); items.next()) {
    float d[kTokens / 2];
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) d[i] = 0.0f;
    wgmma_results<kTokens / 2>(d);
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      barrier_wait(ring.full(at.stage), at.round & 1);
      if (warp < 4) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kGemmBlockK / 16; ++step) {
          Wgmma<kTokens>::add(d, wgmma_descriptor(ring.w(at.stage) + step * 32), wgmma_descriptor(ring.x(at.stage) + step * 32));
        }
        wgmma_commit();
        wgmma_wait<0>();
      }
      if (lane == 0) barrier_arrive(ring.empty(at.stage));
    }
    wgmma_results<kTokens / 2>(d);
    if (warp < items.pairs) store_page<kTokens>(d, work, shrink, items, warp, places + warp * kTokens);
  }
}

template <int kTokens, int kBlocks, int kCluster, bool kLora>
__device__ void consume(const Work& work, const Shrink& shrink, const Ring& ring, int16_t* places) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_block = warp / 4 * kBlocks;
  const auto release = [&](int stage) {
    if constexpr (kCluster == 1) {
      if (lane == 0) barrier_arrive(ring.empty(stage));
    } else {
      if (lane < kCluster) barrier_arrive_at(ring.empty(stage), lane);
    }
  };
  RingPosition at;
  Items<kCluster> items(work);
  for (; !items.is_done(); items.next()) {
    float d[kBlocks][kTokens / 2];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) d[block][i] = 0.0f;
      wgmma_results<kTokens / 2>(d[block]);
    }
    int previous = -1;
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      barrier_wait(ring.full(at.stage), at.round & 1);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kGemmBlockK / 16; ++step) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          Wgmma<kTokens>::add(d[block], wgmma_descriptor(ring.w(at.stage) + (first_block + block) * 64 * kRowBytes + step * 32),
                              wgmma_descriptor(ring.x(at.stage) + step * 32));
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = at.stage;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) wgmma_results<kTokens / 2>(d[block]);
    if (previous >= 0) release(previous);
    const int first_row = items.row_tile * work.tile_rows;
    const int row_end = min(first_row + work.tile_rows, work.outputs);
    const int64_t offset = static_cast<int64_t>(items.plane) * work.tokens * work.outputs;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int row = first_row + (first_block + block) * 64 + warp % 4 * 16 + lane / 4;
      if (work.is_bfloat16) {
        store_block<__nv_bfloat162, kTokens>(d[block], static_cast<__nv_bfloat162*>(work.y), work.tokens, work.outputs / 2, row, row_end);
      } else {
        store_block<float2, kTokens>(d[block], reinterpret_cast<float2*>(static_cast<float*>(work.y) + offset), work.tokens,
                                     work.outputs / 2, row, row_end);
      }
    }
  }
  if constexpr (kLora) consume_pages<kTokens>(work, shrink, ring, items.item, at, places);
}

// kBlocks: m64 blocks of each of the two consumer warpgroups.
template <int kTokens, int kBlocks, int kCluster, bool kLora>
__global__ __launch_bounds__(kThreads, 1) void skinny_gemm(const __grid_constant__ CUtensorMap w_map,
                                                           const __grid_constant__ CUtensorMap x_map,
                                                           const __grid_constant__ PageMaps pages, const Work work,
                                                           const __grid_constant__ Shrink shrink) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the body is empty and the launcher refuses
  extern __shared__ uint8_t shared[];
  __shared__ int16_t places[kLora ? kGemmShrinkPairs * kTokens : 1];
  Ring ring;
  ring.w_bytes = work.tile_rows * kRowBytes;
  ring.stage_bytes = ring.w_bytes + kTokens * kRowBytes;
  ring.stages = work.stages;
  ring.buffers = (shared_address(shared) + 1023) & ~1023u;
  const int overrun = max(0, 128 * kBlocks - work.tile_rows - kTokens) * kRowBytes;
  ring.barriers = ring.buffers + work.stages * ring.stage_bytes + overrun;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kConsumerWarps) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < work.stages) {
      barrier_init(ring.full(lane), 1);
      barrier_init(ring.empty(lane), kConsumerWarps * kCluster);
    }
    barrier_init_fence();
    __syncwarp();
    if (lane == 0) load_early<kCluster>(work, ring, &w_map);  // its own barriers: no need to wait for the block
    __syncwarp();
  }
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  if (warp == kConsumerWarps) {
    if (threadIdx.x % 32 == 0) produce<kTokens, kCluster, kLora>(work, shrink, ring, &w_map, &x_map, pages);
    __syncwarp();
  } else {
    wait_for_dependencies();  // y may still be read by a kernel ahead
    consume<kTokens, kBlocks, kCluster, kLora>(work, shrink, ring, places);
  }
  if constexpr (kCluster > 1) cluster_sync();  // nobody leaves while others still write to its shared memory
#endif
}

using Kernel = void (*)(const CUtensorMap, const CUtensorMap, const PageMaps, const Work, const Shrink);

// Null for what is not built: sharing x pays only where x is large, and four blocks' accumulators fit up to 128 tokens.
template <int kTokens, bool kLora>
Kernel kernel_of(int row_blocks, int cluster) {
  constexpr int kShared = !kLora && kTokens >= 64 ? 2 : 1;  // a cluster that is not built becomes the one that is
  constexpr int kWide = !kLora && kTokens >= 128 ? 4 : kShared;
  if (cluster > kWide) return nullptr;
  if (row_blocks == 2) {
    if (cluster == 4) return skinny_gemm<kTokens, 1, kWide, kLora>;
    return cluster == 2 ? skinny_gemm<kTokens, 1, kShared, kLora> : skinny_gemm<kTokens, 1, 1, kLora>;
  }
  if constexpr (kTokens <= 128) {
    if (cluster == 2) return skinny_gemm<kTokens, 2, kShared, kLora>;
    if (cluster == 1) return skinny_gemm<kTokens, 2, 1, kLora>;
  }
  return nullptr;
}

template <bool kLora>
Kernel find_kernel(const SkinnyGemmPlan& plan) {
  switch (plan.tile_tokens) {
    case 8: return kernel_of<8, kLora>(plan.row_blocks, plan.cluster);
    case 16: return kernel_of<16, kLora>(plan.row_blocks, plan.cluster);
    case 32: return kernel_of<32, kLora>(plan.row_blocks, plan.cluster);
    case 64: return kernel_of<64, kLora>(plan.row_blocks, plan.cluster);
    case 96: return kernel_of<96, kLora>(plan.row_blocks, plan.cluster);
    case 128: return kernel_of<128, kLora>(plan.row_blocks, plan.cluster);
    case 192: return kernel_of<192, kLora>(plan.row_blocks, plan.cluster);
    case 256: return kernel_of<256, kLora>(plan.row_blocks, plan.cluster);
    default: return nullptr;
  }
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found through the runtime so that nothing links libcuda.
EncodeTiled find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(entry) : nullptr;
}

// A [rows, columns] bf16 matrix read in boxes of [box_rows, 64], zeros beyond its edge.
bool encode_map(EncodeTiled encode, CUtensorMap* map, const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kGemmBlockK, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Every page's A of one module as [pages, 16, inputs]. How many pages there are is not known here, and nothing reads beyond
// those that the tiles name.
bool encode_pages(EncodeTiled encode, CUtensorMap* map, const LoraWork& lora, const LoraSpan& span) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(span.inputs), kPageRank, 1u << 18};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(span.inputs) * 2, static_cast<cuuint64_t>(lora.page_elements) * 2};
  const cuuint32_t box[3] = {kGemmBlockK, kPageRank, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  auto* first = static_cast<uint16_t*>(const_cast<void*>(lora.pages)) + span.a_offset;
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, first, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Whether the shrink can ride along: the planes' sums have a place, and the copy engine can address the pages.
bool has_valid_lora(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan) {
  if (args.lora == nullptr) return true;
  bool is_valid = args.lora->span_count >= 1 && args.lora->span_count <= kMaxLoraSpans && args.lora->page_elements % 8 == 0 &&
                  reinterpret_cast<uintptr_t>(args.lora->pages) % 16 == 0 && plan.cluster == 1 &&
                  plan.tile_rows >= kGemmShrinkPairs * kPageRank &&
                  (plan.planes == 1 || (args.lora_partial != nullptr && args.lora_arrivals != nullptr));
  for (int m = 0; is_valid && m < args.lora->span_count; ++m) {
    is_valid = args.lora->spans[m].inputs == args.inputs && args.lora->spans[m].a_offset % 8 == 0;
  }
  return is_valid;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool can_run_skinny_gemm(int64_t tokens, int64_t outputs, int64_t inputs) { return gemm_can_run(tokens, outputs, inputs); }

bool is_skinny_gemm_faster(int64_t tokens, int64_t outputs, int64_t inputs) { return gemm_is_faster(tokens, outputs, inputs); }

int skinny_gemm_planes(int64_t outputs, int64_t inputs) { return gemm_planes(outputs, inputs); }

cudaError_t launch_skinny_gemm(const SkinnyGemmArgs& args, cudaStream_t stream) {
  if (!can_run_skinny_gemm(args.tokens, args.outputs, args.inputs)) return cudaErrorInvalidValue;
  const SkinnyGemmPlan plan = gemm_plan(args.tokens, args.outputs, args.inputs, args.lora != nullptr);
  return launch_skinny_gemm_as(args, plan, stream);
}

cudaError_t launch_skinny_gemm_as(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan, cudaStream_t stream) {
  const bool is_valid = can_run_skinny_gemm(args.tokens, args.outputs, args.inputs) && args.tokens <= plan.tile_tokens &&
                        plan.tile_rows % 8 == 0 && plan.tile_rows <= std::min(64 * plan.row_blocks, 256) &&
                        gemm_shared_bytes(plan) <= kGemmSharedBytes && args.x_stride % 8 == 0 && args.x_stride >= args.inputs &&
                        is_aligned(args.x) && is_aligned(args.w) && is_aligned(args.y) &&
                        (args.output == GemmOutput::kFloatPlanes || plan.planes == 1) && has_valid_lora(args, plan);
  const Kernel kernel = !is_valid ? nullptr : args.lora != nullptr ? find_kernel<true>(plan) : find_kernel<false>(plan);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  static const EncodeTiled encode = find_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  CUtensorMap w_map, x_map;
  if (!encode_map(encode, &w_map, args.w, args.outputs, args.inputs, args.inputs, plan.tile_rows) ||
      !encode_map(encode, &x_map, args.x, args.tokens, args.inputs, args.x_stride, plan.tile_tokens / plan.cluster)) {
    return cudaErrorInvalidValue;
  }
  int device = 0, sm_count = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess && major != 9) status = cudaErrorNotSupported;
  const int shared_bytes = gemm_shared_bytes(plan);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;

  Work work{args.y, args.tokens, args.outputs};
  work.k_blocks = args.inputs / kGemmBlockK;
  work.planes = plan.planes;
  work.row_tiles = gemm_row_tiles(args.outputs, plan.tile_rows);
  work.tile_rows = plan.tile_rows;
  work.stages = plan.stages;
  work.early = plan.early > 0 ? std::min(plan.early, plan.stages) : plan.stages;
  work.is_bfloat16 = args.output == GemmOutput::kBfloat16;
  const int groups = (work.row_tiles + plan.cluster - 1) / plan.cluster * plan.planes;
  PageMaps pages = {};
  Shrink shrink = {};
  if (args.lora != nullptr) {
    shrink = {*args.lora, args.lora_pairs, args.lora_partial, args.lora_arrivals};
    for (int m = 0; m < args.lora->span_count; ++m) {
      if (!encode_pages(encode, &pages.a[m], *args.lora, args.lora->spans[m])) return cudaErrorInvalidValue;
    }
  }
  const int resident = sm_count * (2 * shared_bytes <= kGemmSharedBytes - 2048 ? 2 : 1) / plan.cluster;

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = args.use_pdl ? 1 : 0;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = plan.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  // With a shrink, whose items only the device counts, every SM has a block.
  config.gridDim = dim3(args.lora != nullptr ? resident : std::min(groups, resident) * plan.cluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, w_map, x_map, pages, work, shrink);
}

}  // namespace openlora
