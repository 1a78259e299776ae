// The skinny GEMM of gemm_sm90.h.
//
// Swap-AB: 64-row blocks of W are the m side of wgmma, the tokens its n side, so one token wastes 7/8 of an n8 tile instead of
// 63/64 of an m64 one, and each byte of W enters an SM once.
//
// A block is 8 consumer warps (two warpgroups, each with 64 rows of the tile) and one producer warp. The producer
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
#include "gemm_shrink.cuh"
#include "gemm_store.cuh"
#include "gemm_tma.cuh"
#include "gemm_wgmma.cuh"

namespace openlora {
namespace {

constexpr int kConsumerWarps = 8;
constexpr int kThreads = (kConsumerWarps + 1) * 32;
constexpr int kShrinkThreads = kThreads + kShrinkWarps * 32;
constexpr int kNarrowThreads = 512;  // as if there were so many, where accumulators are few: registers are left for the kernel behind
constexpr int kStoreBarrier = 2;  // and 3: named barriers of the two consumer warpgroups; the shrink has 1
constexpr int kRowBytes = kGemmBlockK * 2;  // one swizzle row

struct Work {
  void* y;
  int tokens, outputs;
  int k_blocks, planes, row_tiles, tile_rows, stages, early;
  int stage_bytes;  // of W and x
  GemmOutput output;
};

// Where stage buffers and barriers lie.
struct Ring {
  uint32_t buffers, barriers, shrink_barriers, lines;
  int stage_bytes, w_bytes, stages;

  __device__ uint32_t w(int stage) const { return buffers + stage * stage_bytes; }
  __device__ uint32_t x(int stage) const { return w(stage) + w_bytes; }
  __device__ uint32_t full(int stage) const { return barriers + stage * 16; }
  __device__ uint32_t empty(int stage) const { return barriers + stage * 16 + 8; }
  // Of a block's task j of the shrink: its pages are there.
  __device__ uint32_t a_full(int j) const { return shrink_barriers + j % kShrinkBarriers * 8; }
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

// The work items of one block, in order: planes innermost.
struct Items {
  const Work& work;
  int item, row_tile, plane, first_k, end_k;

