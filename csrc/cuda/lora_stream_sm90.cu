// The LoRA shrink on Hopper: A streams through a ring in shared memory, asked for before the kernels ahead have ended.
//
// Short steps: tasks of at most 16 rows (lora_narrow.cuh), dealt to the blocks in turn. Long steps: wide tasks (lora_wide.cuh), then
// narrow ones. Both give a row the same bits, and which of them it is follows the rows of x.
//
// Shared memory: 17 KB a stage and 10 KB of sums: 214 KB, a block a processor, 192 KB on their way. Device memory: A of each item once.
// Bound by memory: qkv at D = 64, K = 4,096: 25 MB, 8.1 us at 3.1 TB/s, most of which may arrive while the kernel ahead runs; behind
// its end x (0.7 us), 16 steps (0.6 us), the sum and v (0.5 us). Two blocks of half the ring a processor take as long or longer.
//
// Items of short steps are read at their fixed places, before it is known how many there are, and beside the header: where entries say
// their ranks A is sent for after one read. Scales arrive while it does.
//
// Blocks without tasks leave at once and the next kernel may start when all others have: a GEMM then fills its ring beside them. So a kernel
// that follows must read nothing before its wait but what no kernel of the step writes.
#include "lora_stream.h"

#include "launch.cuh"
#include "lora_narrow.cuh"
#include "lora_wide.cuh"

namespace openlora {
namespace {

constexpr int kLongThreads = (kWideWarps + 1) * kWarp;
constexpr int kLongSharedBytes = kStreamSharedBytes + 2 * kStreamRing * 8;
constexpr int kWideWorth = 6;  // narrow tasks that take as long as a wide one

static_assert(kWideWarps >= kStreamWarps, "of the warps that have had wide tasks kStreamWarps take narrow ones");

// Of the warps that multiply.
__device__ __forceinline__ void sync_stream_warps() { asm volatile("bar.sync 1, %0;" ::"n"(kStreamWarps * kWarp) : "memory"); }

// The tasks of a short step, dealt to the blocks in turn; items at their fixed places.
struct ShortTasks {
  __device__ __forceinline__ const int4* record(const StreamParams& p, int item) const {
    return item < p.readable ? dealt_items(p.work.tiles, p.processors) + 2 * item : nullptr;
  }
  __device__ __forceinline__ int number(int j) const { return static_cast<int>(blockIdx.x) + j * static_cast<int>(gridDim.x); }
  __device__ __forceinline__ int count(int total) const {  // of this block
    const int block = static_cast<int>(blockIdx.x);
    return block < total ? (total - 1 - block) / static_cast<int>(gridDim.x) + 1 : 0;
  }
};

// The narrow tasks of a long step: kWideWorth each for the blocks that the last round of wide tasks leaves out, then all in turn.
struct LongTasks {
  const int4* items;
  int readable;
  int extra;         // tasks of this block ahead of what all have
  int early, idle;   // the first of them, and from one to the next
  int late;          // the first of the rest

