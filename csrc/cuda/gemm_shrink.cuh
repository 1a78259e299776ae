// The LoRA shrink in the skinny GEMM's launch: three warps of every block, on pages that come through the ring of W.
//
// Loads of their own would wait: W keeps 200 KB an SM in flight, and whatever joins the memory's queue leaves it some 9 us later. So
// the producer puts stages of A between those of W, the first ones before the kernels ahead have ended, and memory gives both what
// they ask for, in that order.
//
// A task is one module of an item (16 ranks of a page, up to 16 rows; lora_work.h) and one chunk of k: some stages of 256 inputs, each
// with A and with x of the item's rows. Tasks are dealt to the blocks from the last one on, which have the fewest rows of W. A warp
// takes a task alone: ranks are the m side of mma.m16n8k16, and lane (g, t) takes 8 neighbouring k of ranks g and g + 8 and of rows g
// and g + 8, a permutation of k that both sides share. A stage that waits for its warp holds up W, so the warps wait for nothing else.
// Every chunk has a plane of v, which whoever reads v adds up: soon after x nothing is left to wait for.
#pragma once

#include <cuda_bf16.h>

#include "device.cuh"
#include "gemm_plan.h"
#include "gemm_tma.cuh"
#include "lora_work.h"

namespace openlora {

constexpr int kShrinkWarps = 3;    // beside the producer: together they fill a third warpgroup
constexpr int kShrinkStep = 32;    // k of one load: 4 lanes of 8
constexpr int kShrinkReleases = 8;  // a stage is free when so many have let go of it: here one warp for all
// No fewer than the ring's stages, so that a barrier's last stage has been left, and a multiple of the warps times the stages of a
// task, so that it was left by the warp that waits for the next one.
constexpr int kShrinkBarriers = 48;

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
  int first, count;  // of its tasks, the next one gridDim.x further; stages
  int start, k_stages;
  int chunks, stages;  // of a task

  // Of stage j.
  __device__ __forceinline__ int task(int j) const { return first + j / stages * static_cast<int>(gridDim.x); }
  __device__ __forceinline__ int position(int j) const { return min(start + 2 * j, k_stages + j); }
  // Whether the next stage is one of A, after `passed` of them and i stages of k.
  __device__ __forceinline__ bool is_due(int i, int passed) const { return passed < count && i == start + passed; }
};

__device__ __forceinline__ ShrinkSchedule shrink_schedule(const Shrink& shrink, int start, int k_stages) {
  ShrinkSchedule found;
  found.chunks = gemm_shrink_chunks(shrink.inputs);
  found.first = static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x);
  const int total = __ldg(shrink.lora.tiles + 1) * shrink.lora.span_count * found.chunks;
  found.stages = gemm_shrink_stages(shrink.inputs);
  found.count = total > found.first ? ((total - 1 - found.first) / static_cast<int>(gridDim.x) + 1) * found.stages : 0;
  found.start = start;
  found.k_stages = k_stages;
  return found;
}

// First of the inputs of stage j, and how many they are.
__device__ __forceinline__ int shrink_column(const ShrinkSchedule& schedule, int j) {
  return (schedule.task(j) % schedule.chunks * schedule.stages + j % schedule.stages) * kGemmShrinkColumns;
}
__device__ __forceinline__ int shrink_columns(const Shrink& shrink, int column) {
  return max(0, min(kGemmShrinkColumns, shrink.inputs - column));
}

__device__ __forceinline__ int shrink_ranks(const LoraWork& lora, int span, const int4& entry) {
  const int left = __ldg(lora.ranks + static_cast<int64_t>(lora.spans[span].module) * lora.slots + entry.y) - entry.z * kPageRank;
  return left <= 0 ? 0 : left >= kPageRank ? kPageRank : left;
}

// ---- A and x: the producer warp, all lanes

// A task to be fetched: where its first rank lies, and which rows of x stand where in the tiles.
struct ShrinkSource {
  const __nv_bfloat16* a;
  int ranks, place, rows;
  int row;  // lanes 16 to 31: theirs of x
};