  __device__ explicit Items(const Work& w) : work(w), item(static_cast<int>(blockIdx.x)) { locate(); }
  __device__ bool is_done() const { return item >= work.row_tiles * work.planes; }
  __device__ void next() {
    item += static_cast<int>(gridDim.x);
    locate();
  }
  __device__ void locate() {
    row_tile = item / work.planes;
    plane = item % work.planes;
    first_k = gemm_plane_start(work.k_blocks, work.planes, plane);
    end_k = gemm_plane_start(work.k_blocks, work.planes, plane + 1);
  }
};

__device__ void load_w(const Ring& ring, const CUtensorMap* map, const Items& at, int k, int stage, int tile_rows, int bytes,
                       uint64_t policy) {
  barrier_expect(ring.full(stage), bytes);
  const int row = at.row_tile * tile_rows;
  if (at.work.output == GemmOutput::kSiluMul) {
    tensor_load_pairs(ring.w(stage), map, k * kGemmBlockK, row / 16, ring.full(stage), policy);
  } else {
    tensor_load(ring.w(stage), map, k * kGemmBlockK, row, ring.full(stage), policy);
  }
}

__device__ void load_x(const Ring& ring, const CUtensorMap* map, int k, int stage, uint64_t policy) {
  tensor_load(ring.x(stage), map, k * kGemmBlockK, 0, ring.full(stage), policy);
}

// One thread: the first `early` stages of W, which no kernel in flight writes.
__device__ void load_early(const Work& work, const Ring& ring, const CUtensorMap* w_map) {
  int stage = 0;
  for (Items items(work); !items.is_done(); items.next()) {
    for (int k = items.first_k; k < items.end_k; ++k, ++stage) {
      if (stage == work.early) return;
      load_w(ring, w_map, items, k, stage, work.tile_rows, work.stage_bytes, policy_evict_first());
    }
  }
}

// Of the block whose work items these are, none of which has been left yet.
__device__ __forceinline__ ShrinkSchedule schedule_of(const Items& items, const Shrink& shrink) {
  return shrink_schedule(shrink, items.work.early, items.is_done() ? 0 : items.end_k - items.first_k);
}

// One warp: what the ring still has room for of the first work item and of A, before the kernels ahead have ended. Returns the
// number of stages asked for.
__device__ int load_ahead(const Work& work, const Ring& ring, const CUtensorMap* w_map, const Items& items, const Shrink& shrink,
                          const ShrinkSchedule& ahead, ShrinkSource& source, uint64_t policy) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int stage = min(ahead.start, ahead.k_stages), i = stage, passed = 0;
  for (; stage < work.stages; ++stage) {
    if (ahead.is_due(i, passed) || (i == ahead.k_stages && passed < ahead.count)) {
      load_shrink_stage(shrink, ahead, source, passed++, ring, stage, policy);
    } else if (i < ahead.k_stages) {
      if (lane == 0) load_w(ring, w_map, items, items.first_k + i, stage, work.tile_rows, work.stage_bytes, policy);
      ++i;
    } else {
      break;
    }
  }
  return stage;
}

// One thread, with a shrink one warp, of which the first lane does all but the looking up of pages: once the kernels ahead have ended,
// keeps the ring full.
template <int kTokens, bool kLora>
__device__ void produce(const Work& work, const Ring& ring, const CUtensorMap* w_map, const CUtensorMap* x_map, const Shrink& shrink) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint64_t once = policy_evict_first();
  const uint64_t keep = policy_evict_last();
  Items items(work);
  ShrinkSchedule ahead{};
  ShrinkSource source{};
  int early = work.early;
  if constexpr (kLora) {
    ahead = schedule_of(items, shrink);
    source = read_shrink_source(shrink, ahead, lane);
    early = load_ahead(work, ring, w_map, items, shrink, ahead, source, once);
  }
  wait_for_dependencies();
  launch_dependents();  // not before the wait: whoever starts now may read the same x (lora_work.h, Follow::kWaitLast)
  RingPosition at;
  int passed = 0;  // stages of A
  const auto is_asked_for = [&] { return at.round == 0 && at.stage < early; };
  const auto load_a = [&] {
    if (!is_asked_for()) {
      if (lane == 0 && at.round > 0) barrier_wait(ring.empty(at.stage), (at.round - 1) & 1);
      load_shrink_stage(shrink, ahead, source, passed, ring, at.stage, once);
    }
    ++passed;
    at.advance(work.stages);
  };
  for (; !items.is_done(); items.next()) {
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      if (kLora && ahead.is_due(k - items.first_k, passed)) load_a();
      if (lane != 0) continue;
      if (at.round > 0) barrier_wait(ring.empty(at.stage), (at.round - 1) & 1);
      if (!is_asked_for()) load_w(ring, w_map, items, k, at.stage, work.tile_rows, work.stage_bytes, once);
      load_x(ring, x_map, k, at.stage, keep);
    }
    while (passed < ahead.count) load_a();
  }
  while (passed < ahead.count) load_a();  // a block without rows of W
}

// An item's accumulators to y, in the form that was asked for.
template <int kTokens>
__device__ __forceinline__ void store_item(const Work& work, const Ring& ring, const float (&d)[kTokens / 2], int row_tile, int plane) {
  const int group = static_cast<int>(threadIdx.x) / 128;
  const int first_row = row_tile * work.tile_rows, row_end = min(first_row + work.tile_rows, work.outputs);
  const int64_t offset = static_cast<int64_t>(plane) * work.tokens * work.outputs;
  const LineBuffer lines{ring.lines + group * gemm_line_bytes(kTokens), kStoreBarrier + group};
  const int row = first_row + group * 64;
  if (work.output == GemmOutput::kFloatPlanes) {
    store_lines<float, kTokens>(d, static_cast<float*>(work.y) + offset, work.tokens, work.outputs, row, row_end, lines);
  } else if (work.output == GemmOutput::kBfloat16) {
    store_lines<__nv_bfloat16, kTokens>(d, static_cast<__nv_bfloat16*>(work.y) + offset, work.tokens, work.outputs, row, row_end, lines);
  } else {
    store_silu_mul<kTokens>(d, static_cast<__nv_bfloat16*>(work.y), work.tokens, work.outputs / 2, row / 2, row_end / 2, lines);
  }
}

