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
// Items are read at their fixed places, before it is known how many there are, and beside the header: where entries say their ranks A is
// sent for after one read. Scales arrive while it does.
//
// Blocks without tasks leave at once and the next kernel may start when all others have: a GEMM then fills its ring beside them. So a kernel
// that follows must read nothing before its wait but what no kernel of the step writes.
#include "lora_stream.h"

#include "device.cuh"
#include "gemm_tma.cuh"
#include "launch.cuh"

namespace openlora {
namespace {

constexpr int kStreamWarps = 8;      // and stages of a task at most
constexpr int kStreamColumns = 512;  // inputs of a stage: 16 ranks, one behind the other
// With 64 bytes between ranks 8 lanes that read 16 bytes each of two of them meet no bank twice.
constexpr int kStreamPitch = kStreamColumns * 2 + 64;
constexpr int kStageBytes = 16 * kStreamPitch;
constexpr int kStreamRing = 12;
constexpr int kStreamBarriers = 32;  // at least the ring and a task's stages: a barrier's last stage has then been left by all
constexpr int kStreamStep = 32;      // k of one load: 4 lanes of 8
constexpr int kStreamFull = kStreamColumns / kStreamStep;  // steps of a stage
constexpr int kStreamDepth = kStreamFull;                  // loads of x in flight
constexpr int kSumPitch = 20;        // of 16 ranks: the fragments' stores meet no bank twice
constexpr int kSumBytes = kStreamWarps * 16 * kSumPitch * 4;
constexpr int kStreamSharedBytes = kStreamRing * kStageBytes + kSumBytes + kStreamBarriers * 8;

struct StreamParams {
  const void* x;
  int64_t x_stride;
  int inputs;
  int chunks;  // stages of a task
  bool waits_last;
  int processors;
  int readable;  // items that the block of tiles has room for: what may be read before it is known whether they are there
  LoraWork work;  // v_planes: ranges of k
};

struct StreamTasks {
  const int* rows;
  int total;

  __device__ __forceinline__ explicit StreamTasks(const StreamParams& p) {
    const int items = __ldg(p.work.tiles + 1);
    rows = p.work.tiles + __ldg(p.work.tiles + 5);
    total = items * p.work.span_count * p.work.v_planes;
  }
  __device__ __forceinline__ int count() const {  // of this block
    const int block = static_cast<int>(blockIdx.x);
    return block < total ? (total - 1 - block) / static_cast<int>(gridDim.x) + 1 : 0;
  }
};

__device__ __forceinline__ int stream_number(int j) { return static_cast<int>(blockIdx.x) + j * static_cast<int>(gridDim.x); }

// An item's record, sent for before it is known whether there is one.
struct RawTask {
  int4 tile, entry;

