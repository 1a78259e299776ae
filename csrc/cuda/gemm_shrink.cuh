// The LoRA shrink in the skinny GEMM's launch: three warps of every block, on pages that come through the ring of W.
//
// Loads of their own would wait: W keeps 200 KB an SM in flight, and whatever joins the memory's queue leaves it some 9 us later. So
// the producer puts stages of A between those of W, the first ones before the kernels ahead have ended, and memory gives both what
// they ask for, in that order.
//
// A task is one module of an item (16 ranks of a page, up to 16 rows; lora_work.h) and one chunk of k: one stage of 512 inputs. Tasks
// are dealt to the blocks from the last one on, which have the fewest rows of W. A warp takes a task alone: ranks are the m side of
// mma.m16n8k16, and lane (g, t) takes 8 neighbouring k of ranks g and g + 8 and of rows g and g + 8, a permutation of k that both
// sides share. x comes from L2, 8 steps ahead, because a stage that waits for its warp holds up W. Every chunk has a plane of v, which
// whoever reads v adds up: soon after x nothing is left to wait for.
//
// Shared memory: stages of the ring, 17 KB each, and 192 bytes of barriers. Device memory: A of each item once, 16 bytes a rank and
// 8 inputs; x and v stay in L2. Bound: A's bytes beside W's.
#pragma once

#include <cuda_bf16.h>

#include "device.cuh"
#include "gemm_plan.h"
#include "gemm_tma.cuh"
#include "lora_work.h"

namespace openlora {

constexpr int kShrinkWarps = 3;     // beside the producer: together they fill a third warpgroup
constexpr int kShrinkStep = 32;     // k of one load: 4 lanes of 8
constexpr int kShrinkDepth = 8;     // loads of x ahead
constexpr int kShrinkReleases = 8;  // a stage is free when so many have let go of it: here one warp for all
// No fewer than the ring's stages, so that a barrier's last stage has been left, and a multiple of the warps, so that it was left by the
// warp that waits for the next one.
constexpr int kShrinkBarriers = 24;

// The shrink's share of a launch.
struct Shrink {
  LoraWork lora;
  const void* x;
  int64_t x_stride;
  int inputs;
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

// First of the inputs of task j, and how many they are.
__device__ __forceinline__ int shrink_column(const ShrinkSchedule& schedule, int j) {
  return schedule.task(j) % schedule.chunks * kGemmShrinkColumns;
}
__device__ __forceinline__ int shrink_columns(const Shrink& shrink, int column) {
  return min(kGemmShrinkColumns, shrink.inputs - column);
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
  const int number = schedule.task(j) / schedule.chunks;
  const int4* items = reinterpret_cast<const int4*>(lora.tiles + __ldg(lora.tiles + 7));
  const int4 entry = __ldg(items + 2 * (number / lora.span_count) + 1);
  const int span = number % lora.span_count;
  found.a = static_cast<const __nv_bfloat16*>(lora.pages) + entry.x * lora.page_elements + lora.spans[span].a_offset +
            shrink_column(schedule, j);
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
  const int bytes = shrink_columns(shrink, shrink_column(schedule, j)) * 2;
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

// A warp's task. What it waits for is asked for one task ahead.
struct ShrinkTask {
  int4 tile, entry;  // the item
  int chunk, span, ranks, steps;
  float scale;
  const __nv_bfloat16* x[2];  // of the chunk, for this lane's two rows; null where there is none

  __device__ __forceinline__ void read_item(const Shrink& shrink, const ShrinkSchedule& schedule, const int4* items, int j) {
    const int number = schedule.task(j) / schedule.chunks;
    chunk = schedule.task(j) % schedule.chunks;
    span = number % shrink.lora.span_count;
    tile = __ldg(items + 2 * (number / shrink.lora.span_count));
    entry = __ldg(items + 2 * (number / shrink.lora.span_count) + 1);
  }
  __device__ __forceinline__ void read_rows(const Shrink& shrink, const ShrinkSchedule& schedule, const int32_t* row_list, int j, int lane) {
    const LoraWork& lora = shrink.lora;
    ranks = shrink_ranks(lora, span, entry);
    scale = __ldg(lora.scales + static_cast<int64_t>(lora.spans[span].module) * lora.slots + entry.y) * __int_as_float(entry.w);
    const int column = shrink_column(schedule, j);
    steps = shrink_columns(shrink, column) / kShrinkStep;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int r = n * 8 + lane / 4;
      x[n] = r < rows() ? static_cast<const __nv_bfloat16*>(shrink.x) + __ldg(row_list + tile.x + r) * shrink.x_stride + column + lane % 4 * 8
                        : nullptr;
    }
  }
  __device__ __forceinline__ int rows() const { return tile.y & 0xffff; }
  // Where in a plane of v the 16 values of row `r` of the tile stand.
  __device__ __forceinline__ int64_t place(int r, int spans) const {
    return ((tile.z + static_cast<int64_t>(r) * (tile.y >> 16) + tile.w) * spans + span) * kPageRank;
  }
};

// x of a task, kShrinkDepth steps ahead.
struct ShrinkRows {
  uint4 row[kShrinkDepth][2];