template <int kTokens, bool kLora>
__device__ void consume(const Work& work, const Ring& ring, const ShrinkSchedule& ahead) {
  const int group = static_cast<int>(threadIdx.x) / 128, lane = static_cast<int>(threadIdx.x) % 32;
  const auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(ring.empty(stage));
  };
  RingPosition at;
  Items items(work);
  int passed = 0;  // stages of A
  const auto pass = [&] {
    barrier_wait(ring.full(at.stage), at.round & 1);  // no phase may go by unseen
    ++passed;
    at.advance(work.stages);
  };
  for (; !items.is_done(); items.next()) {
    float d[kTokens / 2];
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) d[i] = 0.0f;
    wgmma_results<kTokens / 2>(d);
    int previous = -1;
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      if (kLora && ahead.is_due(k - items.first_k, passed)) pass();
      barrier_wait(ring.full(at.stage), at.round & 1);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kGemmBlockK / 16; ++step) {
        Wgmma<kTokens>::add(d, wgmma_descriptor(ring.w(at.stage) + group * 64 * kRowBytes + step * 32),
                            wgmma_descriptor(ring.x(at.stage) + step * 32));
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = at.stage;
    }
    wgmma_wait<0>();
    wgmma_results<kTokens / 2>(d);
    if (previous >= 0) release(previous);
    if constexpr (kLora) {
      while (passed < ahead.count) pass();
    }
    store_item<kTokens>(work, ring, d, items.row_tile, items.plane);
  }
}

template <int kTokens, bool kLora>
__global__ __launch_bounds__(kLora ? (kTokens <= 96 ? kNarrowThreads : kShrinkThreads) : kThreads, 1) void skinny_gemm(
    const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map, const Work work, const __grid_constant__ Shrink shrink) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the body is empty and the launcher refuses
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t shrink_barriers[kLora ? kShrinkBarriers : 1];
  Ring ring;
  ring.w_bytes = work.tile_rows * kRowBytes;
  ring.stage_bytes = max(ring.w_bytes + kTokens * kRowBytes, kLora ? kGemmShrinkStageBytes : 0);
  ring.stages = work.stages;
  ring.shrink_barriers = shared_address(shrink_barriers);
  ring.buffers = (shared_address(shared) + 1023) & ~1023u;
  const int overrun = max(0, kGemmTileRows * kRowBytes - ring.stage_bytes);
  ring.barriers = ring.buffers + work.stages * ring.stage_bytes + overrun;
  ring.lines = ring.barriers + kGemmBarrierBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kConsumerWarps) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < work.stages) {
      barrier_init(ring.full(lane), 1);
      barrier_init(ring.empty(lane), kConsumerWarps);
    }
    if (kLora && lane < kShrinkBarriers) barrier_init(ring.a_full(lane), 1);
    barrier_init_fence();
    __syncwarp();
    if (lane == 0) load_early(work, ring, &w_map);  // its own barriers: no need to wait for the block
    __syncwarp();
  }
  __syncthreads();
  if (warp == kConsumerWarps) {
    if (kLora || threadIdx.x % 32 == 0) produce<kTokens, kLora>(work, ring, &w_map, &x_map, shrink);
    __syncwarp();
  } else if (kLora && warp > kConsumerWarps) {
    const ShrinkSchedule ahead = schedule_of(Items(work), shrink);
    shrink_tasks(shrink, ahead, ring, warp - kConsumerWarps - 1, static_cast<int>(threadIdx.x) % 32);
  } else {
    ShrinkSchedule ahead{};
    if constexpr (kLora) ahead = schedule_of(Items(work), shrink);
    wait_for_dependencies();  // y may still be read by a kernel ahead
    consume<kTokens, kLora>(work, ring, ahead);
  }
#endif
}

using Kernel = void (*)(const CUtensorMap, const CUtensorMap, const Work, const Shrink);