  __device__ __forceinline__ RawTask(const StreamParams& p, int j) : tile(), entry() {
    const int item = stream_number(j) / (p.work.v_planes * p.work.span_count);
    if (item >= p.readable) return;
    const int4* from = dealt_items(p.work.tiles, p.processors) + 2 * item;
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

__device__ __forceinline__ StreamTask as_stream_task(const StreamParams& p, const RawTask& raw, int j, int count) {
  StreamTask found{};
  if (j >= count) return found;
  const LoraWork& work = p.work;
  const int number = stream_number(j);
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

__device__ __forceinline__ StreamTask read_stream_task(const StreamParams& p, int j, int count) {
  return as_stream_task(p, RawTask(p, j), j, count);
}

__device__ __forceinline__ int from_lane(int value, int lane) { return __shfl_sync(kAllLanes, value, lane); }
__device__ __forceinline__ const __nv_bfloat16* from_lane(const __nv_bfloat16* value, int lane) {
  return reinterpret_cast<const __nv_bfloat16*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(value), lane));
}

// First of the inputs of a stage, and how many: none where k has ended.
__device__ __forceinline__ int stream_column(const StreamParams& p, int plane, int chunk) {
  return (plane * p.chunks + chunk) * kStreamColumns;
}
__device__ __forceinline__ int stream_columns(const StreamParams& p, int column) {
  return max(0, min(kStreamColumns, p.inputs - column));
}

// This lane's n-th row of x in a tile, -1 where it has fewer.
__device__ __forceinline__ int read_row(const StreamTasks& tasks, int place, int rows, int n) {
  const int r = n * 8 + static_cast<int>(threadIdx.x) % kWarp / 4;
  return r < rows ? __ldg(tasks.rows + place + r) : -1;
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
  __device__ __forceinline__ void read(const StreamParams& p, int first, int count) {
    *this = StreamSource(read_stream_task(p, first * kWarp + static_cast<int>(threadIdx.x) % kWarp, count));
    window = first;
  }
};

// One warp: asks for stage `number` of the block.
__device__ __forceinline__ void load_stage(const StreamParams& p, StreamSource& source, int number, int count,
                                           uint32_t buffers, uint32_t barriers, uint64_t policy) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, j = number / p.chunks, chunk = number % p.chunks;
  if (j / kWarp != source.window) source.read(p, j / kWarp, count);
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

__global__ void __launch_bounds__(kStreamWarps* kWarp, 1) shrink_stream_kernel(const __grid_constant__ StreamParams p) {
  extern __shared__ __align__(128) char shared[];
  start_dependents();
  const int warp = warp_index(), lane = static_cast<int>(threadIdx.x) % kWarp;
  const RawTask raw(p, lane);
  const StreamTasks tasks(p);
  const int count = tasks.count(), stages = count * p.chunks;
  if (count == 0 && blockIdx.x > 0) return;  // the first block waits for the kernels ahead, so that who waits for this one does
  float* sums = reinterpret_cast<float*>(shared + kStreamRing * kStageBytes);
  const uint32_t buffers = shared_address(shared), barriers = shared_address(sums) + kSumBytes;
  if (threadIdx.x < kStreamBarriers) barrier_init(barriers + static_cast<int>(threadIdx.x) * 8, 1);
  if (warp == 0) barrier_init_fence();
  __syncthreads();
  const uint64_t policy = policy_evict_first();
  StreamTask known = as_stream_task(p, raw, lane, count);
  StreamSource source(known);
  for (int number = warp; number < min(kStreamRing, stages); number += kStreamWarps) load_stage(p, source, number, count, buffers, barriers, policy);

  StreamRows x;
  int steps = 0;
  auto locate = [&](int j) {  // this lane's rows of x in task j
    const int from = j % kWarp, place = from_lane(known.place, from), rows = from_lane(known.rows, from);
    const int column = stream_column(p, from_lane(known.plane, from), warp);
    steps = warp < p.chunks ? stream_columns(p, column) / kStreamStep : 0;
    x.locate(p, read_row(tasks, place, rows, 0), 0, column), x.locate(p, read_row(tasks, place, rows, 1), 1, column);
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
      if (number + kStreamRing < stages) load_stage(p, source, number + kStreamRing, count, buffers, barriers, policy);
    }
    const StreamPlace at(known, from);
    if (j + 1 < count) {  // its x arrives while this task is summed
      if ((j + 1) % kWarp == 0) known = read_stream_task(p, j + 1 + lane, count);
      locate(j + 1);
      x.open(from_lane(known.rows, (j + 1) % kWarp), steps);
    }
    __syncthreads();  // the sums of the task before have been read
    if (warp < p.chunks) put_sums(sums, warp, acc, at.scale);
    __syncthreads();
    store_sum(p, at, sums, static_cast<int>(threadIdx.x));
  }
  if (p.waits_last && blockIdx.x == 0) wait_for_previous();
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
  const Shape shape{processor_count(), kStreamWarps * kWarp, kStreamSharedBytes};
  return launch(shrink_stream_kernel, shape, args.follow, stream, stream_params(args));
}

}  // namespace openlora
