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

#include "device.cuh"
#include "gemm_plan.h"
#include "gemm_store.cuh"
#include "gemm_tma.cuh"
#include "gemm_wgmma.cuh"

namespace openlora {
namespace {

#ifndef EARLY
#define EARLY 1
#endif
#ifndef STORE
#define STORE 1
#endif
constexpr int kConsumerWarps = 8;
constexpr int kThreads = (kConsumerWarps + 1) * 32;
constexpr int kShrinkWarps = 3;  // beside the producer: together they fill a third warpgroup
constexpr int kShrinkThreads = kThreads + kShrinkWarps * 32;
constexpr int kRowBytes = kGemmBlockK * 2;  // one swizzle row

struct Work {
  void* y;
  int tokens, outputs;
  int k_blocks, planes, row_tiles, tile_rows, stages, x_stages, early;
  bool is_bfloat16, is_silu_mul;
};

// The shrink's share of a launch.
struct Shrink {
  LoraWork lora;
  const void* x;
  int64_t x_stride;
  int inputs;
  int64_t pairs;
  float* partial;
  int32_t* arrivals;
};

// Where the stages of W and of x and their barriers lie; the same in every block of a cluster. A step of k has a stage of each; W,
// whose way is longer, runs stages - x_stages steps ahead of x, so that the two are free again at the same moment.
struct Ring {
  uint32_t w_buffers, x_buffers, barriers, lines;
  int w_bytes, x_bytes;

  __device__ uint32_t w(int stage) const { return w_buffers + stage * w_bytes; }
  __device__ uint32_t x(int stage) const { return x_buffers + stage * x_bytes; }
  __device__ uint32_t w_full(int stage) const { return barriers + stage * 8; }
  __device__ uint32_t x_full(int stage) const { return barriers + 256 + stage * 16; }
  __device__ uint32_t empty(int stage) const { return barriers + 264 + stage * 16; }  // of x and of the W that was used with it
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
    row_tile = item / work.planes * kCluster + (kCluster > 1 ? static_cast<int>(cluster_rank()) : 0);
    plane = item % work.planes;
    first_k = gemm_plane_start(work.k_blocks, work.planes, plane);
    end_k = gemm_plane_start(work.k_blocks, work.planes, plane + 1);
  }
};

// The stages of W of one block, in order.
template <int kCluster>
struct WStream {
  const Work& work;
  const Ring& ring;
  const CUtensorMap* map;
  Items<kCluster> items;
  int k, stage = 0;