__device__ __forceinline__ ShrinkSource read_shrink_source(const Shrink& shrink, const ShrinkSchedule& schedule, int q) {
  ShrinkSource found{nullptr, 0, 0, 0, 0};
  if (q * schedule.stages >= schedule.count) return found;
  const LoraWork& lora = shrink.lora;
  const int number = schedule.task(q * schedule.stages) / schedule.chunks;
  const int4* items = reinterpret_cast<const int4*>(lora.tiles + __ldg(lora.tiles + 7));
  const int4 tile = __ldg(items + 2 * (number / lora.span_count)), entry = __ldg(items + 2 * (number / lora.span_count) + 1);
  const int span = number % lora.span_count;
  found.a = static_cast<const __nv_bfloat16*>(lora.pages) + entry.x * lora.page_elements + lora.spans[span].a_offset;
  found.ranks = shrink_ranks(lora, span, entry);
  found.place = tile.x;
  found.rows = tile.y & 0xffff;
  return found;
}

// The block's tasks in order, the next one known before it is needed. A lane looks up every 32nd.
struct ShrinkFeed {
  ShrinkSource own, now, next;
  int q;  // of `now`

  __device__ __forceinline__ void start(const Shrink& shrink, const ShrinkSchedule& schedule) {
    own = read_shrink_source(shrink, schedule, static_cast<int>(threadIdx.x) % kWarp);
    q = 0;
    now = pick(shrink, 0);
    next = pick(shrink, 1);
  }
  __device__ __forceinline__ void advance(const Shrink& shrink, const ShrinkSchedule& schedule) {
    now = next;
    ++q;
    if ((q + 1) % kWarp == 0) own = read_shrink_source(shrink, schedule, q + 1 + static_cast<int>(threadIdx.x) % kWarp);
    next = pick(shrink, q + 1);
  }
  __device__ __forceinline__ ShrinkSource pick(const Shrink& shrink, int task) const {
    const int from = task % kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    ShrinkSource found;
    found.a = reinterpret_cast<const __nv_bfloat16*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(own.a), from));
    found.ranks = __shfl_sync(kAllLanes, own.ranks, from);
    found.place = __shfl_sync(kAllLanes, own.place, from);
    found.rows = __shfl_sync(kAllLanes, own.rows, from);
    const int32_t* row_list = shrink.lora.tiles + __ldg(shrink.lora.tiles + 5) + found.place;
    found.row = lane >= 16 && lane - 16 < found.rows ? __ldg(row_list + lane - 16) : -1;
    return found;
  }
};

// A of stage j, into a stage that is free. The stage's own barrier does not wait for the bytes: it only keeps its phases in step with
// the rounds.
template <class Ring>
__device__ __forceinline__ void load_shrink_pages(const Shrink& shrink, const ShrinkSchedule& schedule, const ShrinkSource& task, int j,
                                                  const Ring& ring, int stage, uint64_t policy) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, column = shrink_column(schedule, j);
  const int bytes = shrink_columns(shrink, column) * 2;
  __syncwarp();
  if (lane == 0) {
    barrier_expect(ring.a_full(j), (task.ranks + task.rows) * bytes);
    barrier_arrive(ring.full(stage));
  }
  __syncwarp();
  if (lane < task.ranks && bytes > 0) {
    bulk_load(ring.w(stage) + lane * kGemmShrinkPitch, task.a + static_cast<int64_t>(lane) * shrink.inputs + column, bytes, ring.a_full(j),
              policy);
  }
}

// x of the same stage, once the kernels ahead have ended.
template <class Ring>
__device__ __forceinline__ void load_shrink_rows(const Shrink& shrink, const ShrinkSchedule& schedule, const ShrinkSource& task, int j,
                                                 const Ring& ring, int stage, uint64_t policy) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, column = shrink_column(schedule, j);
  const int bytes = shrink_columns(shrink, column) * 2;
  if (task.row < 0 || bytes == 0) return;
  bulk_load(ring.w(stage) + kGemmShrinkPageBytes + (lane - 16) * kGemmShrinkPitch,
            static_cast<const __nv_bfloat16*>(shrink.x) + task.row * shrink.x_stride + column, bytes, ring.a_full(j), policy);
}

// ---- v: the shrink warps