  __device__ __forceinline__ const int4* record(const StreamParams&, int item) const { return item < readable ? items + 2 * item : nullptr; }
  __device__ __forceinline__ LongTasks(const int4* first, int count, int wide) : items(first), readable(count) {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x), busy = wide % blocks;
    idle = busy > 0 ? blocks - busy : 0;
    extra = idle > 0 && block >= busy ? kWideWorth : 0;
    early = block - busy;
    late = kWideWorth * idle + block;
  }
  __device__ __forceinline__ int number(int j) const {
    return j < extra ? early + j * idle : late + (j - extra) * static_cast<int>(gridDim.x);
  }
  __device__ __forceinline__ int count(int total) const {
    if (extra > 0 && number(extra - 1) >= total) return early < total ? (total - 1 - early) / idle + 1 : 0;
    return extra + (late < total ? (total - 1 - late) / static_cast<int>(gridDim.x) + 1 : 0);
  }
};

__global__ void __launch_bounds__(kStreamWarps* kWarp, 1) shrink_stream_kernel(const __grid_constant__ StreamParams p) {
  extern __shared__ __align__(128) char shared[];
  start_dependents();
  const int warp = warp_index(), lane = static_cast<int>(threadIdx.x) % kWarp;
  const ShortTasks tasks;
  const RawTask raw(p, tasks, lane);
  const int items = __ldg(p.work.tiles + 1);
  const int* numbers = p.work.tiles + __ldg(p.work.tiles + 5);
  const int count = tasks.count(items * p.work.span_count * p.work.v_planes), stages = count * p.chunks;
  if (count == 0 && blockIdx.x > 0) return;  // the first block waits for the kernels ahead, so that who waits for this one does
  const uint32_t buffers = shared_address(shared), barriers = buffers + kStreamRing * kStageBytes + kSumBytes;
  if (threadIdx.x < kStreamBarriers) barrier_init(barriers + static_cast<int>(threadIdx.x) * 8, 1);
  if (warp == 0) barrier_init_fence();
  __syncthreads();
  const uint64_t policy = policy_evict_first();
  const StreamTask known = as_stream_task(p, tasks, raw, lane, count);
  StreamSource source(known);
  for (int number = warp; number < min(kStreamRing, stages); number += kStreamWarps)
    load_stage(p, tasks, source, number, count, buffers, barriers, policy);
  multiply_stream(p, tasks, known, count, numbers, shared, barriers, policy, [] { __syncthreads(); });
}

// Of a long step: wide tasks (lora_wide.cuh), then narrow ones as in a short step. The last warp sends for A, of the first narrow tasks
// where the wide ones leave the ring.
template <int G>
__global__ void __launch_bounds__(kLongThreads, 1) shrink_long_kernel(const __grid_constant__ StreamParams p) {
  extern __shared__ __align__(128) char shared[];
  start_dependents();
  const int warp = warp_index(), lane = static_cast<int>(threadIdx.x) % kWarp;
  const LongTable table(p.work.tiles, p.processors);
  const WideTasks wide{table.wide, table.numbers, table.wide_count * p.work.v_planes};
  const LongTasks tasks(table.narrow, table.narrow_count, wide.total);
  const int wide_count = wide.count(), count = tasks.count(table.narrow_count * G * p.work.v_planes), stages = count * p.chunks;
  if (wide_count + count == 0 && blockIdx.x > 0) return;
  const uint32_t buffers = shared_address(shared), barriers = buffers + kStreamRing * kStageBytes + kSumBytes;
  const uint32_t full = barriers + kStreamBarriers * 8, empty = full + kStreamRing * 8;
  if (threadIdx.x < kStreamBarriers + kStreamRing) barrier_init(barriers + static_cast<int>(threadIdx.x) * 8, 1);
  else if (threadIdx.x < kStreamBarriers + 2 * kStreamRing) barrier_init(barriers + static_cast<int>(threadIdx.x) * 8, kWideWarps * kWarp);
  if (warp < 2) barrier_init_fence();
  __syncthreads();
  const uint64_t policy = policy_evict_first();
  if (warp == kWideWarps) {
    const RawTask raw(p, tasks, lane);
    send_wide<G>(p, wide, wide_count, buffers, full, empty);
    StreamSource source(as_stream_task(p, tasks, raw, lane, count));
    for (int number = 0; number < min(kStreamRing, stages); ++number) {
      const int uses = (wide_count * p.chunks * G + kStreamRing - 1 - number) / kStreamRing;  // of this place by wide tasks
      if (uses > 0) barrier_wait(empty + number * 8, (uses - 1) & 1);
      load_stage(p, tasks, source, number, count, buffers, barriers, policy);
    }
    return;
  }
  if (wide_count > 0) multiply_wide_tasks<G>(p, wide, wide_count, shared, full, empty);
  if (warp >= kStreamWarps) return;
  const StreamTask known = read_stream_task(p, tasks, lane, count);
  multiply_stream(p, tasks, known, count, table.numbers, shared, barriers, policy, [] { sync_stream_warps(); });
}

// Ranges of k of at most kStreamWarps stages.
int stream_ranges(int64_t inputs) {
  const int64_t most = int64_t{kStreamWarps} * kStreamColumns;
  return static_cast<int>((inputs + most - 1) / most);
}

StreamParams stream_params(const LoraShrinkArgs& args) {
  const int ranges = args.work.v_planes, stages = (args.inputs + kStreamColumns - 1) / kStreamColumns, processors = processor_count();
  const int items = kTileHeader + processors * (kStreamDealInts + kNormDealInts), chunks = (stages + ranges - 1) / ranges;
  const int readable = std::max(0, (args.tile_ints - items) / 8);
  return {args.x, args.x_stride, args.inputs, chunks, args.follow == Follow::kWaitLast, processors, readable, args.work};
}

}  // namespace

int lora_stream_planes(int64_t inputs) {
  const int64_t most = int64_t{kMaxRankPlanes} * kStreamWarps * kStreamColumns;
  return inputs >= kStreamStep && inputs % kStreamStep == 0 && inputs <= most ? stream_ranges(inputs) : 0;
}

bool can_stream_lora(const LoraShrinkArgs& args) {
  const int planes = lora_stream_planes(args.inputs);
  return planes > 0 && args.work.v_planes == planes && args.work.tile_rows <= 16;
}

cudaError_t launch_lora_stream(const LoraShrinkArgs& args, cudaStream_t stream) {
  const StreamParams params = stream_params(args);
  if (args.rows <= kShortStepRows) {
    const Shape shape{processor_count(), kStreamWarps * kWarp, kStreamSharedBytes};
    return launch(shrink_stream_kernel, shape, args.follow, stream, params);
  }
  const Shape shape{processor_count(), kLongThreads, kLongSharedBytes};
  switch (args.work.span_count) {
    case 1: return launch(shrink_long_kernel<1>, shape, args.follow, stream, params);
    case 2: return launch(shrink_long_kernel<2>, shape, args.follow, stream, params);
    default: return launch(shrink_long_kernel<3>, shape, args.follow, stream, params);
  }
}

}  // namespace openlora
