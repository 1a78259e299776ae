// The shrink of long steps on Hopper: items of up to kWideRows rows, all modules of a linear at once, so that x comes once.
//
// A task is an item (16 ranks of a page, neighbouring rows of one recipe; lora_work.h) and one range of k, as in lora_stream_sm90.cu,
// whose ring holds A: stages of 512 inputs of one module, the modules of a range side by side. Warp w has rows 8 w to 8 w + 7 of the
// item through all of k, x from device memory through registers, a stage's 16 steps ahead; one warp more sends for A. A stage's sums
// begin at zero and are added in the stages' order, each instruction takes the same k: a row's bits are those of the short steps.
//
// On their way: 64 KB of x and 192 KB of A a processor. Bound by memory: x once, A once an item, mostly from L2.
#pragma once

#include "device.cuh"
#include "gemm_tma.cuh"
#include "lora_ring.cuh"

namespace openlora {

constexpr int kWideWarps = kWideRows / 8;
constexpr int kWideBatch = 4;  // loads of x sent together: there are fewer scoreboards than loads

// What the block does of the wide items: tasks dealt in turn.
struct WideTasks {
  const int4* items;
  const int* rows;
  int total;

  __device__ __forceinline__ int count() const {
    const int block = static_cast<int>(blockIdx.x);
    return block < total ? (total - 1 - block) / static_cast<int>(gridDim.x) + 1 : 0;
  }
};

// What a long step has: wide and narrow items, one behind the other, as in LoraWork; where the host made none, all items are narrow.
struct LongTable {
  const int* numbers;
  const int4 *wide, *narrow;
  int wide_count, narrow_count;

  __device__ __forceinline__ LongTable(const int32_t* block, int processors) {
    const int items = __ldg(block + 1), at = __ldg(block + 11), two = __ldg(block + 12), one = __ldg(block + 13);
    numbers = block + __ldg(block + 5);
    wide = at > 0 ? reinterpret_cast<const int4*>(block + at) : dealt_items(block, processors);
    wide_count = at > 0 ? two : 0, narrow_count = at > 0 ? one : items;
    narrow = wide + 2 * wide_count;
  }
};

// A task as its lanes know it.
struct WideTask {
  int place, rows, pair, entries, plane;
  Entry entry;

  __device__ __forceinline__ WideTask(const StreamParams& p, const WideTasks& tasks, int j) {
    const int number = static_cast<int>(blockIdx.x) + j * static_cast<int>(gridDim.x), item = number / p.work.v_planes;
    const int4 raw = __ldg(tasks.items + 2 * item);
    entry = as_entry(__ldg(tasks.items + 2 * item + 1));
    place = raw.x, rows = raw.y & 0xffff, entries = raw.y >> 16, pair = raw.z + raw.w;
    plane = number % p.work.v_planes;
  }
};

__device__ __forceinline__ int wide_ranks(const LoraWork& work, int module, const Entry& entry) {
  const int left = ranks_left(work, module, entry);
  return left <= 0 ? 0 : left >= kPageRank ? kPageRank : left;
}

__device__ __forceinline__ uint64_t policy_evict_normal() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// One warp: A of all the block's tasks, a stage as soon as the warps have left the one that it takes the place of.
template <int G>
__device__ __forceinline__ void send_wide(const StreamParams& p, const WideTasks& tasks, int count, uint32_t buffers, uint32_t full,
                                          uint32_t empty) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const uint64_t policy = policy_evict_normal();  // neighbours of the same recipe read it too
  int slot = 0, turn = 0;
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    const WideTask task(p, tasks, j);
    const __nv_bfloat16* a[G];
    int ranks[G];
#pragma unroll
    for (int m = 0; m < G; ++m) {
      ranks[m] = wide_ranks(p.work, p.work.spans[m].module, task.entry);
      a[m] = static_cast<const __nv_bfloat16*>(p.work.pages) + task.entry.page * p.work.page_elements + p.work.spans[m].a_offset +
             static_cast<int64_t>(lane) * p.inputs;
    }
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      const int column = stream_column(p, task.plane, chunk), bytes = stream_columns(p, column) * 2;
#pragma unroll
      for (int m = 0; m < G; ++m) {
        if (turn > 0) barrier_wait(empty + slot * 8, (turn - 1) & 1);
        if (lane == 0) barrier_expect(full + slot * 8, ranks[m] * bytes);
        __syncwarp();
        if (lane < ranks[m] && bytes > 0) bulk_load(buffers + slot * kStageBytes + lane * kStreamPitch, a[m] + column, bytes, full + slot * 8, policy);
        if (++slot == kStreamRing) slot = 0, ++turn;
      }
    }
  }
}

// 16 bytes at p where there are any; in the order in which it is written. The rest of its 256 bytes follows to the L2 cache: a twentieth faster.
__device__ __forceinline__ void load_row(uint4& x, const char* p, bool is_there) {
  asm volatile(
      "{\n\t.reg .pred there;\n\tsetp.ne.b32 there, %5, 0;\n\t"
      "@there ld.global.cg.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
      : "l"(p), "r"(static_cast<int>(is_there)));
}

// x of a stage for this lane's row: step[u] is used and filled again with the same step of the stage behind it.
struct WideRow {
  uint4 step[kStreamFull];
  const char* row;  // this lane's first k of the next stage to be sent for; null where there is no row
  int steps;        // of it

