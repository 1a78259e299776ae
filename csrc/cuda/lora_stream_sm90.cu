// The LoRA shrink of short steps on Hopper: A streams through a ring in shared memory, asked for before the kernels ahead have ended.
//
// A task is one module of an item (16 ranks of a page, up to 16 rows of a tile; lora_work.h) and one range of k: all of it up to 4,096
// inputs, else the fewest equal ranges of at most 4,096 (down: 4 of 3,584), each with a plane of v that its readers add up. The ranges
// depend on K alone. Tasks are dealt to the blocks in turn.
//
// A block is 8 warps. A task's k is cut into stages of 512 inputs, 16 KB of A; warp w multiplies stage w on mma.m16n8k16 (ranks are the
// m side, rows the n side): lane (g, t) takes 8 neighbouring k of ranks g and g + 8 and of rows g and g + 8, a permutation of k that
// both sides share. The stages' sums, times scale and weight, are added up in their order through shared memory. A stage that was multiplied is
// filled again at once by its warp, rank by rank with bulk copies, so kStreamRing stages are on their way; x comes from L2 through registers.
//
// Shared memory: 17 KB a stage and 10 KB of sums: 214 KB, a block a processor, 192 KB on their way. Device memory: A of each item once.
// Bound by memory: qkv at D = 64, K = 4,096: 25 MB, 8.1 us at 3.1 TB/s, most of which may arrive while the kernel ahead runs; behind
// its end x (0.7 us), 16 steps (0.6 us), the sum and v (0.5 us). Two blocks of half the ring a processor take as long or longer.
//
// Blocks without tasks leave at once and the next kernel may start when all others have: a GEMM then fills its ring beside them. So a kernel
// that follows must read nothing before its wait but what no kernel of the step writes.
#include "lora_stream.h"

#include "device.cuh"
#include "gemm_tma.cuh"
#include "launch.cuh"

namespace openlora {
namespace {

constexpr int kStreamWarps = 8;
constexpr int kStreamColumns = 512;  // inputs of a stage: 16 ranks, one behind the other
// With 64 bytes between ranks 8 lanes that read 16 bytes each of two of them meet no bank twice.
constexpr int kStreamPitch = kStreamColumns * 2 + 64;
constexpr int kStageBytes = 16 * kStreamPitch;
constexpr int kStreamRing = 12;
constexpr int kStreamBarriers = 32;  // at least the ring and a task's stages: a barrier's last stage has then been left by all
constexpr int kStreamStep = 32;      // k of one load: 4 lanes of 8
constexpr int kStreamFull = kStreamColumns / kStreamStep;  // steps of a stage
constexpr int kStreamDepth = kStreamFull;                      // loads of x in flight
constexpr int kSumPitch = 20;        // of 16 ranks: the fragments' stores meet no bank twice

struct StreamParams {
  const void* x;
  int64_t x_stride;
  int inputs;
  int chunks;  // stages of a task
  bool waits_last;
  LoraWork work;  // v_planes: ranges of k
};

constexpr int kStreamSharedBytes = kStreamRing * kStageBytes + kStreamWarps * 16 * kSumPitch * 4 + kStreamBarriers * 8;

struct StreamTasks {
  const int4* items;
  const int* rows;
  int total;