  __device__ WStream(const Work& w, const Ring& r, const CUtensorMap* m) : work(w), ring(r), map(m), items(w), k(items.first_k) {}
  __device__ void skip() {
    if (++stage == work.stages) stage = 0;
    if (++k < items.end_k) return;
    items.next();
    k = items.first_k;
  }
  __device__ void load(uint64_t policy) {
    if (items.is_done()) return;
    barrier_expect(ring.w_full(stage), ring.w_bytes);
    const int row = items.row_tile * work.tile_rows;
    if (work.is_silu_mul) tensor_load_pairs(ring.w(stage), map, k * kGemmBlockK, row / 16, ring.w_full(stage), policy);
    else tensor_load(ring.w(stage), map, k * kGemmBlockK, row, ring.w_full(stage), policy);
    skip();
  }
};

// With a cluster each block loads its share of the tokens and sends it to all.
template <int kTokens, int kCluster>
__device__ void load_x(const Ring& ring, const CUtensorMap* map, int k, int stage, uint64_t policy) {
  barrier_expect(ring.x_full(stage), ring.x_bytes);
  if constexpr (kCluster == 1) {
    tensor_load(ring.x(stage), map, k * kGemmBlockK, 0, ring.x_full(stage), policy);
  } else {
    const int first = static_cast<int>(cluster_rank()) * (kTokens / kCluster);
    tensor_load_multicast(ring.x(stage) + first * kRowBytes, map, k * kGemmBlockK, first, ring.x_full(stage), policy,
                          (1u << kCluster) - 1);
  }
}

// One thread: the first `early` stages of W, which no kernel in flight writes.
template <int kCluster>
__device__ void load_early(const Work& work, const Ring& ring, const CUtensorMap* w_map) {
  const uint64_t once = policy_evict_first();
  WStream<kCluster> w(work, ring, w_map);
  for (int i = 0; i < work.early; ++i) w.load(once);
}

// One thread: once the kernels ahead have ended, keeps the rings full.
template <int kTokens, int kCluster>
__device__ void produce(const Work& work, const Ring& ring, const CUtensorMap* w_map, const CUtensorMap* x_map) {
  const uint64_t once = policy_evict_first();
  const uint64_t keep = policy_evict_last();
  WStream<kCluster> w(work, ring, w_map);
  for (int i = 0; i < work.early && !w.items.is_done(); ++i) w.skip();
  wait_for_dependencies();
  launch_dependents();  // not before the wait: whoever starts now may read the same x (lora_work.h, Follow::kWaitLast)
  for (int i = work.early; i < work.stages - work.x_stages; ++i) w.load(once);
  RingPosition at;
  int step = work.stages - work.x_stages;
  for (Items<kCluster> items(work); !items.is_done(); items.next()) {
    for (int k = items.first_k; k < items.end_k; ++k, ++step, at.advance(work.x_stages)) {
      if (at.round > 0) barrier_wait(ring.empty(at.stage), (at.round - 1) & 1);
      if (step >= work.early) w.load(once);
      load_x<kTokens, kCluster>(ring, x_map, k, at.stage, keep);
    }
  }
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

template <typename Out, int kTokens, int kBlocks>
__device__ __forceinline__ void store_item_as(const Work& work, const Ring& ring, const float (&d)[kBlocks][kTokens / 2], int row_tile, int plane) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = row_tile * work.tile_rows, first_block = warp / 4 * kBlocks;
  const int row_end = min(first_row + work.tile_rows, work.outputs);
  Out* y = static_cast<Out*>(work.y);
  y += static_cast<int64_t>(plane) * work.tokens * work.outputs;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    if (STORE == 0) {
      const int row = first_row + (first_block + block) * 64 + warp % 4 * 16 + lane / 4;
      using Pair = std::conditional_t<sizeof(Out) == 2, __nv_bfloat162, float2>;
      store_block<Pair, kTokens>(d[block], reinterpret_cast<Pair*>(y), work.tokens, work.outputs / 2, row, row_end);
    } else if (STORE == 1) {
      store_lines<Out, kTokens>(d[block], y, work.tokens, work.outputs, first_row + (first_block + block) * 64, row_end,
                                ring.lines + warp / 4 * gemm_line_bytes(kTokens), 2 + warp / 4);
    } else {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sum += d[block][i];
      if (sum == 1234.5f) *y = Out(sum);
    }
  }
}

template <int kTokens, int kBlocks>
__device__ __forceinline__ void store_item(const Work& work, const Ring& ring, const float (&d)[kBlocks][kTokens / 2], int row_tile, int plane) {
  if (work.is_silu_mul) {
    const int group = static_cast<int>(threadIdx.x) / 128, first = row_tile * work.tile_rows / 2;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (STORE == 2 && d[block][0] != 1234.5f) continue;
      store_silu_mul<kTokens>(d[block], static_cast<__nv_bfloat16*>(work.y), work.tokens, work.outputs / 2, first + (group * kBlocks + block) * 32,
                              min(first + work.tile_rows / 2, work.outputs / 2), ring.lines + group * gemm_line_bytes(kTokens), 2 + group);
    }
    return;
  }
  if (work.is_bfloat16) store_item_as<__nv_bfloat16, kTokens, kBlocks>(work, ring, d, row_tile, plane);
  else store_item_as<float, kTokens, kBlocks>(work, ring, d, row_tile, plane);
}

template <int kTokens, int kBlocks, int kCluster>
__device__ void consume(const Work& work, const Ring& ring) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_block = warp / 4 * kBlocks;
  const auto release = [&](int stage) {
    if constexpr (kCluster == 1) {
      if (lane == 0) barrier_arrive(ring.empty(stage));
    } else {
      if (lane < kCluster) barrier_arrive_at(ring.empty(stage), lane);
    }
  };
  RingPosition at, w_at;
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
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.x_stages), w_at.advance(work.stages)) {
#if EARLY
      if (previous >= 0 && !__all_sync(0xFFFFFFFF, barrier_test(ring.w_full(w_at.stage), w_at.round & 1) && barrier_test(ring.x_full(at.stage), at.round & 1))) {
        wgmma_wait<0>();
        release(previous);
        previous = -1;
      }
#endif
      barrier_wait(ring.w_full(w_at.stage), w_at.round & 1);
      barrier_wait(ring.x_full(at.stage), at.round & 1);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kGemmBlockK / 16; ++step) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          Wgmma<kTokens>::add(d[block], wgmma_descriptor(ring.w(w_at.stage) + (first_block + block) * 64 * kRowBytes + step * 32),
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
    store_item<kTokens, kBlocks>(work, ring, d, items.row_tile, items.plane);
  }
}