  __device__ __forceinline__ void locate(const StreamParams& p, int number, int plane) {
    const int first = stream_column(p, plane, 0);
    row = number < 0 ? nullptr
                     : reinterpret_cast<const char*>(static_cast<const __nv_bfloat16*>(p.x) + number * p.x_stride + first +
                                                     static_cast<int>(threadIdx.x) % 4 * 8);
    steps = stream_columns(p, first) / kStreamStep;
  }
  __device__ __forceinline__ void advance(const StreamParams& p, int plane, int chunk) {
    if (row != nullptr) row += kStreamColumns * 2;
    steps = stream_columns(p, stream_column(p, plane, chunk)) / kStreamStep;
  }
  __device__ __forceinline__ void load(int u) { load_row(step[u], row + u * kStreamStep * 2, row != nullptr && u < steps); }
};

// acc = A x^T of a stage of every module, whose A stands side by side at `stage` (full: its barrier); sends for the stage that x.row
// points to.
template <int G, bool kFull>
__device__ __forceinline__ void multiply_wide(WideRow& x, const char* stage, int steps, float (&acc)[G][4], uint32_t full, uint32_t parity) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const char* from = stage + lane / 4 * kStreamPitch + lane % 4 * 16;
#pragma unroll
  for (int first = 0; first < kStreamFull; first += kWideBatch) {
#pragma unroll
    for (int u = first; u < first + kWideBatch; ++u) {
      if (!kFull && u >= steps) break;
#pragma unroll
      for (int m = 0; m < G; ++m) {
        const char* at = from + m * kStageBytes + u * kStreamStep * 2;
        const uint4 low = *reinterpret_cast<const uint4*>(at), high = *reinterpret_cast<const uint4*>(at + 8 * kStreamPitch);
        mma_bf16(acc[m], low.x, high.x, low.y, high.y, x.step[u].x, x.step[u].y);
        mma_bf16(acc[m], low.z, high.z, low.w, high.w, x.step[u].z, x.step[u].w);
      }
    }
#pragma unroll
    for (int u = first; u < first + kWideBatch; ++u) x.load(u);
    if (first + kWideBatch < kStreamFull) barrier_wait(full, parity);  // long passed: keeps the loads from being moved behind the last product
  }
}

// This lane's row number of x in a task, -1 where it has none.
__device__ __forceinline__ int wide_row(const WideTasks& tasks, const WideTask& task) {
  const int r = warp_index() * 8 + static_cast<int>(threadIdx.x) % kWarp / 4;
  return r < task.rows ? __ldg(tasks.rows + task.place + r) : -1;
}

// v of this warp's rows. sums[m][i]: rank lane / 4 + 8 (i / 2), row 2 (lane % 4) + i % 2.
template <int G>
__device__ __forceinline__ void store_wide(const StreamParams& p, const WideTask& task, const float (&sums)[G][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int m = 0; m < G; ++m) {
    const int ranks = wide_ranks(p.work, p.work.spans[m].module, task.entry);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = warp_index() * 8 + 2 * (lane % 4) + i % 2, rank = lane / 4 + 8 * (i / 2);
      if (r >= task.rows) continue;
      const int64_t place = ((task.pair + static_cast<int64_t>(r) * task.entries) * G + m) * kPageRank + rank;
      p.work.v[task.plane * p.work.v_stride + place] = rank < ranks ? sums[m][i] : 0.f;
    }
  }
}

// The warps that multiply: all the block's tasks.
template <int G>
__device__ __forceinline__ void multiply_wide_tasks(const StreamParams& p, const WideTasks& tasks, int count, const char* ring, uint32_t full, uint32_t empty) {
  WideTask task(p, tasks, 0);
  WideRow x{};
  x.locate(p, wide_row(tasks, task), task.plane);
  if (!p.waits_last) wait_for_previous();
#pragma unroll
  for (int u = 0; u < kStreamFull; ++u) x.load(u);
  int slot = 0, turn = 0;
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    const WideTask next(p, tasks, j + 1 < count ? j + 1 : j);
    const int next_row = wide_row(tasks, next);
    float scales[G], sums[G][4] = {};
#pragma unroll
    for (int m = 0; m < G; ++m)
      scales[m] = __ldg(p.work.scales + static_cast<int64_t>(p.work.spans[m].module) * p.work.slots + task.entry.slot) * task.entry.weight;
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      const int steps = x.steps;
      if (chunk + 1 < p.chunks) x.advance(p, task.plane, chunk + 1);
      else if (j + 1 < count) x.locate(p, next_row, next.plane);
      else x.steps = 0;
#pragma unroll
      for (int m = 0; m < G; ++m) barrier_wait(full + (slot + m) * 8, turn & 1);
      float acc[G][4] = {};
      const char* stage = ring + slot * kStageBytes;
      const int wanted = warp_index() * 8 < task.rows ? steps : 0;
      if (wanted == kStreamFull) multiply_wide<G, true>(x, stage, wanted, acc, full + slot * 8, turn & 1);
      else multiply_wide<G, false>(x, stage, wanted, acc, full + slot * 8, turn & 1);
#pragma unroll
      for (int m = 0; m < G; ++m) {
        barrier_arrive(empty + (slot + m) * 8);  // every lane, for racecheck: see csrc/README.md
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float part = __fmul_rn(acc[m][i], scales[m]);
          sums[m][i] = chunk == 0 ? part : __fadd_rn(sums[m][i], part);
        }
      }
      slot += G;
      if (slot == kStreamRing) slot = 0, ++turn;
    }
    store_wide<G>(p, task, sums);
    task = next;
  }
}

}  // namespace openlora