// A warp's task, looked up one task ahead.
struct ShrinkTask {
  int4 tile, entry;  // the item
  int chunk, span;

  __device__ __forceinline__ void read(const Shrink& shrink, const ShrinkSchedule& schedule, const int4* items, int j) {
    const int number = schedule.task(j) / schedule.chunks;
    chunk = schedule.task(j) % schedule.chunks;
    span = number % shrink.lora.span_count;
    tile = __ldg(items + 2 * (number / shrink.lora.span_count));
    entry = __ldg(items + 2 * (number / shrink.lora.span_count) + 1);
  }
  __device__ __forceinline__ int rows() const { return tile.y & 0xffff; }
  // Where in a plane of v the 16 values of row `r` of the tile stand.
  __device__ __forceinline__ int64_t place(int r, int spans) const {
    return ((tile.z + static_cast<int64_t>(r) * (tile.y >> 16) + tile.w) * spans + span) * kPageRank;
  }
};

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address) : "memory");
  return value;
}

// x A^T of a stage. Ranks and rows that are not there hold what the stage held before: their sums are not used.
__device__ __forceinline__ void multiply_shrink(uint32_t stage, int steps, int rows, int lane, float (&acc)[2][4]) {
  uint32_t from = stage + lane / 4 * kGemmShrinkPitch + lane % 4 * 16;
#pragma unroll 2
  for (int step = 0; step < steps; ++step, from += kShrinkStep * 2) {
    const uint4 low = load_shared(from), high = load_shared(from + 8 * kGemmShrinkPitch);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (n * 8 >= rows) break;
      const uint4 row = load_shared(from + kGemmShrinkPageBytes + n * 8 * kGemmShrinkPitch);
      mma_bf16(acc[n], low.x, high.x, low.y, high.y, row.x, row.y);
      mma_bf16(acc[n], low.z, high.z, low.w, high.w, row.z, row.w);
    }
  }
}

__device__ __forceinline__ void store_v(const LoraWork& lora, const ShrinkTask& task, int ranks, float scale, int lane, const float (&acc)[2][4]) {
  float* v = lora.v + task.chunk * lora.v_stride;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = n * 8 + 2 * (lane % 4) + i % 2, rank = lane / 4 + 8 * (i / 2);
      if (r < task.rows()) v[task.place(r, lora.span_count) + rank] = rank < ranks ? acc[n][i] * scale : 0.0f;
    }
  }
}

// One of the three warps: every third task of the block.
template <class Ring>
__device__ __forceinline__ void shrink_tasks(const Shrink& shrink, const ShrinkSchedule& schedule, const Ring& ring, int warp, int lane) {
  const LoraWork& lora = shrink.lora;
  const int4* items = reinterpret_cast<const int4*>(lora.tiles + __ldg(lora.tiles + 7));
  const int stride = kShrinkWarps * schedule.stages;
  int j = warp * schedule.stages;
  if (j >= schedule.count) return;
  ShrinkTask next;
  next.read(shrink, schedule, items, j);
  wait_for_dependencies();  // v may still be read by a kernel ahead
  for (; j < schedule.count; j += stride) {
    const ShrinkTask task = next;
    const int ranks = shrink_ranks(lora, task.span, task.entry);
    const float scale =
        __ldg(lora.scales + static_cast<int64_t>(lora.spans[task.span].module) * lora.slots + task.entry.y) * __int_as_float(task.entry.w);
    if (j + stride < schedule.count) next.read(shrink, schedule, items, j + stride);
    float acc[2][4] = {};
#pragma unroll 1
    for (int part = j; part < j + schedule.stages; ++part) {
      const int stage = schedule.position(part) % ring.stages;
      barrier_wait(ring.a_full(part), part / kShrinkBarriers & 1);
      multiply_shrink(ring.w(stage), shrink_columns(shrink, shrink_column(schedule, part)) / kShrinkStep, task.rows(), lane, acc);
      __syncwarp();
      if (lane == 0) barrier_arrive(ring.empty(stage), kShrinkReleases);
    }
    store_v(lora, task, ranks, scale, lane, acc);
  }
}

}  // namespace openlora