// Sums of a task of the shrink, by warp: [G][16 rows][16 ranks].
template <bool kLora>
struct ShrinkSums {
  float of_warp[kLora ? kShrinkWarps : 1][kLora ? kMaxLoraSpans * 16 * kPageRank : 1];
  int arrived;
};

__device__ __forceinline__ void sync_shrink_warps() { asm volatile("bar.sync 1, %0;" ::"n"(kShrinkWarps * 32) : "memory"); }

// A task: one item (16 ranks of a page, all G modules, up to 16 rows) and one chunk of k, a third a warp. Ranks are the m side of
// mma.m16n8k16. Lane (g, t) takes 8 neighbouring k of ranks g and g + 8 and of row g: a permutation of k that both sides share.
template <int G>
__device__ __forceinline__ void shrink_items(const Shrink& shrink, ShrinkSums<true>& sums) {
  constexpr int kStep = 32, kDepth = G == 1 ? 4 : 2;
  const LoraWork& lora = shrink.lora;
  const int32_t* tiles = lora.tiles;
  const int thread = static_cast<int>(threadIdx.x) - kThreads, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int steps = shrink.inputs / kStep, chunks = gemm_shrink_chunks(shrink.inputs);
  const int count = __ldg(tiles + 1) * chunks;
  const int4* items = reinterpret_cast<const int4*>(tiles + __ldg(tiles + 7));
  const int32_t* row_list = tiles + __ldg(tiles + 5);
  bool has_waited = false;
  for (int task = static_cast<int>(blockIdx.x); task < count; task += static_cast<int>(gridDim.x)) {
    const int item = task / chunks, chunk = task % chunks;
    const int4 tile = __ldg(items + 2 * item), entry = __ldg(items + 2 * item + 1);  // lora_work.h
    const int rows = tile.y & 0xffff, entries = tile.y >> 16;
    const int begin = gemm_plane_start(steps, chunks, chunk), size = gemm_plane_start(steps, chunks, chunk + 1) - begin;
    const int first = begin + size * warp / kShrinkWarps, last = begin + size * (warp + 1) / kShrinkWarps;
    int ranks[G];
    const __nv_bfloat16* a[G];
#pragma unroll
    for (int m = 0; m < G; ++m) {
      ranks[m] = max(0, min(kPageRank, __ldg(lora.ranks + static_cast<int64_t>(lora.spans[m].module) * lora.slots + entry.y) - entry.z * kPageRank));
      a[m] = static_cast<const __nv_bfloat16*>(lora.pages) + entry.x * lora.page_elements + lora.spans[m].a_offset +
             static_cast<int64_t>(g) * shrink.inputs + t * 8;
    }
    const __nv_bfloat16* x[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int r = n * 8 + g;
      x[n] = r < rows ? static_cast<const __nv_bfloat16*>(shrink.x) + __ldg(row_list + tile.x + r) * shrink.x_stride + t * 8 : nullptr;
    }
    float acc[G][2][4] = {};
    for (int step = first; step < last; step += kDepth) {
      uint4 page[kDepth][G][2], row[kDepth][2];
#pragma unroll
      for (int u = 0; u < kDepth; ++u) {
#pragma unroll
        for (int m = 0; m < G; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            page[u][m][half] = step + u < last && g + 8 * half < ranks[m]
                                   ? load_stream(reinterpret_cast<const uint4*>(a[m] + static_cast<int64_t>(8 * half) * shrink.inputs + (step + u) * kStep))
                                   : make_uint4(0, 0, 0, 0);
          }
        }
      }
      if (!has_waited) {
        has_waited = true;
        wait_for_dependencies();
      }
#pragma unroll
      for (int u = 0; u < kDepth; ++u) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          row[u][n] = step + u < last && x[n] != nullptr ? __ldcg(reinterpret_cast<const uint4*>(x[n] + (step + u) * kStep)) : make_uint4(0, 0, 0, 0);
        }
      }
#pragma unroll
      for (int u = 0; u < kDepth; ++u) {
#pragma unroll
        for (int m = 0; m < G; ++m) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const uint4 &lo = page[u][m][0], &hi = page[u][m][1], &b = row[u][n];
            mma_bf16(acc[m][n], lo.x, hi.x, lo.y, hi.y, b.x, b.y);
            mma_bf16(acc[m][n], lo.z, hi.z, lo.w, hi.w, b.z, b.w);
          }
        }
      }
    }
    if (!has_waited) {  // a warp without steps
      has_waited = true;
      wait_for_dependencies();
    }