  __device__ __forceinline__ explicit StreamTasks(const StreamParams& p) {
    const TileTable table = read_tile_table(p.work.tiles);
    items = table.items;
    rows = table.rows;
    total = table.item_count * p.work.span_count * p.work.v_planes;
  }
  __device__ __forceinline__ int count() const {  // of this block
    const int block = static_cast<int>(blockIdx.x);
    return block < total ? (total - 1 - block) / static_cast<int>(gridDim.x) + 1 : 0;
  }
};

// The block's tasks, 32 at a time: each lane knows one.
struct StreamTask {
  int place, rows;  // of the item
  int pair, entries, plane, span;
  int ranks;
  float scale;
  const __nv_bfloat16* a;  // of the first rank, at the task's first k
};

__device__ __forceinline__ StreamTask read_stream_task(const StreamParams& p, const StreamTasks& tasks, int j, int count) {
  StreamTask found{};
  if (j >= count) return found;
  const LoraWork& work = p.work;
  const int number = static_cast<int>(blockIdx.x) + j * static_cast<int>(gridDim.x), module = number / work.v_planes;
  const int4 tile = __ldg(tasks.items + 2 * (module / work.span_count)), raw = __ldg(tasks.items + 2 * (module / work.span_count) + 1);
  const Entry entry = as_entry(raw);
  found.plane = number % work.v_planes;
  found.span = module % work.span_count;
  const LoraSpan& span = work.spans[found.span];
  found.place = tile.x;
  found.rows = tile.y & 0xffff;
  found.entries = tile.y >> 16;
  found.pair = tile.z + tile.w;
  const int left = ranks_left(work, span.module, entry);
  found.ranks = left <= 0 ? 0 : left >= kPageRank ? kPageRank : left;
  found.scale = __ldg(work.scales + static_cast<int64_t>(span.module) * work.slots + entry.slot) * entry.weight;
  found.a = static_cast<const __nv_bfloat16*>(work.pages) + entry.page * work.page_elements + span.a_offset +
            static_cast<int64_t>(found.plane) * p.chunks * kStreamColumns;
  return found;
}

__device__ __forceinline__ int from_lane(int value, int lane) { return __shfl_sync(kAllLanes, value, lane); }

// Stages of A on their way: a warp's view, which knows where its block's tasks stand in the pages.
struct StreamSource {
  const __nv_bfloat16* a;
  int ranks, plane;
  int window;  // of 32 tasks

  __device__ __forceinline__ void read(const StreamParams& p, const StreamTasks& tasks, int first, int count) {
    const StreamTask task = read_stream_task(p, tasks, first * kWarp + static_cast<int>(threadIdx.x) % kWarp, count);
    a = task.a, ranks = task.ranks, plane = task.plane, window = first;
  }
};

// First of the inputs of a stage, and how many: none where k has ended.
__device__ __forceinline__ int stream_column(const StreamParams& p, int plane, int chunk) {
  return (plane * p.chunks + chunk) * kStreamColumns;
}
__device__ __forceinline__ int stream_columns(const StreamParams& p, int column) {
  return max(0, min(kStreamColumns, p.inputs - column));
}

// One warp: asks for stage `number` of the block.
__device__ __forceinline__ void load_stage(const StreamParams& p, const StreamTasks& tasks, StreamSource& source, int number, int count,
                                           uint32_t buffers, uint32_t barriers, uint64_t policy) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, j = number / p.chunks, chunk = number % p.chunks;
  if (j / kWarp != source.window) source.read(p, tasks, j / kWarp, count);
  const int from = j % kWarp, ranks = from_lane(source.ranks, from), plane = from_lane(source.plane, from);
  const auto* a = reinterpret_cast<const __nv_bfloat16*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(source.a), from));
  const int bytes = stream_columns(p, stream_column(p, plane, chunk)) * 2;
  const uint32_t barrier = barriers + number % kStreamBarriers * 8, stage = buffers + number % kStreamRing * kStageBytes;
  if (lane == 0) barrier_expect(barrier, ranks * bytes);
  __syncwarp();
  if (lane < ranks && bytes > 0) {
    bulk_load(stage + lane * kStreamPitch, a + static_cast<int64_t>(lane) * p.inputs + chunk * kStreamColumns, bytes, barrier, policy);
  }
}

// x of a stage for this lane's rows g (and g + 8): all of it where a tile has at most 8 rows, else half.
struct StreamRows {
  uint4 step[kStreamDepth];
  const char* row[2];  // this lane's first k; null where there is no row

