// The LoRA shrink in the skinny GEMM's launch: three warps of every block, on pages that come through the ring of W.
//
// Loads of their own would wait: W keeps 200 KB an SM in flight, and whatever joins the memory's queue leaves it some 9 us later. So
// the producer puts stages of A between those of W, the first ones before the kernels ahead have ended, and memory gives both what
// they ask for, in that order.
//
// A task is one module of an item (16 ranks of a page, up to 16 rows; lora_work.h) and 512 inputs: one stage, 16 rows of 1 KB. Tasks are
// dealt to the blocks from the last one on, which have the fewest rows of W. A warp takes a task alone: ranks are the m side of
// mma.m16n8k16, and lane (g, t) takes 8 neighbouring k of ranks g and g + 8 and of rows g and g + 8, a permutation of k that both
// sides share. x comes from L2.
//
// The chunks' sums meet in device memory: whoever comes last adds them up, in an order that K alone decides.
#pragma once

#include <cuda_bf16.h>

#include "device.cuh"
#include "gemm_plan.h"
#include "gemm_tma.cuh"
#include "lora_work.h"

namespace openlora {

constexpr int kShrinkWarps = 3;    // beside the producer: together they fill a third warpgroup
constexpr int kShrinkStep = 32;    // k of one load: 4 lanes of 8
constexpr int kShrinkSteps = kGemmShrinkColumns / kShrinkStep;
constexpr int kShrinkReleases = 8;  // a stage is free when so many have let go of it: here one warp for all
constexpr int kShrinkBarriers = 24;  // no fewer than stages, a multiple of the warps: who waits for one has waited for its last phase

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

// The tasks of a block, and where their stages stand: behind the first `start` stages of k of its first work item, then between the
// following ones, the rest behind the last.
struct ShrinkSchedule {
  int first, count;  // of its tasks; the next one is gridDim.x further
  int start, k_stages;
  int chunks;

  __device__ __forceinline__ int task(int j) const { return first + j * static_cast<int>(gridDim.x); }
  __device__ __forceinline__ int position(int j) const { return min(start + 2 * j, k_stages + j); }
  // Whether the next stage is one of A, after `passed` of them and i stages of k.
  __device__ __forceinline__ bool is_due(int i, int passed) const { return passed < count && i == start + passed; }
};

__device__ __forceinline__ ShrinkSchedule shrink_schedule(const Shrink& shrink, int start, int k_stages) {
  ShrinkSchedule found;
  found.chunks = gemm_shrink_chunks(shrink.inputs);
  found.first = static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x);
  const int total = __ldg(shrink.lora.tiles + 1) * shrink.lora.span_count * found.chunks;
  found.count = total > found.first ? (total - 1 - found.first) / static_cast<int>(gridDim.x) + 1 : 0;
  found.start = start;
  found.k_stages = k_stages;
  return found;
}

__device__ __forceinline__ int shrink_columns(const Shrink& shrink, int chunk) {
  return min(kGemmShrinkColumns, shrink.inputs - chunk * kGemmShrinkColumns);
}

__device__ __forceinline__ int shrink_ranks(const LoraWork& lora, int span, const int4& entry) {
  const int left = __ldg(lora.ranks + static_cast<int64_t>(lora.spans[span].module) * lora.slots + entry.y) - entry.z * kPageRank;
  return left <= 0 ? 0 : left >= kPageRank ? kPageRank : left;
}

// ---- A: the producer warp, all lanes

// A lane's task: where its first rank lies.
struct ShrinkSource {
  const __nv_bfloat16* a;
  int ranks;
};

__device__ __forceinline__ ShrinkSource read_shrink_source(const Shrink& shrink, const ShrinkSchedule& schedule, int j) {
  ShrinkSource found{nullptr, 0};
  if (j >= schedule.count) return found;
  const LoraWork& lora = shrink.lora;
  const int task = schedule.task(j), number = task / schedule.chunks;
  const int4* items = reinterpret_cast<const int4*>(lora.tiles + __ldg(lora.tiles + 7));
  const int4 entry = __ldg(items + 2 * (number / lora.span_count) + 1);
  const int span = number % lora.span_count;
  found.a = static_cast<const __nv_bfloat16*>(lora.pages) + entry.x * lora.page_elements + lora.spans[span].a_offset +
            task % schedule.chunks * kGemmShrinkColumns;
  found.ranks = shrink_ranks(lora, span, entry);
  return found;
}

