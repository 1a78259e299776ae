// The shrink of items of at most 16 rows on Hopper, one module at a time: decode, and what long steps leave.
//
// A task is one module of an item (16 ranks of a page, up to 16 rows of a tile; lora_work.h) and one range of k: all of it up to 4,096
// inputs, else the fewest equal ranges of at most 4,096 (down: 4 of 3,584), each with a plane of v that its readers add up. The ranges
// depend on K alone.
//
// 8 warps. A task's k is cut into stages of 512 inputs, 16 KB of A; warp w multiplies stage w on mma.m16n8k16 (ranks are the
// m side, rows the n side): lane (g, t) takes 8 neighbouring k of ranks g and g + 8 and of rows g and g + 8, a permutation of k that
// both sides share. The stages' sums, times scale and weight, are added up in their order through shared memory. A stage that was multiplied is
// filled again at once by its warp, rank by rank with bulk copies, so kStreamRing stages are on their way; x comes from L2 through registers.
#pragma once

#include "device.cuh"
#include "gemm_tma.cuh"
#include "lora_ring.cuh"

namespace openlora {

// An item's record, sent for before it is known whether there is one.
struct RawTask {
  int4 tile, entry;

  template <class Tasks>
  __device__ __forceinline__ RawTask(const StreamParams& p, const Tasks& tasks, int j) : tile(), entry() {
    const int item = tasks.number(j) / (p.work.v_planes * p.work.span_count);
    const int4* from = tasks.record(p, item);
    if (from == nullptr) return;
    tile = __ldg(from), entry = __ldg(from + 1);
  }
};

// The block's tasks, 32 at a time: each lane knows one.
struct StreamTask {
  int place, rows;  // of the item
  int pair, entries, plane, span;
  int ranks;
  float scale, weight;
  const __nv_bfloat16* a;  // of the first rank, at the task's first k
};

template <class Tasks>
__device__ __forceinline__ StreamTask as_stream_task(const StreamParams& p, const Tasks& tasks, const RawTask& raw, int j, int count) {
  StreamTask found{};
  if (j >= count) return found;
  const LoraWork& work = p.work;
  const int number = tasks.number(j);
  const Entry entry = as_entry(raw.entry);
  found.plane = number % work.v_planes;
  found.span = number / work.v_planes % work.span_count;
  const LoraSpan& span = work.spans[found.span];
  found.place = raw.tile.x;
  found.rows = raw.tile.y & 0xffff;
  found.entries = raw.tile.y >> 16;
  found.pair = raw.tile.z + raw.tile.w;
  const int left = ranks_left(work, span.module, entry);
  found.ranks = left <= 0 ? 0 : left >= kPageRank ? kPageRank : left;
  found.scale = __ldg(work.scales + static_cast<int64_t>(span.module) * work.slots + entry.slot);  // not used before the first sum
  found.weight = entry.weight;
  found.a = static_cast<const __nv_bfloat16*>(work.pages) + entry.page * work.page_elements + span.a_offset +
            static_cast<int64_t>(found.plane) * p.chunks * kStreamColumns;
  return found;
}

template <class Tasks>
__device__ __forceinline__ StreamTask read_stream_task(const StreamParams& p, const Tasks& tasks, int j, int count) {
  return as_stream_task(p, tasks, RawTask(p, tasks, j), j, count);
}

__device__ __forceinline__ int from_lane(int value, int lane) { return __shfl_sync(kAllLanes, value, lane); }
__device__ __forceinline__ const __nv_bfloat16* from_lane(const __nv_bfloat16* value, int lane) {
  return reinterpret_cast<const __nv_bfloat16*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(value), lane));
}

// This lane's n-th row of x in a tile, -1 where it has fewer.
__device__ __forceinline__ int read_row(const int* numbers, int place, int rows, int n) {
  const int r = n * 8 + static_cast<int>(threadIdx.x) % kWarp / 4;
  return r < rows ? __ldg(numbers + place + r) : -1;
}