#pragma unroll
    for (int m = 0; m < G; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums.of_warp[warp][(m * 16 + n * 8 + 2 * t + i % 2) * kPageRank + g + 8 * (i / 2)] = acc[m][n][i];
        }
      }
    }
    sync_shrink_warps();
    const int64_t plane = shrink.pairs * G * kPageRank;
    const auto place = [&](int i) {  // of value i of the item, [rows][G][16], in v
      const int64_t pair = tile.z + static_cast<int64_t>(i / (G * kPageRank)) * entries + tile.w;
      return pair * G * kPageRank + i % (G * kPageRank);
    };
    const int values = rows * G * kPageRank;
    for (int i = thread; i < values; i += kShrinkWarps * 32) {
      const int at = (i / kPageRank % G * 16 + i / (G * kPageRank)) * kPageRank + i % kPageRank;
      float sum = sums.of_warp[0][at];
#pragma unroll
      for (int w = 1; w < kShrinkWarps; ++w) sum += sums.of_warp[w][at];
      shrink.partial[chunk * plane + place(i)] = sum;
    }
    __threadfence();
    sync_shrink_warps();
    if (thread == 0) sums.arrived = atomicAdd(shrink.arrivals + item, 1);
    sync_shrink_warps();
    if (sums.arrived + 1 < chunks) continue;  // whoever is last adds the chunks up, in order
    __threadfence();
    if (thread == 0) shrink.arrivals[item] = 0;
    for (int i = thread; i < values; i += kShrinkWarps * 32) {
      const int m = i / kPageRank % G;
      const int64_t at = place(i);
      float sum = 0.0f;
#pragma unroll 4
      for (int c = 0; c < chunks; ++c) sum += __ldcg(shrink.partial + c * plane + at);
      const float scale = __ldg(lora.scales + static_cast<int64_t>(lora.spans[m].module) * lora.slots + entry.y);
      lora.v[at] = sum * (scale * __int_as_float(entry.w));
    }
  }
}

// Three warps: v of every pair of the tiles, beside the stream of W and not after it.
__device__ __forceinline__ void shrink_all(const Shrink& shrink, ShrinkSums<true>& sums) {
  switch (shrink.lora.span_count) {
    case 1: return shrink_items<1>(shrink, sums);
    case 2: return shrink_items<2>(shrink, sums);
    default: return shrink_items<3>(shrink, sums);
  }
}
__device__ __forceinline__ void shrink_all(const Shrink&, ShrinkSums<false>&) {}

// kBlocks: m64 blocks of each of the two consumer warpgroups.
template <int kTokens, int kBlocks, int kCluster, bool kLora>
__global__ __launch_bounds__(kLora ? kShrinkThreads : kThreads, 1) void skinny_gemm(const __grid_constant__ CUtensorMap w_map,
                                                           const __grid_constant__ CUtensorMap x_map,
                                                           const Work work,
                                                           const __grid_constant__ Shrink shrink) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the body is empty and the launcher refuses
  extern __shared__ uint8_t shared[];
  __shared__ ShrinkSums<kLora> sums;
  Ring ring;
  ring.w_bytes = work.tile_rows * kRowBytes;
  ring.x_bytes = kTokens * kRowBytes;
  ring.w_buffers = (shared_address(shared) + 1023) & ~1023u;
  ring.x_buffers = ring.w_buffers + work.stages * ring.w_bytes;
  ring.barriers = ring.x_buffers + gemm_x_bytes(kTokens, 2 * kBlocks, work.tile_rows, work.x_stages);
  ring.lines = ring.barriers + kGemmBarrierBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kConsumerWarps) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < work.stages) barrier_init(ring.w_full(lane), 1);
    if (lane < work.x_stages) {
      barrier_init(ring.x_full(lane), 1);
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
    if (threadIdx.x % 32 == 0) produce<kTokens, kCluster>(work, ring, &w_map, &x_map);
    __syncwarp();
  } else if (kLora && warp > kConsumerWarps) {
    shrink_all(shrink, sums);
  } else {
    wait_for_dependencies();  // y may still be read by a kernel ahead
    consume<kTokens, kBlocks, kCluster>(work, ring);
  }
  if constexpr (kCluster > 1) cluster_sync();  // nobody leaves while others still write to its shared memory
#endif
}

using Kernel = void (*)(const CUtensorMap, const CUtensorMap, const Work, const Shrink);

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

// W of gate and up, [2][rows / 2, columns], in boxes that take 8 rows of each in turn.
bool encode_pairs(EncodeTiled encode, CUtensorMap* map, const void* matrix, int64_t rows, int64_t columns, int box_rows) {
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(columns) * 2;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), 8, 2, static_cast<cuuint64_t>(rows / 16)};
  const cuuint64_t strides[3] = {row_bytes, row_bytes * static_cast<cuuint64_t>(rows / 2), row_bytes * 8};
  const cuuint32_t box[4] = {kGemmBlockK, 8, 2, static_cast<cuuint32_t>(box_rows / 16)};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(matrix), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Whether the shrink can ride along: the planes' sums have a place, and the copy engine can address the pages.