// Fills a stage that is free. `own` is the lane's source among the 32 of this turn. The stage's own barrier does not wait for the bytes:
// it only keeps its phases in step with the rounds.
template <class Ring>
__device__ __forceinline__ void load_shrink_stage(const Shrink& shrink, const ShrinkSchedule& schedule, ShrinkSource& own, int j,
                                                  const Ring& ring, int stage, uint64_t policy) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncwarp();
  if (j > 0 && j % kWarp == 0) own = read_shrink_source(shrink, schedule, j + lane);
  const auto* a = reinterpret_cast<const __nv_bfloat16*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(own.a), j % kWarp));
  const int ranks = __shfl_sync(kAllLanes, own.ranks, j % kWarp);
  const int bytes = shrink_columns(shrink, schedule.task(j) % schedule.chunks) * 2;
  if (lane == 0) {
    barrier_expect(ring.a_full(j), ranks * bytes);
    barrier_arrive(ring.full(stage));
  }
  __syncwarp();
  if (lane < ranks) {
    bulk_load(ring.w(stage) + lane * kGemmShrinkPitch, a + static_cast<int64_t>(lane) * shrink.inputs, bytes, ring.a_full(j), policy);
  }
}

// ---- v: the shrink warps

// A warp's task. What it waits for longest is asked for one task ahead.
struct ShrinkTask {
  int4 tile, entry;  // the item
  int number, chunk, span, ranks;
  int row[2];  // of x, of this lane's two rows; negative where there is none

  __device__ __forceinline__ void read_item(const Shrink& shrink, const ShrinkSchedule& schedule, const int4* items, int j) {
    number = schedule.task(j) / schedule.chunks;
    chunk = schedule.task(j) % schedule.chunks;
    span = number % shrink.lora.span_count;
    tile = __ldg(items + 2 * (number / shrink.lora.span_count));
    entry = __ldg(items + 2 * (number / shrink.lora.span_count) + 1);
  }
  __device__ __forceinline__ void read_rows(const Shrink& shrink, const int32_t* row_list, int lane) {
    ranks = shrink_ranks(shrink.lora, span, entry);
#pragma unroll
    for (int n = 0; n < 2; ++n) row[n] = n * 8 + lane / 4 < rows() ? __ldg(row_list + tile.x + n * 8 + lane / 4) : -1;
  }
  __device__ __forceinline__ int rows() const { return tile.y & 0xffff; }
  // Where in the chunks' sums the 16 values of row `r` of the tile stand.
  __device__ __forceinline__ int64_t place(int r, int spans) const {
    return ((tile.z + static_cast<int64_t>(r) * (tile.y >> 16) + tile.w) * spans + span) * kPageRank;
  }
};

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address) : "memory");
  return value;
}

// x of 8 rows times A: asks for x, then waits for the stage.
__device__ __forceinline__ void multiply_shrink(const Shrink& shrink, const ShrinkTask& task, int n, uint32_t a, uint32_t full, uint32_t parity,
                                                int lane, float (&acc)[4]) {
  const int steps = shrink_columns(shrink, task.chunk) / kShrinkStep;
  const auto* x = static_cast<const __nv_bfloat16*>(shrink.x) + task.row[n] * shrink.x_stride + task.chunk * kGemmShrinkColumns + lane % 4 * 8;
  uint4 row[kShrinkSteps];
#pragma unroll
  for (int u = 0; u < kShrinkSteps; ++u) {
    row[u] = task.row[n] >= 0 && u < steps ? __ldcg(reinterpret_cast<const uint4*>(x + u * kShrinkStep)) : make_uint4(0, 0, 0, 0);
  }
  barrier_wait(full, parity);
  const uint32_t from = a + lane / 4 * kGemmShrinkPitch + lane % 4 * 16;
#pragma unroll
  for (int u = 0; u < kShrinkSteps; ++u) {
    if (u >= steps) break;
    const uint4 low = load_shared(from + u * kShrinkStep * 2), high = load_shared(from + 8 * kGemmShrinkPitch + u * kShrinkStep * 2);
    mma_bf16(acc, low.x, high.x, low.y, high.y, row[u].x, row[u].y);
    mma_bf16(acc, low.z, high.z, low.w, high.w, row[u].z, row[u].w);
  }
}