// In the order in which it is written: moved up, they would take more registers than there are.
__device__ __forceinline__ uint4 load_level2(const char* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// x of a stage for this lane's rows g (and g + 8): all of it where a tile has at most 8 rows, else half.
struct StreamRows {
  uint4 step[kStreamDepth];
  const char* row[2];  // this lane's first k; null where there is no row

  // number: of a row of x, -1 for none; column: the stage's first.
  __device__ __forceinline__ void locate(const StreamParams& p, int number, int n, int column) {
    const int first = column + static_cast<int>(threadIdx.x) % 4 * 8;
    row[n] = number >= 0 ? reinterpret_cast<const char*>(static_cast<const __nv_bfloat16*>(p.x) + number * p.x_stride + first) : nullptr;
  }
  template <int kTiles>
  __device__ __forceinline__ void load(int slot, int step_index, int steps) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      step[slot * kTiles + n] = row[n] != nullptr && step_index < steps
                                    ? load_level2(row[n] + step_index * kStreamStep * 2)
                                    : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void open(int rows, int steps) {
    if (rows <= 8) {
#pragma unroll
      for (int u = 0; u < kStreamDepth; ++u) load<1>(u, u, steps);
    } else {
#pragma unroll
      for (int u = 0; u < kStreamDepth / 2; ++u) load<2>(u, u, steps);
    }
  }
};

// What a task's sums need of it, the same in all lanes.
struct StreamPlace {
  int rows, ranks, plane, span, pair, entries;
  float scale;

  // Of the task that lane `from` knows.
  __device__ __forceinline__ StreamPlace(const StreamTask& known, int from)
      : rows(from_lane(known.rows, from)),
        ranks(from_lane(known.ranks, from)),
        plane(from_lane(known.plane, from)),
        span(from_lane(known.span, from)),
        pair(from_lane(known.pair, from)),
        entries(from_lane(known.entries, from)),
        scale(__shfl_sync(kAllLanes, known.scale, from) * __shfl_sync(kAllLanes, known.weight, from)) {}
};

// Puts a stage's sums down for the block.
__device__ __forceinline__ void put_sums(float* sums, int chunk, const float (&acc)[2][4], float scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[(chunk * 16 + n * 8 + 2 * (lane % 4) + i % 2) * kSumPitch + lane / 4 + 8 * (i / 2)] = acc[n][i] * scale;
  }
}

// One of 256 values of a task: its stages' sums in order, to v.
__device__ __forceinline__ void store_sum(const StreamParams& p, const StreamPlace& at, const float* sums, int number) {
  const int r = number / kPageRank, rank = number % kPageRank;
  if (r >= at.rows) return;
  float sum = sums[r * kSumPitch + rank];
  for (int c = 1; c < p.chunks; ++c) sum += sums[(c * 16 + r) * kSumPitch + rank];
  const int64_t place = ((at.pair + static_cast<int64_t>(r) * at.entries) * p.work.span_count + at.span) * kPageRank + rank;
  p.work.v[at.plane * p.work.v_stride + place] = rank < at.ranks ? sum : 0.f;
}

// Stages of A on their way: a warp's view, which knows where its block's tasks stand in the pages.
struct StreamSource {
  const __nv_bfloat16* a;
  int ranks, plane;
  int window;  // of 32 tasks

  __device__ __forceinline__ StreamSource(const StreamTask& task) : a(task.a), ranks(task.ranks), plane(task.plane), window(0) {}
  template <class Tasks>
  __device__ __forceinline__ void read(const StreamParams& p, const Tasks& tasks, int first, int count) {
    *this = StreamSource(read_stream_task(p, tasks, first * kWarp + static_cast<int>(threadIdx.x) % kWarp, count));
    window = first;
  }
};

// One warp: asks for stage `number` of the block.
template <class Tasks>
__device__ __forceinline__ void load_stage(const StreamParams& p, const Tasks& tasks, StreamSource& source, int number, int count,
                                           uint32_t buffers, uint32_t barriers, uint64_t policy) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, j = number / p.chunks, chunk = number % p.chunks;
  if (j / kWarp != source.window) source.read(p, tasks, j / kWarp, count);
  const int from = j % kWarp, ranks = from_lane(source.ranks, from), plane = from_lane(source.plane, from);
  const __nv_bfloat16* a = from_lane(source.a, from);
  const int bytes = stream_columns(p, stream_column(p, plane, chunk)) * 2;
  const uint32_t barrier = barriers + number % kStreamBarriers * 8, stage = buffers + number % kStreamRing * kStageBytes;
  if (lane == 0) barrier_expect(barrier, ranks * bytes);
  __syncwarp();
  if (lane < ranks && bytes > 0) {
    bulk_load(stage + lane * kStreamPitch, a + static_cast<int64_t>(lane) * p.inputs + chunk * kStreamColumns, bytes, barrier, policy);
  }
}