  template <int kTiles>
  __device__ __forceinline__ void load(int slot, int step_index, int steps) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      step[slot * kTiles + n] = row[n] != nullptr && step_index < steps
                                    ? __ldcg(reinterpret_cast<const uint4*>(row[n] + step_index * kStreamStep * 2))
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

__global__ void __launch_bounds__(kStreamWarps* kWarp, 1) shrink_stream_kernel(const __grid_constant__ StreamParams p) {
  extern __shared__ __align__(128) char shared[];
  start_dependents();
  const StreamTasks tasks(p);
  const int count = tasks.count(), stages = count * p.chunks;
  if (count == 0 && blockIdx.x > 0) return;  // the first block waits for the kernels ahead, so that who waits for this one does
  const int warp = warp_index(), lane = static_cast<int>(threadIdx.x) % kWarp;
  float* sums = reinterpret_cast<float*>(shared + kStreamRing * kStageBytes);
  const uint32_t buffers = shared_address(shared), barriers = shared_address(sums + kStreamWarps * 16 * kSumPitch);
  if (threadIdx.x < kStreamBarriers) barrier_init(barriers + static_cast<int>(threadIdx.x) * 8, 1);
  if (warp == 0) barrier_init_fence();
  __syncthreads();
  const uint64_t policy = policy_evict_first();
  StreamSource source;
  source.read(p, tasks, 0, count);
  for (int number = warp; number < min(kStreamRing, stages); number += kStreamWarps) load_stage(p, tasks, source, number, count, buffers, barriers, policy);

  StreamTask known = read_stream_task(p, tasks, lane, count);
  StreamRows x;
  int steps = 0;
  auto locate = [&](int j) {  // this lane's rows of x in task j
    const int from = j % kWarp, place = from_lane(known.place, from), rows = from_lane(known.rows, from);
    const int column = stream_column(p, from_lane(known.plane, from), warp);
    steps = warp < p.chunks ? stream_columns(p, column) / kStreamStep : 0;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int r = n * 8 + lane / 4;
      x.row[n] = r < rows ? reinterpret_cast<const char*>(static_cast<const __nv_bfloat16*>(p.x) + __ldg(tasks.rows + place + r) * p.x_stride +
                                                          column + lane % 4 * 8)
                          : nullptr;
    }
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
    const int ranks = from_lane(known.ranks, from), plane = from_lane(known.plane, from), span = from_lane(known.span, from);
    const int pair = from_lane(known.pair, from), entries = from_lane(known.entries, from);
    const float scale = __shfl_sync(kAllLanes, known.scale, from);
    if (j + 1 < count) {  // its x arrives while this task is summed
      if ((j + 1) % kWarp == 0) known = read_stream_task(p, tasks, j + 1 + lane, count);
      locate(j + 1);
      x.open(from_lane(known.rows, (j + 1) % kWarp), steps);
    }
    __syncthreads();  // the sums of the task before have been read
    if (warp < p.chunks) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[(warp * 16 + n * 8 + 2 * (lane % 4) + i % 2) * kSumPitch + lane / 4 + 8 * (i / 2)] = acc[n][i] * scale;
      }
    }
    __syncthreads();
    const int r = static_cast<int>(threadIdx.x) / kPageRank, rank = static_cast<int>(threadIdx.x) % kPageRank;
    if (r < rows) {
      float sum = sums[r * kSumPitch + rank];
      for (int c = 1; c < p.chunks; ++c) sum += sums[(c * 16 + r) * kSumPitch + rank];
      const int64_t place = ((pair + static_cast<int64_t>(r) * entries) * p.work.span_count + span) * kPageRank + rank;
      p.work.v[plane * p.work.v_stride + place] = rank < ranks ? sum : 0.f;
    }
  }
  if (p.waits_last && blockIdx.x == 0) wait_for_previous();
}

// Ranges of k of at most kStreamWarps stages.
int stream_ranges(int64_t inputs) {
  const int64_t most = int64_t{kStreamWarps} * kStreamColumns;
  return static_cast<int>((inputs + most - 1) / most);
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
  const int ranges = args.work.v_planes, stages = (args.inputs + kStreamColumns - 1) / kStreamColumns;
  const StreamParams p{args.x, args.x_stride, args.inputs, (stages + ranges - 1) / ranges, args.follow == Follow::kWaitLast, args.work};
  const Shape shape{processor_count(), kStreamWarps * kWarp, kStreamSharedBytes};
  return launch(shrink_stream_kernel, shape, args.follow, stream, p);
}

}  // namespace openlora