__device__ __forceinline__ void store_shrink_sums(const Shrink& shrink, const ShrinkTask& task, int lane, const float (&acc)[2][4]) {
  const int spans = shrink.lora.span_count;
  float* sums = shrink.partial + task.chunk * shrink.pairs * spans * kPageRank;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = n * 8 + 2 * (lane % 4) + i % 2, rank = lane / 4 + 8 * (i / 2);
      if (r < task.rows()) sums[task.place(r, spans) + rank] = rank < task.ranks ? acc[n][i] : 0.0f;  // beyond: whatever the stage held
    }
  }
}

// v of a task's item and module from the chunks' sums. Four lanes share four ranks: lane s takes chunks s, s + 4, ...
__device__ __forceinline__ void finish_shrink(const Shrink& shrink, const ShrinkTask& task, int chunks, int lane) {
  const LoraWork& lora = shrink.lora;
  const int64_t plane = shrink.pairs * lora.span_count * kPageRank;
  const float scale =
      __ldg(lora.scales + static_cast<int64_t>(lora.spans[task.span].module) * lora.slots + task.entry.y) * __int_as_float(task.entry.w);
#pragma unroll 4
  for (int first = 0; first < task.rows(); first += 2) {
    const int row = first + lane / 16, quad = lane / 4 % 4;
    const bool is_real = row < task.rows();
    const float* sums = shrink.partial + (is_real ? task.place(row, lora.span_count) + 4 * quad : 0);
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 2
    for (int c = lane % 4; c < chunks; c += 4) {
      const float4 part = __ldcg(reinterpret_cast<const float4*>(sums + c * plane));
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      sum.x += __shfl_xor_sync(kAllLanes, sum.x, offset);
      sum.y += __shfl_xor_sync(kAllLanes, sum.y, offset);
      sum.z += __shfl_xor_sync(kAllLanes, sum.z, offset);
      sum.w += __shfl_xor_sync(kAllLanes, sum.w, offset);
    }
    if (is_real && lane % 4 == 0) {
      auto* v = reinterpret_cast<float4*>(lora.v + task.place(row, lora.span_count) + 4 * quad);
      *v = make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
    }
  }
}

// Counts a task's sums in; the last of an item and module makes its v.
__device__ __forceinline__ void arrive_shrink(const Shrink& shrink, const ShrinkTask& task, int chunks, int lane) {
  __threadfence();
  __syncwarp();
  int32_t* arrivals = shrink.arrivals + task.number;
  int arrived = lane == 0 ? atomicAdd(arrivals, 1) : 0;
  arrived = __shfl_sync(kAllLanes, arrived, 0);
  if (arrived + 1 < chunks) return;
  __threadfence();
  if (lane == 0) *arrivals = 0;
  finish_shrink(shrink, task, chunks, lane);
}

// One of the three warps: every third task of the block.
template <class Ring>
__device__ __forceinline__ void shrink_tasks(const Shrink& shrink, const ShrinkSchedule& schedule, const Ring& ring, int warp, int lane) {
  if (warp >= schedule.count) return;
  const int32_t* tiles = shrink.lora.tiles;
  const int4* items = reinterpret_cast<const int4*>(tiles + __ldg(tiles + 7));
  const int32_t* row_list = tiles + __ldg(tiles + 5);
  ShrinkTask next;
  next.read_item(shrink, schedule, items, warp);
  next.read_rows(shrink, row_list, lane);
  wait_for_dependencies();
#pragma unroll 1
  for (int j = warp; j < schedule.count; j += kShrinkWarps) {
    const ShrinkTask task = next;
    if (j + kShrinkWarps < schedule.count) next.read_item(shrink, schedule, items, j + kShrinkWarps);
    const int stage = schedule.position(j) % ring.stages;
    const uint32_t parity = j / kShrinkBarriers & 1;
    float acc[2][4] = {};
    multiply_shrink(shrink, task, 0, ring.w(stage), ring.a_full(j), parity, lane, acc[0]);
    if (task.rows() > 8) multiply_shrink(shrink, task, 1, ring.w(stage), ring.a_full(j), parity, lane, acc[1]);
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty(stage), kShrinkReleases);
    if (j + kShrinkWarps < schedule.count) next.read_rows(shrink, row_list, lane);
    store_shrink_sums(shrink, task, lane, acc);
    arrive_shrink(shrink, task, schedule.chunks, lane);
  }
}

}  // namespace openlora