bool has_valid_lora(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan) {
  if (args.lora == nullptr) return true;
  bool is_valid = args.lora->span_count >= 1 && args.lora->span_count <= kMaxLoraSpans && args.lora->page_elements % 8 == 0 &&
                  reinterpret_cast<uintptr_t>(args.lora->pages) % 16 == 0 && plan.cluster == 1 && args.lora->tile_rows <= 16 &&
                  args.lora_partial != nullptr && args.lora_arrivals != nullptr;
  for (int m = 0; is_valid && m < args.lora->span_count; ++m) {
    is_valid = args.lora->spans[m].inputs == args.inputs && args.lora->spans[m].a_offset % 8 == 0;
  }
  return is_valid;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool can_run_skinny_gemm(int64_t tokens, int64_t outputs, int64_t inputs) { return gemm_can_run(tokens, outputs, inputs); }

bool is_skinny_gemm_faster(int64_t tokens, int64_t outputs, int64_t inputs, bool has_adapters) {
  return gemm_is_faster(tokens, outputs, inputs, has_adapters);
}

int skinny_gemm_planes(int64_t outputs, int64_t inputs) { return gemm_planes(outputs, inputs); }

int skinny_gemm_shrink_chunks(int64_t inputs) { return gemm_shrink_chunks(static_cast<int>(inputs)); }

cudaError_t launch_skinny_gemm(const SkinnyGemmArgs& args, cudaStream_t stream) {
  if (!can_run_skinny_gemm(args.tokens, args.outputs, args.inputs)) return cudaErrorInvalidValue;
  const SkinnyGemmPlan plan = gemm_plan(args.tokens, args.outputs, args.inputs);
  return launch_skinny_gemm_as(args, plan, stream);
}

cudaError_t launch_skinny_gemm_as(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan, cudaStream_t stream) {
  const bool is_valid = can_run_skinny_gemm(args.tokens, args.outputs, args.inputs) && args.tokens <= plan.tile_tokens &&
                        plan.tile_rows % 8 == 0 && plan.tile_rows <= std::min(64 * plan.row_blocks, 256) &&
                        gemm_shared_bytes(plan) <= kGemmSharedBytes && args.x_stride % 8 == 0 && args.x_stride >= args.inputs &&
                        is_aligned(args.x) && is_aligned(args.w) && is_aligned(args.y) &&
                        plan.x_stages >= 2 && plan.x_stages <= 16 && plan.x_stages <= plan.stages && plan.stages <= 24 && has_valid_lora(args, plan);
  const Kernel kernel = !is_valid ? nullptr : args.lora != nullptr ? find_kernel<true>(plan) : find_kernel<false>(plan);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  static const EncodeTiled encode = find_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  CUtensorMap w_map, x_map;
  const bool is_silu_mul = args.output == GemmOutput::kSiluMul;
  if (is_silu_mul && (plan.planes != 1 || args.outputs % 16 != 0 || plan.tile_rows % 16 != 0)) return cudaErrorInvalidValue;
  if (!(is_silu_mul ? encode_pairs(encode, &w_map, args.w, args.outputs, args.inputs, plan.tile_rows)
                    : encode_map(encode, &w_map, args.w, args.outputs, args.inputs, args.inputs, plan.tile_rows)) ||
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
  work.is_silu_mul = is_silu_mul;
  work.is_bfloat16 = args.output == GemmOutput::kBfloat16;
  work.x_stages = plan.x_stages;
  const int groups = (work.row_tiles + plan.cluster - 1) / plan.cluster * plan.planes;
  Shrink shrink = {};
  if (args.lora != nullptr) {
    shrink = {*args.lora, args.x, args.x_stride, args.inputs, args.lora_pairs, args.lora_partial, args.lora_arrivals};
  }
  const int resident = sm_count * (2 * shared_bytes <= kGemmSharedBytes - 2048 ? 2 : 1);

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = args.use_pdl ? 1 : 0;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = plan.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  // With a shrink, whose items only the device counts, every SM has a block.
  config.gridDim = dim3((args.lora != nullptr ? resident : std::min(groups * plan.cluster, resident)) / plan.cluster * plan.cluster);
  config.blockDim = dim3(args.lora != nullptr ? kShrinkThreads : kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, w_map, x_map, work, shrink);
}

}  // namespace openlora