template <bool kLora>
Kernel kernel_of(int tile_tokens) {
  switch (tile_tokens) {
    case 8: return skinny_gemm<8, kLora>;
    case 16: return skinny_gemm<16, kLora>;
    case 32: return skinny_gemm<32, kLora>;
    case 64: return skinny_gemm<64, kLora>;
    case 96: return skinny_gemm<96, kLora>;
    case 128: return skinny_gemm<128, kLora>;
    case 192: return skinny_gemm<192, kLora>;
    case 256: return skinny_gemm<256, kLora>;
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

// Whether the accumulators can leave in the form that is asked for.
bool has_valid_output(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan) {
  return args.output != GemmOutput::kSiluMul || (plan.planes == 1 && args.outputs % 16 == 0 && plan.tile_rows % 16 == 0);
}

// Whether the shrink can ride along: the planes' sums have a place, and the copy engine can address the pages.
bool has_valid_lora(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan) {
  if (args.lora == nullptr) return true;
  bool is_valid = args.lora->span_count >= 1 && args.lora->span_count <= kMaxLoraSpans && args.lora->page_elements % 8 == 0 &&
                  reinterpret_cast<uintptr_t>(args.lora->pages) % 16 == 0 && args.lora->tile_rows <= 16 && plan.least_stage >= kGemmShrinkStageBytes &&
                  gemm_shrink_chunks(args.inputs) > 0 && args.lora->v_planes == gemm_shrink_chunks(args.inputs);
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
  const SkinnyGemmPlan plan = gemm_plan(args.tokens, args.outputs, args.inputs, args.lora != nullptr);
  return launch_skinny_gemm_as(args, plan, stream);
}

cudaError_t launch_skinny_gemm_as(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan, cudaStream_t stream) {
  const bool is_valid = can_run_skinny_gemm(args.tokens, args.outputs, args.inputs) && args.tokens <= plan.tile_tokens &&
                        plan.tile_rows % 8 == 0 && plan.tile_rows <= kGemmTileRows &&
                        gemm_shared_bytes(plan) <= kGemmSharedBytes && args.x_stride % 8 == 0 && args.x_stride >= args.inputs &&
                        is_aligned(args.x) && is_aligned(args.w) && is_aligned(args.y) &&
                        has_valid_output(args, plan) && has_valid_lora(args, plan);
  const Kernel kernel = !is_valid ? nullptr : args.lora != nullptr ? kernel_of<true>(plan.tile_tokens) : kernel_of<false>(plan.tile_tokens);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  static const EncodeTiled encode = find_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  CUtensorMap w_map, x_map;
  if (!(args.output == GemmOutput::kSiluMul ? encode_pairs(encode, &w_map, args.w, args.outputs, args.inputs, plan.tile_rows)
                                            : encode_map(encode, &w_map, args.w, args.outputs, args.inputs, args.inputs, plan.tile_rows)) ||
      !encode_map(encode, &x_map, args.x, args.tokens, args.inputs, args.x_stride, plan.tile_tokens)) {
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
  work.stage_bytes = (plan.tile_rows + plan.tile_tokens) * kRowBytes;
  work.stages = plan.stages;
  work.early = plan.early > 0 ? std::min(plan.early, plan.stages) : plan.stages;
  work.output = args.output;
  const int items = work.row_tiles * plan.planes;
  Shrink shrink = {};
  if (args.lora != nullptr) {
    work.early = std::min(plan.stages / 2, work.k_blocks / plan.planes);  // none of A is among the first stages
    shrink = {*args.lora, args.x, args.x_stride, args.inputs};
  }
  const int resident = sm_count * (2 * shared_bytes <= kGemmSharedBytes - 2048 ? 2 : 1);

  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = args.use_pdl ? 1 : 0;
  cudaLaunchConfig_t config = {};
  // With a shrink, whose items only the device counts, every SM has a block.
  config.gridDim = dim3(args.lora != nullptr ? resident : std::min(items, resident));
  config.blockDim = dim3(args.lora != nullptr ? kShrinkThreads : kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, w_map, x_map, work, shrink);
}

}  // namespace openlora