// acc += A x^T of a stage. Ranks that are not there hold what the stage held before: their sums are not used. kFull: it has
// kStreamFull steps, which the compiler can then order as it likes.
template <int kTiles, bool kFull>
__device__ __forceinline__ void multiply_stage(StreamRows& x, const char* stage, int steps, float (&acc)[2][4]) {
  constexpr int kDepth = kStreamDepth / kTiles;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const char* from = stage + lane / 4 * kStreamPitch + lane % 4 * 16;
  if constexpr (kFull) steps = kStreamFull;
#pragma unroll
  for (int first = 0; first < kStreamFull; first += kDepth) {
#pragma unroll
    for (int u = 0; u < kDepth; ++u) {
      if (!kFull && first + u >= steps) return;
      const char* at = from + (first + u) * kStreamStep * 2;
      const uint4 low = *reinterpret_cast<const uint4*>(at), high = *reinterpret_cast<const uint4*>(at + 8 * kStreamPitch);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint4& row = x.step[u * kTiles + n];
        mma_bf16(acc[n], low.x, high.x, low.y, high.y, row.x, row.y);
        mma_bf16(acc[n], low.z, high.z, low.w, high.w, row.z, row.w);
      }
      if (first + kDepth < kStreamFull) x.load<kTiles>(u, first + u + kDepth, steps);
    }
  }
}

__device__ __forceinline__ void multiply_stage(StreamRows& x, const char* stage, int rows, int steps, float (&acc)[2][4]) {
  if (rows <= 8) {
    if (steps == kStreamFull) multiply_stage<1, true>(x, stage, steps, acc);
    else multiply_stage<1, false>(x, stage, steps, acc);
  } else {
    if (steps == kStreamFull) multiply_stage<2, true>(x, stage, steps, acc);
    else multiply_stage<2, false>(x, stage, steps, acc);
  }
}

// The block's tasks of at most 16 rows, whose first stages have been asked for. sync: of the warps that come here.
template <class Tasks, class Sync>
__device__ __forceinline__ void multiply_stream(const StreamParams& p, const Tasks& tasks, StreamTask known, int count, const int* numbers,
                                                char* shared, uint32_t barriers, uint64_t policy, Sync sync) {
  const int warp = warp_index(), lane = static_cast<int>(threadIdx.x) % kWarp, stages = count * p.chunks;
  float* sums = reinterpret_cast<float*>(shared + kStreamRing * kStageBytes);
  const uint32_t buffers = shared_address(shared);
  StreamSource source(known);
  StreamRows x;
  int steps = 0;
  auto locate = [&](int j) {  // this lane's rows of x in task j
    const int from = j % kWarp, place = from_lane(known.place, from), rows = from_lane(known.rows, from);
    const int column = stream_column(p, from_lane(known.plane, from), warp);
    steps = warp < p.chunks ? stream_columns(p, column) / kStreamStep : 0;
    x.locate(p, read_row(numbers, place, rows, 0), 0, column), x.locate(p, read_row(numbers, place, rows, 1), 1, column);
  };
  if (count > 0) locate(0);
  if (!p.waits_last) wait_for_previous();
  if (count > 0) x.open(from_lane(known.rows, 0), steps);
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    const int from = j % kWarp, rows = from_lane(known.rows, from), number = j * p.chunks + warp;
    float acc[2][4] = {};
    if (warp < p.chunks) {
      barrier_wait(barriers + number % kStreamBarriers * 8, number / kStreamBarriers & 1);
      multiply_stage(x, shared + number % kStreamRing * kStageBytes, rows, steps, acc);
      __syncwarp();
      if (number + kStreamRing < stages) load_stage(p, tasks, source, number + kStreamRing, count, buffers, barriers, policy);
    }
    const StreamPlace at(known, from);
    if (j + 1 < count) {  // its x arrives while this task is summed
      if ((j + 1) % kWarp == 0) known = read_stream_task(p, tasks, j + 1 + lane, count);
      locate(j + 1);
      x.open(from_lane(known.rows, (j + 1) % kWarp), steps);
    }
    sync();  // the sums of the task before have been read
    if (warp < p.chunks) put_sums(sums, warp, acc, at.scale);
    sync();
    store_sum(p, at, sums, static_cast<int>(threadIdx.x));
  }
  if (p.waits_last && blockIdx.x == 0) wait_for_previous();
}

}  // namespace openlora