  __device__ __forceinline__ void load(const ShrinkTask& task, int u, int step) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      row[u][n] = task.x[n] != nullptr && step < task.steps ? __ldcg(reinterpret_cast<const uint4*>(task.x[n] + step * kShrinkStep))
                                                            : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void open(const ShrinkTask& task) {
#pragma unroll
    for (int u = 0; u < kShrinkDepth; ++u) load(task, u, u);
  }
};

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address) : "memory");
  return value;
}

// x A^T. Ranks that are not there hold what the stage held before: their sums are not used.
__device__ __forceinline__ void multiply_shrink(const ShrinkTask& task, ShrinkRows& x, uint32_t stage, int lane, float (&acc)[2][4]) {
  uint32_t from = stage + lane / 4 * kGemmShrinkPitch + lane % 4 * 16;
#pragma unroll 1
  for (int step = 0; step < task.steps; step += kShrinkDepth) {
#pragma unroll
    for (int u = 0; u < kShrinkDepth; ++u, from += kShrinkStep * 2) {
      if (step + u >= task.steps) break;
      const uint4 low = load_shared(from), high = load_shared(from + 8 * kGemmShrinkPitch);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if (n * 8 >= task.rows()) break;
        const uint4& row = x.row[u][n];
        mma_bf16(acc[n], low.x, high.x, low.y, high.y, row.x, row.y);
        mma_bf16(acc[n], low.z, high.z, low.w, high.w, row.z, row.w);
      }
      x.load(task, u, step + u + kShrinkDepth);
    }
  }
}

__device__ __forceinline__ void store_v(const LoraWork& lora, const ShrinkTask& task, int lane, const float (&acc)[2][4]) {
  float* v = lora.v + task.chunk * lora.v_stride;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = n * 8 + 2 * (lane % 4) + i % 2, rank = lane / 4 + 8 * (i / 2);
      if (r < task.rows()) v[task.place(r, lora.span_count) + rank] = rank < task.ranks ? acc[n][i] * task.scale : 0.0f;
    }
  }
}

// One of the three warps: every third task of the block.
template <class Ring>
__device__ __forceinline__ void shrink_tasks(const Shrink& shrink, const ShrinkSchedule& schedule, const Ring& ring, int warp, int lane) {
  const int32_t* tiles = shrink.lora.tiles;
  const int4* items = reinterpret_cast<const int4*>(tiles + __ldg(tiles + 7));
  const int32_t* row_list = tiles + __ldg(tiles + 5);
  int j = warp;
  if (j >= schedule.count) return;
  ShrinkTask task;
  ShrinkRows x;
  task.read_item(shrink, schedule, items, j);
  task.read_rows(shrink, schedule, row_list, j, lane);
  wait_for_dependencies();
  x.open(task);
  while (true) {
    ShrinkTask next = task;
    const bool has_next = j + kShrinkWarps < schedule.count;
    if (has_next) next.read_item(shrink, schedule, items, j + kShrinkWarps);
    float acc[2][4] = {};
    const int stage = schedule.position(j) % ring.stages;
    barrier_wait(ring.a_full(j), j / kShrinkBarriers & 1);
    multiply_shrink(task, x, ring.w(stage), lane, acc);
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty(stage), kShrinkReleases);
    if (has_next) {
      next.read_rows(shrink, schedule, row_list, j + kShrinkWarps, lane);
      x.open(next);
    }
    store_v(shrink.lora, task, lane, acc);
    if (!has_next) return;
    task = next;
    j += kShrinkWarps;
  }
}

}  // namespace openlora
